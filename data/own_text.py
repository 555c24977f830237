"""A directory of one's own text as sources of the clean stage, in place of the recipe's (``--data DIR``)."""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.compressed import (
    MAX_ROW_BYTES,
    UnreadableFile,
    bounded_lines,
    damage_at_a_glance,
    plain_suffix,
    read_chunks,
)
from data.sources import SourceError

CODE_ENDINGS = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".js", ".ts", ".java", ".sh", ".sql"}
TEXT_ENDINGS = {".txt", ".md", ".rst"}
ROW_ENDINGS = {".jsonl", ".ndjson", ".parquet"}
TEXT_FIELDS = ("text", "content", "document", "body")
SAMPLE_BYTES = 20_000
Group = tuple[str, str, str]
"""Kind, language, and the field that holds the text."""
SAMPLE_ROWS = 20
PARQUET_ROWS = 1024
# A text file larger than this is taken for a collection of documents between blank lines, not for one document.
COLLECTION_BYTES = 200_000
# A source must keep some documents on both sides of the held-out split; a stray file is no source of its own.
MIN_FILES = 3
MIN_DOCUMENTS = 3
# A folder with more than this has enough of anything; less is read through to be counted.
COUNTED_BYTES = 20_000_000
NAMED = 8
LOST_LINK = "a link to what is not there"


class _NoTextError(ValueError):
    """A file that holds nothing to read; the argument says why."""


@dataclasses.dataclass(frozen=True)
class OwnText:
    """What a folder holds: the ``sources`` to read it, and what was found there."""

    sources: list[dict[str, Any]]
    """Configs of ``files`` sources."""
    files: dict[str, int]
    """Files taken, by source."""
    left_out: dict[str, str]
    """Why a file was left out, by its path in the folder."""
    text_bytes: int
    """Bytes of the files taken, decompressed where they were counted."""
    documents: dict[str, int] | None
    """Documents by source, before any rule; None in a folder that is too large to be counted beforehand."""

    def lines(self, directory: Path) -> list[str]:
        """What is taken, and what is left out and why, for a person."""
        count = sum(self.files.values())
        about = "" if self.documents is None else f", {sum(self.documents.values()):,} documents"
        parts = ", ".join(f"{name} {number} file{'s' * (number != 1)}" for name, number in self.files.items())
        lines = [f"{directory}: {count} file{'s' * (count != 1)}, {self.text_bytes:,} bytes{about}: {parts}"]
        named = [f"{file} ({why})" for file, why in list(self.left_out.items())[:NAMED]]
        more = len(self.left_out) - len(named)
        named += [f"and {more} more"] if more else []
        return lines + ([f"left out: {', '.join(named)}"] if named else [])


def sources_from_directory(directory: Path) -> list[dict[str, Any]]:
    """The sources of ``read_directory``."""
    return read_directory(directory).sources


def read_directory(directory: Path) -> OwnText:
    """Configs of ``files`` sources that read all text under ``directory``, grouped by language and way of reading.

    ``.txt``, ``.md`` and ``.rst`` are prose (a large file is split at blank lines), ``.jsonl``, ``.ndjson`` and
    ``.parquet`` hold a document a row in the field ``text``, ``content``, ``document`` or ``body``; program files are
    code. The language is told from each file's beginning; a few texts in another language join the largest group.
    Each may be compressed (``.gz``, ``.zst``, ``.xz``, ``.bz2``). Hidden files are passed over; files that are empty,
    not UTF-8, not readable, of no kind that is read, or too few to be a source are left out by name. Raises
    ``SourceError`` when nothing is left, or files are damaged.
    """
    directory = Path(directory).resolve()
    if not directory.is_dir():
        raise SourceError("data", "path", f"must be a folder; got {directory}")
    left_out: dict[str, str] = {}
    damaged: dict[str, str] = {}
    groups: dict[Group, list[str]] = defaultdict(list)
    for path in _visible_files(directory, left_out):
        name = path.relative_to(directory).as_posix()
        try:
            groups[_describe(path)].append(name)
        except _NoTextError as error:
            left_out[name] = str(error)
        except UnicodeDecodeError as error:
            left_out[name] = f"not UTF-8: byte {error.object[error.start]:#x}"
        except UnreadableFile as error:
            damaged[name] = str(error)
    joined = _joined(groups)
    counted = _counted(directory, joined, left_out, damaged)
    if damaged:
        raise SourceError("data", "path", _damaged(directory, damaged))
    kept = {group: files for group, files in sorted(joined.items()) if counted is None or group in counted}
    if not kept:
        raise SourceError("data", "path", _nothing(directory, left_out))
    sources = {group: _source(directory, group, files) for group, files in kept.items()}
    # What may be missing against one's will (a disk that is not mounted) is named before the odd files.
    named = dict(sorted(left_out.items(), key=lambda item: (not item[1].startswith(LOST_LINK), item[0])))
    files = {sources[group]["name"]: len(files) for group, files in kept.items()}
    if counted is None:
        return OwnText(list(sources.values()), files, named, _bytes_of(directory, kept), None)
    documents = {sources[group]["name"]: counted[group][0] for group in kept}
    return OwnText(list(sources.values()), files, named, sum(counted[group][1] for group in kept), documents)


