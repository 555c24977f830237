"""A raw document, and how a row becomes one: what fits no template or limit is named, not fatal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data.rows import MissingField, lookup, objection, render_row, template_fields
from data.source_config import SourceBase


class SourceError(ValueError):
    """A source that cannot be read as configured; ``source`` is its name, ``field`` the config field to mend."""

    def __init__(self, source: str, field: str, message: str) -> None:
        self.source, self.field = source, field
        super().__init__(message)


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """One document as read: ``origin`` says where from; a ``fault`` (rule name) means that it cannot be used.

    ``detail`` says what was found where the fault's name alone does not, ``size`` how many bytes were read that gave
    no text.
    """

    text: str
    origin: str
    title: str | None = None
    fault: str | None = None
    detail: str = ""
    size: int = 0

    @property
    def read_bytes(self) -> int:
        """UTF-8 bytes of the text, or of what was read in its place."""
        return self.size or len(self.text.encode("utf-8", "surrogatepass"))


def rows_as_documents(source: SourceBase, rows: Iterable[Any], origin: str) -> Iterator[RawDocument]:
    """Render rows (mappings) by the source's template; a field absent from the first row is a ``SourceError``.

    A later row without the field, or one that is no mapping, becomes a document with the fault ``bad_row``.
    """
    for index, row in enumerate(rows):
        yield row_as_document(source, row, f"{origin}:{index + 1}", first=index == 0)


def row_as_document(source: SourceBase, row: Any, where: str, *, first: bool = False) -> RawDocument:
    """One row through the source's filters, template and limit, as ``rows_as_documents`` does for all."""
    try:
        if not isinstance(row, Mapping):
            raise MissingField("a JSON object")
        refused = objection(source.filters, row)
        title = lookup(row, source.title) if source.title else None
        if not refused and (wrong := _not_text(source.template, row)):
            if first:
                raise _wrong_type(source, wrong, where)
            return RawDocument("", where, fault="bad_row", detail=wrong)
        text = render_row(source.template, row)
    except MissingField as missing:
        if first:
            raise _missing_field(source, row, str(missing.args[0]), where) from missing
        return RawDocument("", where, fault="bad_row", detail=f"lacks {missing.args[0]}")
    except UnicodeDecodeError as error:
        return RawDocument("", where, fault="invalid_utf8", detail=str(error.reason))
    document = limited(source, text, where, None if title is None else str(title))
    return dataclasses.replace(document, fault=refused[0], detail=refused[1]) if refused else document


def _not_text(template: str, row: Mapping[str, Any]) -> str:
    """What stands where a row's one field is to be the text and is none; empty where there is nothing to object to.

    Beside other fields a number or a list is a part of the text, as options and scores are.
    """
    fields = template_fields(template)
    if len(fields) != 1 or template != f"{{{fields[0]}}}":
        return ""
    value = lookup(row, fields[0])
    if value is None or isinstance(value, str | bytes):
        return ""
    return f"{fields[0]} holds {type(value).__name__} {value!r:.40}, not text"


def _wrong_type(source: SourceBase, wrong: str, where: str) -> SourceError:
    message = f"must give text; got {source.template!r}, of which {where} says: {wrong}; name a field that holds text"
    return SourceError(source.name, "template", message)


def limited(source: SourceBase, text: str, where: str, title: str | None = None) -> RawDocument:
    """A document, or the fault ``too_large`` in its place."""
    # A character is at most four bytes, so that most documents need not be encoded to be measured.
    if 4 * len(text) > source.max_document_bytes and (size := len(text.encode("utf-8", "replace"))) > (
        source.max_document_bytes
    ):
        return too_large(source, where, size)
    return RawDocument(text, where, title)


def too_large(source: SourceBase, where: str, size: int) -> RawDocument:
    """What stands for a document of ``size`` bytes, which is longer than its source allows."""
    detail = f"{size:,} bytes, more than max_document_bytes {source.max_document_bytes:,}"
    return RawDocument("", where, fault="too_large", detail=detail, size=size)


def _missing_field(source: SourceBase, row: Any, field: str, where: str) -> SourceError:
    has = ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else type(row).__name__
    option = "template"
    if field not in template_fields(source.template):
        option = "title" if source.title == field else "filters"
    option = option if isinstance(row, Mapping) else "template"
    return SourceError(source.name, option, f"refers to {field!r}, which {where} lacks; it has: {has}")
