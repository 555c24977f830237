"""Translations out of gettext catalogs: ``.po`` text and compiled ``.mo`` (GNU gettext manual)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

_FIELD = re.compile(r'(msgctxt|msgid_plural|msgid|msgstr)(?:\[(\d+)\])?\s+"(.*)"$')
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}
_MO_MAGIC = 0x950412DE


def read_catalog(path: Path) -> Iterator[tuple[str, str]]:
    """Pairs (original, translation) of a ``.po`` or ``.mo`` file, in its order.

    Left out: the header, untranslated, fuzzy (a guess awaiting review) and obsolete entries, and translations equal to
    their original. Of several plural forms the last counts. Raises ``UnicodeDecodeError`` for a file that is not UTF-8
    and ``ValueError`` for a ``.mo`` that is none.
    """
    if path.suffix == ".mo":
        pairs = _read_mo(path.read_bytes(), path)
    else:
        pairs = _read_po(path.read_text(encoding="utf-8").splitlines())
    return ((original, text) for original, text in pairs if original and text and original != text)


def message_documents(messages: Iterable[str], min_words: int, document_bytes: int) -> Iterator[str]:
    """Gather consecutive messages, one a line, into documents of about ``document_bytes``; repeats are left out.

    A catalog's neighbours come from one screen or one file, so that the document has a topic.
    """
    seen: set[str] = set()
    lines: list[str] = []
    size = 0
    for message in messages:
        line = " ".join(message.split())
        if line in seen or len(line.split()) < min_words:
            continue
        seen.add(line)
        lines.append(line)
        size += len(line.encode()) + 1
        if size >= document_bytes:
            yield "\n".join(lines)
            lines, size = [], 0
    if lines:
        yield "\n".join(lines)


def _read_po(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    entry: dict[str, str] = {}
    field, fuzzy, next_fuzzy = "", False, False
    for raw in [*lines, 'msgid ""']:
        line = raw.strip()
        if line.startswith("#,"):
            next_fuzzy = "fuzzy" in line
        match = _FIELD.match(line)
        if match and match[1] in ("msgctxt", "msgid") and "msgstr" in entry:
            if not fuzzy:
                yield entry.get("msgid", ""), entry["msgstr"]
            entry = {}
        if match:
            if match[1] == "msgid":
                fuzzy, next_fuzzy = next_fuzzy, False
            field = match[1]
            entry[field] = _unescape(match[3]) or (entry.get(field, "") if match[2] else "")
        elif line.startswith('"') and line.endswith('"') and field:
            entry[field] += _unescape(line[1:-1])
        elif line.startswith("#~"):
            field = ""


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[1]), text)


def _read_mo(data: bytes, path: Path) -> Iterator[tuple[str, str]]:
    if len(data) < 20:
        raise ValueError(f"{path.name} is no compiled gettext catalog: too short")
    order = "<" if struct.unpack_from("<I", data)[0] == _MO_MAGIC else ">"
    magic, _, count, originals, translations = struct.unpack_from(f"{order}5I", data)
    if magic != _MO_MAGIC:
        raise ValueError(f"{path.name} is no compiled gettext catalog: wrong magic number")
    for index in range(count):
        size, start = struct.unpack_from(f"{order}2I", data, originals + 8 * index)
        original = data[start : start + size].split(b"\0")[0].rsplit(b"\x04", 1)[-1]
        size, start = struct.unpack_from(f"{order}2I", data, translations + 8 * index)
        yield original.decode(), data[start : start + size].split(b"\0")[-1].decode()
