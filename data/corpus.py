"""The corpus artifact: cleaned documents, split into train and held-out, one gzip JSONL file a source.

Layout of a corpus directory (the ``output/`` folder of a finished ``clean`` stage)::

    train/<source>.jsonl.gz   heldout/<source>.jsonl.gz   corpus.json   report.json   funnel.html

One document a line: ``{"id": hex, "text": str, "source": str, "language": str, "title": str | null}``. ``text`` is NFC
(code is left as it was written) and never empty; ``id`` is the first 32 hex digits of the text's SHA-256, so equal text
has an equal id everywhere. Files are byte-identical for equal documents in equal order: gzip carries neither a time nor
a name.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

SPLITS = ("train", "heldout")
FORMAT = 1


class CorpusDocument(TypedDict):
    """One document of a corpus."""

    id: str
    text: str
    source: str
    language: str
    title: str | None


class CorpusError(ValueError):
    """A corpus directory that cannot be read as one: what is missing or wrong, in one line."""


def document_id(text: str) -> str:
    """The document's identity: the first 32 hex digits of the SHA-256 of its UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sources(directory: Path) -> list[dict[str, Any]]:
    """What ``corpus.json`` says of each source, in the recipe's order.

    Each entry holds ``name``, ``language``, ``domain`` (or null), ``licence``, ``train`` and ``heldout`` (``{documents,
    bytes}``) and ``dropped`` (``{rule: documents}``).
    """
    path = Path(directory) / "corpus.json"
    if not path.is_file():
        raise CorpusError(f"{directory} is no corpus: it has no corpus.json; run the clean stage")
    described = json.loads(path.read_text(encoding="utf-8"))
    if described.get("format") != FORMAT:
        got = described.get("format")
        raise CorpusError(f"{path}: format must be {FORMAT}; got {got!r}; run the clean stage again")
    return list(described["sources"])


def read_documents(directory: Path, split: str, source: str | None = None) -> Iterator[CorpusDocument]:
    """Documents of ``split`` (``"train"`` or ``"heldout"``), source after source in the recipe's order.

    ``source`` narrows to one source; an unknown name or split is a ``CorpusError`` naming the valid ones.
    """
    if split not in SPLITS:
        raise CorpusError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    names = [entry["name"] for entry in sources(directory)]
    if source is not None and source not in names:
        raise CorpusError(f"source must be one of {', '.join(names)}; got {source!r}")
    return _read(Path(directory) / split, names if source is None else [source])


def _read(folder: Path, names: list[str]) -> Iterator[CorpusDocument]:
    for name in names:
        path = folder / f"{name}.jsonl.gz"
        if not path.is_file():
            raise CorpusError(f"{path} is missing from the corpus; run the clean stage again")
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield json.loads(line)


class DocumentWriter:
    """Writes one file of documents, byte-identical for equal input; counts what it wrote.

    ``documents`` and ``bytes`` (UTF-8 bytes of text, without the JSON around it) grow with each ``write``.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.documents = 0
        self.bytes = 0
        self._file = path.open("wb")
        self._gzip = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._file, mtime=0)

    def write(self, document: CorpusDocument) -> None:
        """Append ``document``."""
        line = json.dumps(document, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        self._gzip.write(line.encode() + b"\n")
        self.documents += 1
        self.bytes += len(document["text"].encode())

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gzip.close()
        self._file.close()


def write_description(directory: Path, described: list[dict[str, Any]], **facts: Any) -> None:
    """Write ``corpus.json``: the format, ``described`` as ``sources``, and ``facts`` about the whole."""
    content = {"format": FORMAT, **facts, "sources": described}
    text = json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True)
    (Path(directory) / "corpus.json").write_text(text + "\n", encoding="utf-8")
