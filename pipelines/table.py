"""Plain tables and figures for a terminal, a pipe or a log file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

MIN_ROOM = 20


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns; the last column is not padded, so that long reasons do not widen the table."""
    widths = [max(len(row[column]) for row in [headers, *rows]) for column in range(len(headers) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
        for row in [headers, *rows]
    ]


def with_last_column(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """A table whose last column is long text, cut to ``width``: beside the others where there is room, else below."""
    if width is None:
        return table(headers, rows)
    lines = table(headers[:-1], [row[:-1] for row in rows])
    room = width - max(map(len, lines)) - 2
    if room >= MIN_ROOM:
        return table(headers, [[*row[:-1], cut(row[-1], room)] for row in rows])
    found = [lines[0]]
    for line, row in zip(lines[1:], rows, strict=True):
        found += [line, f"    {cut(row[-1], max(width - 4, MIN_ROOM))}"] if row[-1] else [line]
    return found


def cut(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def terminal_width() -> int | None:
    """Columns of the terminal that is written to; None for a pipe or a file, which take lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def figure(name: str, value: Any) -> str:
    """A value with the unit that its name ends in: bytes as GiB, counts with commas, FLOPs as a power of ten."""
    if isinstance(value, dict):
        return ", ".join(f"{part} {figure(part, one)}" for part, one in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name.endswith("_bytes") or name == "bytes":
        return size(value)
    if "flops" in name:
        return f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def size(count_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.0f} B" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} TiB"


def age(seconds: float) -> str:
    """A duration in its two largest units: ``45 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    whole = max(0, int(seconds))
    for unit, below, length in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= length:
            rest = whole % length // {"h": 3600, "min": 60, "s": 1}[below]
            return f"{whole // length} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"