def _nothing(directory: Path, left_out: dict[str, str]) -> str:
    endings = " ".join(sorted(TEXT_ENDINGS | ROW_ENDINGS | CODE_ENDINGS))
    named = ", ".join(f"{file} ({why})" for file, why in list(left_out.items())[:NAMED])
    seen = f"; left out: {named}" if named else ""
    return f"{directory} holds no text{seen}; files that are read: {endings}"


def _bytes_of(directory: Path, groups: dict[Group, list[str]]) -> int:
    return sum((directory / file).stat().st_size for files in groups.values() for file in files)


def _counted(
    directory: Path, groups: dict[Group, list[str]], left_out: dict[str, str], damaged: dict[str, str]
) -> dict[Group, tuple[int, int]] | None:
    """Documents and bytes of the groups that are enough for a source; the files of others are left out.

    What cannot be read to its end is added to ``damaged``, file and reason. None for a folder that is too large to be
    read through.
    """
    if _bytes_of(directory, groups) > COUNTED_BYTES:
        return None
    kept = {}
    for group, files in groups.items():
        found = []
        for file in files:
            try:
                found.append(_count(directory / file, group[0], group[2]))
            except UnreadableFile as error:
                damaged[file] = str(error)
        documents = sum(number for number, _ in found)
        if documents < MIN_DOCUMENTS:
            why = f"{documents} document{'s' * (documents != 1)} of its kind, a source needs {MIN_DOCUMENTS}"
            left_out.update(dict.fromkeys(files, why))
        else:
            kept[group] = (documents, sum(size for _, size in found))
    return kept


def _damaged(directory: Path, damaged: dict[str, str]) -> str:
    if len(damaged) == 1:
        ((file, why),) = damaged.items()
        return f"{directory / file} is damaged ({why}); fetch it again or move it"
    named = [f"{file} ({why})" for file, why in sorted(damaged.items())[:NAMED]]
    more = f", and {len(damaged) - len(named)} more" if len(damaged) > len(named) else ""
    return f"{directory} holds {len(damaged)} damaged files: {', '.join(named)}{more}; fetch them again or move them"


def _count(path: Path, kind: str, field: str) -> tuple[int, int]:
    """Documents and bytes of one file; a row counts where ``field`` holds text."""
    if kind == "rows" and path.suffix == ".parquet":
        texts = [row.get(field) for batch in _parquet_batches(path, [field]) for row in batch]
        return sum(isinstance(text, str | bytes) and bool(text.strip()) for text in texts), path.stat().st_size
    if kind == "rows":
        rows = [(line.size, _text_of(line.content, field)) for line in bounded_lines(path, MAX_ROW_BYTES)]
        return sum(bool(text) for _, text in rows), sum(size for size, text in rows if text)
    content = b"".join(read_chunks(path))
    pieces = re.split(rb"\n\s*\n", content) if kind == "collection" else [content]
    return sum(bool(piece.strip()) for piece in pieces), len(content)


def _text_of(row: bytes | None, field: str) -> str:
    """What ``field`` of one JSON row holds; nothing where the row is broken, or holds something else there."""
    try:
        found = json.loads(row) if row else None
    except ValueError:
        return ""
    text = found.get(field) if isinstance(found, dict) else None
    return text.strip() if isinstance(text, str) else ""


def _joined(groups: dict[Group, list[str]]) -> dict[Group, list[str]]:
    """Groups of one-document files that are too small to be a source join the largest; a lone small one is split."""
    texts = {group: files for group, files in groups.items() if group[0] == "text"}
    if not texts:
        return groups
    main = max(texts, key=lambda group: len(texts[group]))
    joined = {group: files for group, files in groups.items() if group not in texts}
    for group, files in texts.items():
        target = group if len(files) >= MIN_FILES else main
        joined.setdefault(target, []).extend(files)
    if len(joined[main]) < MIN_FILES:
        files = joined.pop(main)
        joined.setdefault(("collection", main[1], ""), []).extend(files)
    return {group: sorted(files) for group, files in joined.items()}


