"""Figures and texts of scores and samples as people read them, for the terminal and for pages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.scores import Score
from pipelines.table import age

TINY = 1e-12


def number(value: float | None, style: str = ".4g") -> str:
    """A value in few digits; a dash where there is none."""
    # A bound of a share may be 1e-18 where it means 0.
    return "-" if value is None else format(0.0 if abs(value) < TINY else value, style)


def interval_text(interval: tuple[float, float] | None, style: str = ".3g") -> str:
    """``[low, high]``; nothing where there is none."""
    return "" if interval is None else f"[{number(interval[0], style)}, {number(interval[1], style)}]"


def score_text(score: Score) -> str:
    """``2.31 [2.2, 2.4]``."""
    return f"{number(score.value)} {interval_text(score.interval)}".rstrip()


def decoding_text(decoding: Mapping[str, Any]) -> str:
    """``greedy``, or what the draws were made with."""
    if not decoding:
        return ""
    temperature = decoding.get("temperature")
    if temperature in (0, None):
        return "greedy"
    rest = [f"{name.replace('_', '-')} {decoding[name]}" for name in ("top_p", "seed") if name in decoding]
    return ", ".join([f"temperature {temperature}", *rest])


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The conversation that was to be continued, a line a message; the role stands before all but a lone question."""
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    return f"{seconds:.1f} s" if seconds < 60 else age(seconds)


def cell(value: Any) -> str:
    """Any JSON value in a table's cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {cell(item)}" for name, item in value.items())
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,64}", value):
        return value[:12]
    return "-" if value is None else str(value)
