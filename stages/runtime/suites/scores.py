"""A score and its interval: value, unit, n, how the interval was made, and the hash of the set (TRAPS M3, M6, M7)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stages.runtime.suites.intervals import (
    ALL_ALIKE,
    CONFIDENCE,
    TOO_FEW,
    WILSON,
    described_interval,
    ratio_interval,
    wilson,
)

__all__ = ["CONFIDENCE", "WILSON", "Items", "Score", "ScoreSheet", "SuiteResult", "bootstrap", "content_hash", "wilson"]

UNITS: dict[str, tuple[str, ...]] = {
    "bits_per_byte": ("bpb", "bits_per_byte"),
    "nats_per_token": ("nats_per_token",),
    "tokens": ("tokens",),
    "ratio": ("ratio",),
    "share": (),
    "score": (),
}
"""Units that a score may have, each with the words of which its name must hold one; none where it need not."""
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Items:
    """What each item contributed: the score is the sum of ``numerator`` over that of ``denominator``.

    Without ``denominator`` every item counts one; an item of denominator 0 (a reply too short to be judged) counts
    nothing, and stands among the others all the same. Equal ``ids`` of two models are the same item, so that
    differences can be paired. Items of one of the ``families`` (a template's fillings, one document's questions) say
    much the same and are drawn together; without ``families`` each item is one of its own.
    """

    ids: list[str]
    numerator: list[float]
    denominator: list[float] | None = None
    families: list[str] | None = None

    def value(self) -> float:
        """The score of these items."""
        bottom = len(self.ids) if self.denominator is None else math.fsum(self.denominator)
        return math.fsum(self.numerator) / bottom

    def plain(self) -> dict[str, Any]:
        """As it is written to ``items.json``."""
        found = {name: getattr(self, name) for name in ("ids", "numerator", "denominator", "families")}
        return {name: values for name, values in found.items() if values is not None}

    def counted(self) -> Items:
        """Those items that count something."""
        if self.denominator is None:
            return self
        kept = self.only([bottom != 0 for bottom in self.denominator])
        return dataclasses.replace(kept, denominator=None) if set(kept.denominator or ()) == {1.0} else kept

    def only(self, kept: Sequence[bool]) -> Items:
        """Those items for which ``kept`` is true."""
        indices = [index for index, keep in enumerate(kept) if keep]
        bottom = None if self.denominator is None else [self.denominator[index] for index in indices]
        families = None if self.families is None else [self.families[index] for index in indices]
        return Items([self.ids[i] for i in indices], [self.numerator[i] for i in indices], bottom, families)


@dataclasses.dataclass(frozen=True)
class Score:
    """One number with all that it needs to be believed; fields as in ``scores.json``.

    ``part`` says what the last segment of the name is (``language``, ``domain``), none for a score over everything.

    Raises:
        ValueError: for a score without n, set, unit or interval, or whose name says another unit (TRAPS M3, M6, M7).
    """

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
    part: str | None = None

    def __post_init__(self) -> None:
        for is_right, rule, found in (
            (math.isfinite(self.value), "have a finite value", self.value),
            (self.n >= 1 and bool(self.n_unit), "say of how many items it is", f"n {self.n} {self.n_unit}"),
            (bool(_HASH.fullmatch(self.set_hash)), "carry the SHA-256 of its set", self.set_hash),
            (self.unit in UNITS, f"have one of the units {', '.join(UNITS)}", self.unit),
            (self.better in ("higher", "lower", "none"), "say which way is better", self.better),
            ((self.interval is None) == (self.method in (TOO_FEW, ALL_ALIKE)), "have an interval", self.interval),
            (self.interval is None or self.interval[0] <= self.interval[1], "have an ordered interval", self.interval),
        ):
            if not is_right:
                raise ValueError(f"score {self.name} must {rule}; got {found}; mend suite {self.suite}")
        if named_unit(self.name, self.part) != (self.unit if UNITS[self.unit] else None):
            raise ValueError(f"score {self.name} must be named by its unit; got {self.unit}; mend suite {self.suite}")


def named_unit(name: str, part: str | None = None) -> str | None:
    """The unit that a score's name states, none where it states none; the name of a part is no statement."""
    segments = name.split("/")
    words = "/".join(segments[:-1] if part is not None and len(segments) > 1 else segments)
    for unit, known in UNITS.items():
        if any(re.search(rf"(^|[/_]){word}($|[/_])", words) for word in known):
            return unit
    return None


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

    def add(
        self, name: str, items: Items, *, unit: str, better: str, n_unit: str, part: str | None = None, **settings: Any
    ) -> None:
        """One score from those items that count, none where none does; its interval by ``described_interval``."""
        counted = items.counted()
        if not counted.ids:
            return
        interval, method = interval_of(counted, unit, n_unit)
        self.items[name] = items
        self.put(
            name, counted.value(), len(counted.ids), interval, method,
            unit=unit, better=better, n_unit=n_unit, part=part, **settings,
        )  # fmt: skip

    def add_groups(
        self,
        name: str,
        items: Items,
        groups: Sequence[str],
        *,
        unit: str,
        better: str,
        n_unit: str,
        part: str = "language",
        whole: bool = True,
        **settings: Any,
    ) -> None:
        """``name`` over all items, and ``name/<group>`` for each group where there is more than one."""
        if whole:
            self.add(name, items, unit=unit, better=better, n_unit=n_unit, **settings)
        for group in sorted(set(groups)) if len(set(groups)) > 1 else ():
            of_group = items.only([one == group for one in groups])
            self.add(f"{name}/{group}", of_group, unit=unit, better=better, n_unit=n_unit, part=part, **settings)

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
        part: str | None = None,
        **settings: Any,
    ) -> None:
        """One score whose interval is known already; ``settings`` are its own beside the sheet's."""
        self.scores.append(Score(
            name, self.suite, self.version, value, unit, better, n, n_unit, interval, method, self.set_hash,
            self.decoding, {**self.settings, **settings}, name if name in self.items else None, part,
        ))  # fmt: skip

    def result(self, samples: Sequence[dict[str, Any]] = ()) -> SuiteResult:
        """All that was gathered."""
        return SuiteResult(self.scores, self.items, list(samples))


def interval_of(items: Items, unit: str, n_unit: str) -> tuple[tuple[float, float] | None, str]:
    """The 95% interval of the items' score, none of one item, and how it was made."""
    return described_interval(items.ids, items.numerator, items.denominator, items.families, unit=unit, n_unit=n_unit)


def bootstrap(items: Items) -> tuple[float, float] | None:
    """The 95% interval of the items' score, whole families drawn; none of fewer than two."""
    return ratio_interval(items.ids, items.numerator, items.denominator, items.families)


def content_hash(content: Any) -> str:
    """SHA-256 of plain data as canonical JSON: what a score's set is known by."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
