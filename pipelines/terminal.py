"""Text for a terminal: columns of what cells really take, and nothing that a model could command the terminal with.

Widths are of grapheme clusters: a Devanagari syllable such as ``की`` is one cluster of two cells, an ideograph or emoji
one of two, a combining accent none of its own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence

from wcwidth import ljust, wrap

GAP = " \u2502 "
MIN_COLUMN = 16

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """``text`` with control characters and changes of writing direction shown as U+FFFD; a model may emit any bytes."""
    return _CONTROL.sub("\ufffd", text.replace("\r", ""))


def terminal_width() -> int:
    """Columns of the terminal; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def columns(headers: Sequence[str], texts: Sequence[str], width: int) -> list[str]:
    """Texts side by side, wrapped so that all fit into ``width`` cells; below one another where that is too narrow."""
    share = (width - len(GAP) * (len(texts) - 1)) // len(texts)
    if share < MIN_COLUMN:
        return stacked(headers, texts, width)
    cells = [[header, "\u2500" * share, *wrapped(text, share)] for header, text in zip(headers, texts, strict=True)]
    cells = [[clipped(cell[0], share), *cell[1:]] for cell in cells]
    height = max(map(len, cells))
    rows = zip(*(cell + [""] * (height - len(cell)) for cell in cells), strict=True)
    return [GAP.join(ljust(cell, share) for cell in row).rstrip() for row in rows]


def stacked(headers: Sequence[str], texts: Sequence[str], width: int) -> list[str]:
    """Texts below one another, each under its header."""
    blocks = [[f"[{header}]", *wrapped(text, max(1, width))] for header, text in zip(headers, texts, strict=True)]
    return [line for block in blocks for line in block]


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` cells; the text's own line breaks and indents stay."""
    lines: list[str] = []
    for line in harmless(text).expandtabs(4).split("\n"):
        lines += wrap(line, width, replace_whitespace=False, control_codes="ignore") or [""]
    return lines


def clipped(text: str, width: int) -> str:
    """The first line that fits into ``width`` cells."""
    return wrapped(text, width)[0]
