"""Reading one file of a source as documents, by its format; what is bad costs the document that holds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.catalogs import message_documents, read_catalog
from data.compressed import UnreadableFile, bounded_lines, plain_suffix, read_bounded, read_chunks
from data.documents import RawDocument, row_as_document, rows_as_documents, too_large
from data.rows import template_fields
from data.source_config import FileReading, SourceBase

MAX_JSON_BYTES = 512_000_000
"""A ``.json`` file is parsed as a whole; a larger one belongs into JSONL."""
PARQUET_BATCH_BYTES = 32_000_000
ROW_FORMATS = {"jsonl", "json", "parquet"}
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_FORMATS |= {".po": "gettext", ".mo": "gettext"}


def file_format(source: FileReading, path: Path) -> str:
    """How ``path`` is read: as the source says, or by its ending."""
    return source.format if source.format != "auto" else _FORMATS.get(plain_suffix(path), "text")


def read_file(source: FileReading, path: Path, name: str) -> Iterator[RawDocument]:
    """Documents of one file; ``name`` begins their origins. Raises ``UnreadableFile`` and ``SourceError``."""
    form = file_format(source, path)
    if form == "jsonl":
        yield from _read_jsonl(source, path, name)
    elif form == "json":
        yield from _read_json(source, path, name)
    elif form == "parquet":
        yield from rows_as_documents(source, _parquet_rows(source, path), name)
    elif form == "gettext":
        yield from _read_gettext(source, path, name)
    elif source.split == "file":
        yield _read_text(source, path, name)
    else:
        yield from _read_blocks(source, path, name)


def _read_text(source: FileReading, path: Path, name: str) -> RawDocument:
    content = read_bounded(path, source.max_document_bytes)
    if content is None:
        return too_large(source, name, sum(len(chunk) for chunk in read_chunks(path)))
    try:
        return RawDocument(content.decode("utf-8-sig"), name, title=name)
    except UnicodeDecodeError as error:
        return RawDocument("", name, fault="invalid_utf8", detail=_bad_byte(error), size=len(content))


def _read_blocks(source: FileReading, path: Path, name: str) -> Iterator[RawDocument]:
    """Documents between blank lines, one in memory at a time; a bad byte or a huge line costs its own document."""
    block = _Block(1)
    for number, (content, size) in enumerate(bounded_lines(path, source.max_document_bytes), start=1):
        line = b"" if content is None else content.removeprefix(b"\xef\xbb\xbf") if number == 1 else content
        if size and not (content is not None and _is_blank(line)):
            block.add(line, size, source.max_document_bytes)
            continue
        yield from block.document(source, name)
        block = _Block(number + 1)
    yield from block.document(source, name)


class _Block:
    """The lines of one document."""

    def __init__(self, start: int) -> None:
        self.start, self.size = start, 0
        self._lines: list[bytes] = []

    def add(self, line: bytes, size: int, limit: int) -> None:
        """Count a line of ``size`` bytes; a document beyond ``limit`` is not held."""
        self.size += size + 1
        if self.size - 1 <= limit:
            self._lines.append(line)

    def document(self, source: FileReading, name: str) -> Iterator[RawDocument]:
        """The document, or its fault; none where there is no line."""
        where = f"{name}:{self.start}"
        if not self.size:
            return
        if self.size - 1 > source.max_document_bytes:
            yield too_large(source, where, self.size - 1)
            return
        try:
            yield RawDocument(b"\n".join(self._lines).decode(), where)
        except UnicodeDecodeError as error:
            yield RawDocument("", where, fault="invalid_utf8", detail=_bad_byte(error), size=self.size - 1)


def _is_blank(line: bytes) -> bool:
    """Whether nothing can be seen in the line; spaces beyond ASCII count as such."""
    return not line.strip() or (line[:1] >= b"\x80" and not line.decode(errors="replace").strip())


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x} at {error.start}"


def _read_jsonl(source: FileReading, path: Path, name: str) -> Iterator[RawDocument]:
    """Lines one by one: a file may be larger than memory, and one bad line costs one document."""
    first = True
    for number, (line, size) in enumerate(bounded_lines(path, source.max_document_bytes), start=1):
        where = f"{name}:{number}"
        if line is None:
            yield too_large(source, where, size)
        elif line.strip():
            row, fault, detail = _parse_json(line)
            if fault:
                yield RawDocument("", where, fault=fault, detail=detail, size=size)
                continue
            document = row_as_document(source, row, where, first=first)
            yield document if document.text else dataclasses.replace(document, size=size)
            first = False


def _read_json(source: FileReading, path: Path, name: str) -> Iterator[RawDocument]:
    """A JSON list of rows, an object whose values are the rows, or one row."""
    data = read_bounded(path, MAX_JSON_BYTES)
    if data is None:
        raise UnreadableFile(
            f"a .json file is held whole and may have {MAX_JSON_BYTES:,} bytes at most: write it as JSONL"
        )
    content, fault, detail = _parse_json(data)
    if fault:
        yield RawDocument("", name, fault=fault, detail=detail, size=len(data))
        return
    if isinstance(content, dict):
        rows = list(content.values())
        content = rows if rows and all(isinstance(row, dict) for row in rows) else [content]
    yield from rows_as_documents(source, content if isinstance(content, list) else [content], name)


def _parse_json(data: bytes) -> tuple[Any, str | None, str]:
    """The parsed value and no fault, or nothing, the fault's rule name and what was found."""
    try:
        return json.loads(data.decode("utf-8-sig")), None, ""
    except UnicodeDecodeError as error:
        return None, "invalid_utf8", _bad_byte(error)
    except json.JSONDecodeError as error:
        return None, "invalid_json", f"{error.msg} at column {error.colno}"
    except RecursionError:
        return None, "invalid_json", "nested too deeply"


def _parquet_rows(source: SourceBase, path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of the columns that the source refers to, some ``PARQUET_BATCH_BYTES`` of them at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        # Only writers that were asked to put checksums in; a page without one is read as it is.
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
            rows = PARQUET_BATCH_BYTES * file.metadata.num_rows // max(1, size)
            columns = _columns(source, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=min(1024, max(1, rows)), columns=columns):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UnreadableFile(" ".join(str(error).split())) from error


def _columns(source: SourceBase, present: list[str]) -> list[str] | None:
    """The columns to read; all (None) where one is absent, so that the refusal can say what there is."""
    asked = [*template_fields(source.template), *(one.field for one in source.filters)]
    asked += [source.title] if source.title else []
    names = list(dict.fromkeys(field.split(".")[0] for field in asked))
    return names if set(names) <= set(present) else None


def _read_gettext(source: FileReading, path: Path, name: str) -> Iterator[RawDocument]:
    try:
        messages = [translation for _, translation in read_catalog(path)]
    except UnicodeDecodeError:
        yield RawDocument("", name, fault="invalid_utf8", size=path.stat().st_size)
        return
    except ValueError:
        yield RawDocument("", name, fault="invalid_catalog", size=path.stat().st_size)
        return
    documents = message_documents(messages, source.message_min_words, source.message_document_bytes)
    for number, text in enumerate(documents, start=1):
        yield RawDocument(text, f"{name}:{number}", title=None)
