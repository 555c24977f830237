"""Whether two variants differ: the paired bootstrap of the difference of one score on the same items (TRAPS M6)."""

from __future__ import annotations

import dataclasses
import functools
import math
from statistics import NormalDist
from typing import Literal

import numpy as np

from pipelines.scores import Items, Score
from stages.base import ConfigError, Fault

RESAMPLES = 4000
CONFIDENCE = 0.95
MIN_ITEMS = 20
"""Below this an interval from resampling says little, and no verdict is given."""
_CHUNK = 1 << 20

Verdict = Literal["better", "worse", "higher", "lower", "within noise", "too few items", "not paired", "not a number"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """``value`` is variant minus baseline, in the score's unit; ``interval`` is of that difference."""

    value: float | None
    interval: tuple[float, float] | None
    n: int
    verdict: Verdict


def difference(baseline: Score, variant: Score, seed: int = 17) -> Difference:
    """The difference of two scores that were measured on the same set.

    Raises:
        ConfigError: when the items of the two are not the same ones.
    """
    both = None not in (baseline.value, variant.value)
    point = variant.value - baseline.value if both else None  # type: ignore[operator]
    if baseline.items is None or variant.items is None or point is None:
        return Difference(point, None, 0, "not paired")
    left, right = baseline.items, _in_order(variant.items, baseline.items, variant.name)
    if len(left.ids) < MIN_ITEMS:
        return Difference(point, None, len(left.ids), "too few items")
    interval = paired_interval(left, right, seed)
    if not all(map(math.isfinite, interval)):
        # A comparison with a NaN is false both ways, and would be read as a verdict.
        return Difference(point, None, len(left.ids), "not a number")
    return Difference(point, interval, len(left.ids), _verdict(interval, variant.better))


def paired_interval(baseline: Items, variant: Items, seed: int = 17) -> tuple[float, float]:
    """Expanded percentile interval of ``variant`` minus ``baseline``, both ratios of sums over the same items.

    Items are drawn with replacement, the same ones for both. The percentiles are widened as Student's t is wider than
    the normal and by sqrt(n / (n - 1)), since a plain percentile interval is too short for few items (Hesterberg 2015,
    "What Teachers Should Know About the Bootstrap").
    """
    count = len(baseline.ids)
    table = np.array([baseline.numerator, baseline.denominator, variant.numerator, variant.denominator]).T
    rows = max(1, _CHUNK // count)
    starts = range(0, RESAMPLES, rows)
    sums = np.concatenate([_drawn(count, min(rows, RESAMPLES - start), seed + start) @ table for start in starts])
    found = sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
    tail = expanded_tail(count)
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


@functools.lru_cache(maxsize=16)
def _drawn(count: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of ``count`` items was drawn in each resample: (resamples, count); scores of one size share it."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    return drawn.astype(np.float64)


def expanded_tail(count: int, confidence: float = CONFIDENCE) -> float:
    """The share to cut off on each side so that ``count`` items give an interval of ``confidence``."""
    point = student_t((1 + confidence) / 2, count - 1)
    return NormalDist().cdf(-math.sqrt(count / (count - 1)) * point)


def student_t(share: float, freedom: int) -> float:
    """Quantile of Student's t by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), to 3e-3 from 5 on."""
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _in_order(items: Items, like: Items, name: str) -> Items:
    """``items`` in the order of ``like``."""
    place = {found: number for number, found in enumerate(items.ids)}
    if len(place) != len(items.ids) or sorted(items.ids) != sorted(like.ids):
        raise ConfigError(Fault(name, "must be measured on the same items; the variants' differ; evaluate both again"))
    order = [place[found] for found in like.ids]
    numerator, denominator = ([values[index] for index in order] for values in (items.numerator, items.denominator))
    return Items(list(like.ids), numerator, denominator)


def _verdict(interval: tuple[float, float], better: str) -> Verdict:
    low, high = interval
    if low <= 0 <= high:
        return "within noise"
    rises = low > 0
    if better == "none":
        return "higher" if rises else "lower"
    return "better" if rises == (better == "higher") else "worse"
