"""Reading files that may be compressed, damaged, or hold one line larger than memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

CHUNK_BYTES = 1 << 18
MAX_ROW_BYTES = 64_000_000
"""Longest line of rows that is parsed where no limit is configured."""


class UnreadableFile(ValueError):  # noqa: N818 - names what it is
    """A file that cannot be read to its end: truncated, damaged, or not what its ending says. One line."""


class Line(NamedTuple):
    """One line of a file; ``content`` is None where it is longer than the limit, and was then never held."""

    content: bytes | None
    size: int
    """Bytes of the line, without its end."""


def plain_suffix(path: Path) -> str:
    """The ending that tells the format: that of ``a.jsonl.zst`` is ``.jsonl``."""
    return Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix


def read_chunks(path: Path, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The file's content, decompressed by its ending (``.gz``, ``.zst``, ``.xz``, ``.bz2``), ``size`` bytes at a time.

    Raises ``UnreadableFile``, as soon as it is known, for a file that is truncated or damaged.
    """
    read = 0
    try:
        # What a copy that broke off leaves; gzip and Zstandard would take it for no text at all.
        if path.suffix in _OPENERS and not path.stat().st_size:
            raise EOFError("the file is empty")
        with _OPENERS.get(path.suffix, _open_plain)(path) as stream:
            # What is there is given before an error behind it is met, where the stream can do that.
            read_some = getattr(stream, "read1", stream.read)
            while chunk := read_some(size):
                read += len(chunk)
                yield chunk
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableFile(f"after {read:,} bytes: {' '.join(reason.split())}") from error


def bounded_lines(path: Path, limit: int) -> Iterator[Line]:
    r"""Lines between ``\n``; of one longer than ``limit`` bytes only its size is kept.

    Memory is bounded by ``limit`` and a chunk, whatever the file holds. An end of line at the end of the file begins no
    further line. Raises ``UnreadableFile``.
    """
    held: list[bytes] = []
    size = 0
    for chunk in read_chunks(path):
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            size += len(piece)
            yield Line(b"".join([*held, piece]) if size <= limit else None, size)
            held, size = [], 0
        size += len(rest)
        held = [*held, rest] if size <= limit else []
    if size:
        yield Line(b"".join(held) if size <= limit else None, size)


def read_bounded(path: Path, limit: int) -> bytes | None:
    """The whole content, or None when it is longer than ``limit`` bytes; no more than that is held.

    Raises ``UnreadableFile``.
    """
    held: list[bytes] = []
    size = 0
    for chunk in read_chunks(path, min(CHUNK_BYTES, limit + 1)):
        size += len(chunk)
        if size > limit:
            return None
        held.append(chunk)
    return b"".join(held)


def damage_at_a_glance(path: Path) -> str | None:
    """Why a compressed or Parquet file cannot be whole, told from its first and last bytes; None where it may be.

    Costs no decompression, so that it can be asked of every file before anything runs.
    """
    head = _MAGIC.get(path.suffix)
    if head is None:
        return None
    with path.open("rb") as content:
        if not content.read(len(head)).startswith(head):
            return "is empty" if not path.stat().st_size else f"does not begin as a {path.suffix} file does"
        if path.suffix == ".parquet":
            content.seek(max(0, path.stat().st_size - len(head)))
            if content.read() != head or path.stat().st_size < 3 * len(head):
                return "is truncated: its last bytes are not a Parquet footer"
    return None


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _open_zstandard(path: Path) -> Any:
    # Arrow brings Zstandard along with datasets; Python itself has it from 3.14 on.
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
_MAGIC = {
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\x00",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".parquet": b"PAR1",
}
