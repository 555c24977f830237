"""Small text for the clean stage, and the stage run on it."""

import json
import random
from pathlib import Path

from data.corpus import read_documents, sources
from stages.base import StageContext, StageResult
from stages.clean import Clean

SYLLABLES = ["ka", "lo", "mi", "ren", "sta", "vel", "tor", "una", "pe", "dri", "fos", "gan"]
CODE = 'class A:\n    """Doc.\n\n        indented\n    """\n\n    def f(self):\n\t# tab\n        return {1: "#"}\n'
HINDI = "यह एक छोटा वाक्य है जो हिन्दी में लिखा गया है और किसी पुस्तक से नहीं लिया गया।"
ENGLISH = "The weather was fine when the ship left the harbour, and nobody on board expected the storm."


def invented(count: int, words: int = 60, seed: int = 1) -> list[str]:
    """Different texts of invented words: no two share a run of words."""
    draw = random.Random(seed)
    word = lambda: "".join(draw.choices(SYLLABLES, k=3))  # noqa: E731
    return [" ".join(word() for _ in range(words)) + "." for _ in range(count)]


def write_rows(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def source(path: Path, name: str = "tales", **fields) -> dict:
    base = {"type": "files", "name": name, "language": "en", "licence": "own", "rules": "prose"}
    return base | {"include": ["**/*"], "path": str(path), "language_threshold": 0} | fields


def clean(directory: Path, *sources: dict, **fields) -> Path:
    """Run the stage in ``directory``; the corpus it made. ``parents`` maps inputs to artifact directories."""
    return run_clean(directory, *sources, **fields)[1]


def run_clean(
    directory: Path, *sources: dict, heldout: dict | None = None, parents: dict | None = None, **fields
) -> tuple[StageResult, Path]:
    """As ``clean``, with what the stage says of itself."""
    heldout = {"min_documents": 4} | (heldout or {})
    config = Clean.Config.model_validate({"kind": "clean", "sources": list(sources), "heldout": heldout} | fields)
    places = {"directory": directory, "output": directory / "out", "work": directory / "work", "cache": directory / "c"}
    facts = {"pipeline": "p", "name": "clean", "key": "k", "seed": 0, "config": config, "model": None}
    result = Clean().run(StageContext(**facts, **places, parents=parents or {}, tracker=None))
    return result, directory / "out"


def texts(corpus: Path, split: str | None = None) -> list[str]:
    splits = [split] if split else ["train", "heldout"]
    return [document["text"] for side in splits for document in read_documents(corpus, side)]


def dropped(corpus: Path, index: int = 0) -> dict[str, int]:
    return sources(corpus)[index]["dropped"]


def report(corpus: Path) -> dict:
    return json.loads((corpus / "report.json").read_text())
