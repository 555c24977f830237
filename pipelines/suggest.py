"""The nearest valid name for one that is not valid."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(name: str, valid: Iterable[str], what: str) -> str:
    """``did you mean 'lr'?``, or the list of what is valid when nothing is near."""
    names = sorted(set(valid))
    by_folded = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name.lower(), by_folded, n=1, cutoff=0.55)
    if near:
        return f"did you mean {by_folded[near[0]]!r}?"
    return f"there is no {what} here" if not names else f"use one of {', '.join(names)}"
