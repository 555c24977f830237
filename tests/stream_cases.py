"""A stream artifact over real small files: four JSONL files of English, one Parquet file of German."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_run import SOURCES, documents

from data.clean_decontaminate import ContaminationIndex
from data.stream_config import StreamSettings
from data.stream_freeze import freeze_stream
from data.tokenizer import finish, load
from data.tokenizer_train import train_byte_level

N_DOCUMENTS = {"web-en": 80, "buch-de": 40}


def texts(name: str) -> list[str]:
    """Texts of one source; no two are equal."""
    language = name.split("-")[1]
    return [f"{text} {number}" for number, text in enumerate(documents(language, N_DOCUMENTS[name], 5))]


def write_sources(folder: Path) -> list[dict[str, Any]]:
    """Write the files and describe them as a recipe does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "en").mkdir(parents=True)
    (folder / "de").mkdir()
    rows = [{"text": text} for text in texts("web-en")]
    for number in range(4):
        lines = [json.dumps(row) for row in rows[number::4]]
        (folder / "en" / f"part{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pq.write_table(pa.table({"text": texts("buch-de")}), folder / "de" / "all.parquet", row_group_size=7)
    plain = {"type": "files", "licence": "none", "rules": "none"}
    return [
        plain
        | {"name": "web-en", "language": "en", "domain": "web", "path": str(folder / "en"), "include": ["*.jsonl"]},
        plain | {"name": "buch-de", "language": "de", "path": str(folder / "de"), "include": ["*.parquet"]},
    ]


def make_tokenizer(directory: Path) -> Path:
    """A byte-level tokenizer of both languages in ``directory``."""
    directory.mkdir(parents=True)
    train_byte_level([text for language in SOURCES for text in documents(language, 120, 1)], 320, directory)
    finish(directory, load(directory), "byte_level_bpe", {})
    return directory


def settings(sources: list[dict[str, Any]], **changes: Any) -> StreamSettings:
    """Small windows, two lanes, a tenth held out."""
    plain = {"sources": sources, "lanes": 2, "shuffle_documents": 8, "heldout_share": 0.1, "chat_share": 0.3}
    return StreamSettings.model_validate(plain | changes)


def freeze(
    folder: Path,
    tokenizer: Path,
    sources: list[dict[str, Any]],
    contamination: ContaminationIndex | None = None,
    heldout_documents: int = 6,
    sample_documents: int = 200,
    **changes: Any,
) -> Path:
    """A finished tokens artifact in ``folder/output``; returns ``folder``."""
    (folder / "output").mkdir(parents=True)
    facts = {"heldout_documents": heldout_documents, "sample_documents": sample_documents, "min_special_count": 1}
    facts["contamination"] = contamination
    freeze_stream(settings(sources, **changes), tokenizer, folder / "output", seed=4, **facts)
    return folder
