"""A directory of one's own text as sources of the clean stage, in place of the recipe's (``--data DIR``)."""

from __future__ import annotations

import codecs
import itertools
import json
import os
import sys
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
SAMPLE_ROWS = 20
# A text file larger than this is taken for a collection of documents between blank lines, not for one document.
COLLECTION_BYTES = 200_000
# A source must keep some documents on both sides of the held-out split; a stray file is no source of its own.
MIN_FILES = 3


def sources_from_directory(directory: Path) -> list[dict[str, Any]]:
    """Configs of ``files`` sources that read all text under ``directory``, grouped by language and way of reading.

    ``.txt``, ``.md`` and ``.rst`` are prose (a large file is split at blank lines), ``.jsonl``, ``.ndjson`` and
    ``.parquet`` hold a document a row in the field ``text``, ``content``, ``document`` or ``body``; program files are
    code. The language is told from each file's beginning; a few texts in another language join the largest group.
    Each may be compressed (``.gz``, ``.zst``, ``.xz``, ``.bz2``). Hidden files and files that are not UTF-8 are left
    out, the latter with a line that names them. Raises ``SourceError`` when nothing is left, or a file is damaged.
    """
    directory = Path(directory).resolve()
    if not directory.is_dir():
        raise SourceError("data", "path", f"--data must be a folder; got {directory}")
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for path in _visible_files(directory):
        try:
            groups[_describe(path)].append(path.relative_to(directory).as_posix())
        except UnicodeDecodeError as error:
            print(f"--data: {path} is left out: not UTF-8 (byte {error.object[error.start]:#x})", file=sys.stderr)
        except UnreadableFile as error:
            raise SourceError(
                "data", "path", f"--data: {path} is damaged ({error}); fetch it again or move it"
            ) from error
    if not groups:
        endings = " ".join(sorted(TEXT_ENDINGS | ROW_ENDINGS | CODE_ENDINGS))
        raise SourceError("data", "path", f"--data {directory} holds no text; files that are read: {endings}")
    return [_source(directory, group, files) for group, files in sorted(_joined(groups).items())]


def _joined(groups: dict[tuple[str, str, str], list[str]]) -> dict[tuple[str, str, str], list[str]]:
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


def _visible_files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        try:
            # A link may lead to where this user cannot look.
            is_text = path.is_file() and not hidden and _kind(path)
        except OSError as error:
            print(f"--data: {path} is left out: {error.strerror}", file=sys.stderr)
            continue
        if is_text and not os.access(path, os.R_OK):
            print(f"--data: {path} is left out: not readable by this user", file=sys.stderr)
        elif is_text:
            yield path


def _kind(path: Path) -> str | None:
    ending = plain_suffix(path)
    if ending in CODE_ENDINGS:
        return "code"
    if ending in TEXT_ENDINGS:
        return "collection" if path.stat().st_size > COLLECTION_BYTES else "text"
    return "rows" if ending in ROW_ENDINGS else None


def _describe(path: Path) -> tuple[str, str, str]:
    """(kind, language, field that holds the text) of one file; raises ``UnicodeDecodeError`` and ``UnreadableFile``."""
    if damage := damage_at_a_glance(path):
        raise UnreadableFile(damage)
    kind = _kind(path) or "text"
    if kind == "code":
        return kind, "code", ""
    if kind == "rows":
        rows = _first_rows(path)
        field = next((name for name in TEXT_FIELDS if rows and name in rows[0]), "text")
        return kind, detect_language(" ".join(str(row.get(field, "")) for row in rows)), field
    sample = next(read_chunks(path, SAMPLE_BYTES), b"")
    # The sample may end within a character: that is not the file's fault.
    return kind, detect_language(codecs.getincrementaldecoder("utf-8")().decode(sample)), ""


def _first_rows(path: Path) -> list[dict[str, Any]]:
    """The first readable rows; empty when there are none, which the stage then reports."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as file:
                return next(file.iter_batches(batch_size=SAMPLE_ROWS)).to_pylist() if file.metadata.num_rows else []
        except (OSError, ValueError) as error:
            raise UnreadableFile(" ".join(str(error).split())) from error
    lines = (line.content for line in itertools.islice(bounded_lines(path, MAX_ROW_BYTES), SAMPLE_ROWS))
    rows = (_parsed(line) for line in lines if line is not None)
    return [row for row in rows if isinstance(row, dict)]


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
