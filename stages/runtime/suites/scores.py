"""A score and its interval: value, unit, n, how the interval was made, and the hash of the set (TRAPS M3, M6)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
_Z = 1.959963984540054
RESAMPLES = 1000
WILSON = "Wilson score interval, 95%"
BOOTSTRAP = f"percentile bootstrap over {{unit}}, {RESAMPLES} resamples, 95%"


@dataclasses.dataclass(frozen=True)
class Items:
    """What each item contributed: the score is the sum of ``numerator`` over that of ``denominator``.

    Without ``denominator`` every item counts one. Equal ``ids`` of two models are the same item, so that differences
    can be paired.
    """

    ids: list[str]
    numerator: list[float]
    denominator: list[float] | None = None

    def value(self) -> float:
        """The score of these items."""
        bottom = len(self.ids) if self.denominator is None else math.fsum(self.denominator)
        return math.fsum(self.numerator) / bottom

    def plain(self) -> dict[str, Any]:
        """As it is written to ``items.json``."""
        found: dict[str, Any] = {"ids": self.ids, "numerator": self.numerator}
        return found if self.denominator is None else {**found, "denominator": self.denominator}

    def only(self, kept: Sequence[bool]) -> Items:
        """Those items for which ``kept`` is true."""
        indices = [index for index, keep in enumerate(kept) if keep]
        bottom = None if self.denominator is None else [self.denominator[index] for index in indices]
        return Items([self.ids[i] for i in indices], [self.numerator[i] for i in indices], bottom)


@dataclasses.dataclass(frozen=True)
class Score:
    """One number with all that it needs to be believed; fields as in ``scores.json``."""

    name: str
    suite: str
    suite_version: int
    value: float
    unit: str
    better: str
    n: int
    n_unit: str
    interval: tuple[float, float] | None
    method: str
    set_hash: str
    decoding: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    items: str | None


@dataclasses.dataclass(frozen=True)
class SuiteResult:
    """What a suite found: scores, the items behind them by the score's name, and replies to be read."""

    scores: list[Score]
    items: dict[str, Items] = dataclasses.field(default_factory=dict)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        scores = [dataclasses.asdict(score) for score in self.scores]
        return {"scores": scores, "items": {k: v.plain() for k, v in self.items.items()}, "samples": self.samples}


class ScoreSheet:
    """Gathers the scores of one suite, all with the same set, decoding and settings."""

    def __init__(
        self,
        suite: str,
        version: int,
        set_hash: str,
        settings: Mapping[str, Any],
        decoding: Mapping[str, Any] | None = None,
    ) -> None:
        self.suite, self.version, self.set_hash = suite, version, set_hash
        self.settings, self.decoding = settings, decoding
        self.scores: list[Score] = []
        self.items: dict[str, Items] = {}

    def add(self, name: str, items: Items, *, unit: str, better: str, n_unit: str) -> None:
        """One score from its items; a share of yes and no gets Wilson's interval, anything else the bootstrap's."""
        is_share = unit == "share"
        interval = wilson(round(math.fsum(items.numerator)), len(items.ids)) if is_share else bootstrap(items)
        method = WILSON if is_share else BOOTSTRAP.format(unit=n_unit)
        self.items[name] = items
        self.put(name, items.value(), len(items.ids), interval, method, unit=unit, better=better, n_unit=n_unit)

    def add_groups(
        self, name: str, items: Items, groups: Sequence[str], *, unit: str, better: str, n_unit: str, whole: bool = True
    ) -> None:
        """``name`` over all items, and ``name/<group>`` for each group where there is more than one."""
        if whole or len(set(groups)) == 1:
            self.add(name, items, unit=unit, better=better, n_unit=n_unit)
        for group in sorted(set(groups)) if len(set(groups)) > 1 else ():
            of_group = items.only([one == group for one in groups])
            self.add(f"{name}/{group}", of_group, unit=unit, better=better, n_unit=n_unit)

    def put(
        self,
        name: str,
        value: float,
        n: int,
        interval: tuple[float, float] | None,
        method: str,
        *,
        unit: str,
        better: str,
        n_unit: str,
        **settings: Any,
    ) -> None:
        """One score whose interval is known already; ``settings`` are its own beside the sheet's."""
        self.scores.append(Score(
            name, self.suite, self.version, value, unit, better, n, n_unit, interval, method, self.set_hash,
            self.decoding, {**self.settings, **settings}, name if name in self.items else None,
        ))  # fmt: skip

    def result(self, samples: Sequence[dict[str, Any]] = ()) -> SuiteResult:
        """All that was gathered."""
        return SuiteResult(self.scores, self.items, list(samples))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927): it stays inside [0, 1] and has width at 0 and 1 too."""
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # At the ends the two terms cancel exactly, in arithmetic with rounding almost.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == n else centre + half


def bootstrap(items: Items) -> tuple[float, float] | None:
    """The 95% percentile interval of a ratio of sums, items drawn with replacement; none of fewer than two items.

    The draws depend on the ids alone, so that an evaluation repeats itself and no other generator moves (TRAPS M2).
    """
    n = len(items.ids)
    if n < 2:
        return None
    seed = int.from_bytes(hashlib.sha256("\0".join(items.ids).encode()).digest()[:8], "little")
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    top = (counts * np.asarray(items.numerator)).sum(1)
    bottom = n if items.denominator is None else (counts * np.asarray(items.denominator)).sum(1)
    low, high = np.quantile(top / bottom, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def content_hash(content: Any) -> str:
    """SHA-256 of plain data as canonical JSON: what a score's set is known by."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