def _visible_files(directory: Path, left_out: dict[str, str]) -> Iterator[Path]:
    """The files that may hold text; the others, hidden ones aside, are added to ``left_out``."""
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        if any(part.startswith(".") for part in inside.parts):
            continue
        try:
            # A link may lead to where this user cannot look.
            is_file = path.is_file()
            size = path.stat().st_size if is_file else 0
            kind = _kind(path) if is_file else None
        except OSError as error:
            left_out[inside.as_posix()] = error.strerror or str(error)
            continue
        if not is_file:
            if path.is_symlink() or not path.is_dir():
                left_out[inside.as_posix()] = _link(path) if path.is_symlink() else "not a regular file"
            continue
        if kind is None:
            left_out[inside.as_posix()] = "not of a kind that is read"
        elif not os.access(path, os.R_OK):
            left_out[inside.as_posix()] = "not readable by this user"
        elif not size and plain_suffix(path) == path.suffix != ".parquet":
            left_out[inside.as_posix()] = "empty"
        else:
            yield path


def _link(path: Path) -> str:
    return "a link" if os.path.exists(path) else f"{LOST_LINK}, {path.readlink()}"


def _kind(path: Path) -> str | None:
    ending = plain_suffix(path)
    if ending in CODE_ENDINGS:
        return "code"
    if ending in TEXT_ENDINGS:
        return "collection" if path.stat().st_size > COLLECTION_BYTES else "text"
    return "rows" if ending in ROW_ENDINGS else None


def _describe(path: Path) -> Group:
    """Kind, language and field that holds the text of one file.

    Raises ``_NoTextError``, ``UnicodeDecodeError`` and ``UnreadableFile``.
    """
    if damage := damage_at_a_glance(path):
        raise UnreadableFile(damage)
    kind = _kind(path) or "text"
    if kind == "rows":
        return kind, *_row_language_and_field(_first_rows(path))
    sample = next(read_chunks(path, SAMPLE_BYTES), b"")
    # The sample may end within a character: that is not the file's fault.
    text = codecs.getincrementaldecoder("utf-8")().decode(sample)
    if "\0" in text:
        raise _NoTextError("not text: it holds zero bytes")
    if not text.strip():
        raise _NoTextError("holds nothing but blanks")
    return (kind, "code", "") if kind == "code" else (kind, detect_language(text), "")


def _row_language_and_field(rows: list[dict[str, Any]]) -> tuple[str, str]:
    if not rows:
        raise _NoTextError("holds no rows")
    field = next((name for name in TEXT_FIELDS if name in rows[0]), None)
    if field is None:
        has = ", ".join(map(str, list(rows[0])[:NAMED])) or "none"
        raise _NoTextError(f"no field {', '.join(TEXT_FIELDS)}; its fields: {has}")
    text = " ".join(str(row.get(field) or "") for row in rows)
    if not text.strip():
        raise _NoTextError(f"nothing in the field {field}")
    return detect_language(text), field


def _first_rows(path: Path) -> list[dict[str, Any]]:
    """The first readable rows; empty when there are none."""
    if path.suffix == ".parquet":
        return next(_parquet_batches(path, None, SAMPLE_ROWS), [])
    lines = (line.content for line in itertools.islice(bounded_lines(path, MAX_ROW_BYTES), SAMPLE_ROWS))
    rows = (_parsed(line) for line in lines if line is not None)
    return [row for row in rows if isinstance(row, dict)]


def _parquet_batches(path: Path, columns: list[str] | None, rows: int = PARQUET_ROWS) -> Iterator[list[dict[str, Any]]]:
    """Rows of a Parquet file, some at a time, its pages held against their checksums where they have any.

    Raises ``UnreadableFile``.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=rows, columns=columns):
                yield batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UnreadableFile(" ".join(str(error).split())) from error


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def detect_language(text: str) -> str:
    """ISO 639 code of the most likely language of ``text``."""
    import py3langid

    return str(py3langid.classify(text[:SAMPLE_BYTES])[0])


def _source(directory: Path, group: tuple[str, str, str], files: list[str]) -> dict[str, Any]:
    kind, language, field = group
    suffix = f"-{field}" if field not in ("", "text") else ""
    name = "own-code" if kind == "code" else f"own-{kind}-{language}{suffix}"
    config: dict[str, Any] = {
        "type": "files",
        "name": name,
        "language": language,
        "licence": "own text",
        "rules": "code" if kind == "code" else "prose",
        "path": str(directory),
        "include": [_escape(file) for file in files],
    }
    if kind == "rows":
        config["template"] = f"{{{field}}}"
    if kind == "collection":
        config["split"] = "blank_line"
    return config


def _escape(file: str) -> str:
    """``file`` as a glob pattern that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in file)
