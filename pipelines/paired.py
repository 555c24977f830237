"""Whether two variants differ: the paired bootstrap of the difference of one score on the same items (TRAPS M6)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from pipelines.scores import Items, Score
from stages.base import ConfigError, Fault
from stages.runtime.suites.intervals import CONFIDENCE, MIN_FAMILIES, RESAMPLES, Interval, paired_interval

METHOD = f"paired bootstrap by random half-samples of items, or of families of items, {RESAMPLES} resamples"

__all__ = ["CONFIDENCE", "METHOD", "Difference", "Verdict", "difference", "in_order", "interval_of"]

Verdict = Literal[
    "better",
    "worse",
    "higher",
    "lower",
    "within noise",
    "alike",
    "too few items",
    "too few counted items",
    "not paired",
    "not a number",
]


@dataclasses.dataclass(frozen=True)
class Difference:
    """``value`` is variant minus baseline, in the score's unit; ``interval`` is of that difference.

    ``n`` counts the items and ``families`` what of them is independent.
    """

    value: float | None
    interval: Interval | None
    n: int
    families: int
    verdict: Verdict


def difference(baseline: Score, variant: Score) -> Difference:
    """The difference of two scores that were measured on the same set.

    Raises:
        ConfigError: when the items of the two are not the same ones.
    """
    both = None not in (baseline.value, variant.value)
    point = variant.value - baseline.value if both else None  # type: ignore[operator]
    if baseline.items is None or variant.items is None or point is None:
        return Difference(point, None, 0, 0, "not paired")
    left, right = baseline.items, in_order(variant.items, baseline.items, variant.name)
    count = left.independent
    interval = interval_of(left, right)
    if interval is None:
        few: Verdict = "too few items" if count < MIN_FAMILIES else "too few counted items"
        return Difference(point, None, len(left.ids), count, "alike" if _are_alike(left, right) else few)
    if not all(map(math.isfinite, interval)):
        # A comparison with a NaN is false both ways, and would be read as a verdict.
        return Difference(point, None, len(left.ids), count, "not a number")
    return Difference(point, interval, len(left.ids), count, _verdict(interval, variant.better))


def _are_alike(*both: Items) -> bool:
    """Whether every item that counts, in either, says the same; of fewer than ``MIN_FAMILIES`` nothing is said."""
    said: set[float] = set()
    for items in both:
        kept = [place for place, bottom in enumerate(items.denominator) if bottom]
        owners = items.ids if items.families is None else items.families
        if len({owners[place] for place in kept}) < MIN_FAMILIES:
            return False
        said |= {items.numerator[place] / items.denominator[place] for place in kept}
    return len(said) == 1


def interval_of(baseline: Items, variant: Items) -> Interval | None:
    """The interval of ``variant`` minus ``baseline`` over items in one order; none of too few (counted) families."""
    left, right = (baseline.numerator, baseline.denominator), (variant.numerator, variant.denominator)
    return paired_interval(left, right, baseline.families)


def in_order(items: Items, like: Items, name: str) -> Items:
    """``items`` in the order of ``like``.

    Raises:
        ConfigError: when they are not the same ones, or not in the same families.
    """
    place = {found: number for number, found in enumerate(items.ids)}
    if len(place) != len(items.ids) or sorted(items.ids) != sorted(like.ids):
        raise ConfigError(Fault(name, "must be measured on the same items; the variants' differ; evaluate both again"))
    order = [place[found] for found in like.ids]
    numerator, denominator = ([values[index] for index in order] for values in (items.numerator, items.denominator))
    families = None if items.families is None else [items.families[index] for index in order]
    if families != like.families:
        message = "must have its items in the same families in every variant; they differ; evaluate both again"
        raise ConfigError(Fault(name, message))
    return Items(list(like.ids), numerator, denominator, families)


def _verdict(interval: Interval, better: str) -> Verdict:
    low, high = interval
    if low == high == 0:
        # Each half-sample says the same of both, which is more than that the difference is small.
        return "alike"
    if low <= 0 <= high:
        return "within noise"
    rises = low > 0
    if better == "none":
        return "higher" if rises else "lower"
    return "better" if rises == (better == "higher") else "worse"
