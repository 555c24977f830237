"""Every 95% interval of the program: of one score, and of the difference of two on the same items (TRAPS M6).

Shares of yes and no get Wilson's interval. Anything else, and every difference, is resampled by the bootstrap in random
half-samples of the families (each weighs 0 or 2), which Hartigan (1969, "Using Subsample Values as Typical Values",
JASA 64:1303) showed to cover exactly at any number of independent families whose contributions are symmetric. Where two
variants do not differ they are, so that few changed answers, few documents of unequal length and few templates are no
exception, as they are to the percentile bootstrap (benchmarks/coverage.py). Items of one family (a template's fillings,
one document's passages) are drawn together; without families each item is one of its own. Draws depend on the number of
families alone, so that an evaluation repeats itself and no other generator moves (TRAPS M2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 4000
MIN_FAMILIES = 6
"""Fewest families with half-samples enough for 95%: 2 of the 2**6 - 1 values lie beyond the interval's ends."""
TOO_FEW = "none: fewer than two to draw from"
ALL_ALIKE = "none: every item says the same, which resampling cannot widen"
WILSON = "Wilson score interval, 95%"
FAMILY_WILSON = "Wilson score interval at the effective n of {families} families, 95%"
HALF_SAMPLES = f"half-sample bootstrap over {{unit}}, {RESAMPLES} resamples, 95%"
FAMILY_HALF_SAMPLES = f"half-sample bootstrap over {{families}} families of {{unit}}, {RESAMPLES} resamples, 95%"
STUDENT = "Student's t over {families} independent {unit}, 95%"

_SEED = 17
_ALL_UP_TO = 12
_CHUNK = 1 << 21
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_SMALL_T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}

Interval = tuple[float, float]


def wilson(successes: float, n: float, quantile: float = _Z) -> Interval:
    """The 95% score interval of a share (Wilson 1927): it stays inside [0, 1] and has width at 0 and 1 too."""
    share, square = successes / n, quantile**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = quantile / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n**2))
    # At the ends the two terms cancel exactly, in arithmetic with rounding almost.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == n else centre + half


def share_interval(values: Sequence[float], families: Sequence[str] | None = None) -> Interval:
    """Wilson's interval of zeros and ones; with ``families`` at their effective n and Student's quantile.

    Korn and Graubard (1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data", Survey Methodology 24:193), with Wilson's interval for the exact one.
    """
    total = math.fsum(values)
    if families is None or len(set(families)) == len(families):
        return wilson(round(total), len(values))
    count = len(set(families))
    if count == 1:
        # One family is one item, whose share of yes says nothing of any other.
        return 0.0, 1.0
    n = effective_n(values, families)
    successes = n if total == len(values) else total / len(values) * n
    return wilson(successes, n, student_t(count - 1))


def effective_n(values: Sequence[float], families: Sequence[str]) -> float:
    """How many independent items the families' yes and no are worth, at most their number.

    That n whose binomial variance is the variance between families (Kish 1965, design effect; linearised, with the
    factor F / (F - 1)). Where all items agree nothing is known of the families' spread: each counts as one item, one
    that is larger than others for more than its part (Kish's 1 / sum of squared shares).
    """
    n, share = len(values), math.fsum(values) / len(values)
    table = family_sums(families, np.asarray(values, np.float64) - share, np.ones(n))
    count = len(table)
    if share in (0.0, 1.0) or count == 1:
        return float(n**2 / (table[:, 1] ** 2).sum())
    between = float((table[:, 0] ** 2).sum()) / n**2 * count / (count - 1)
    return float(n) if between == 0 else min(float(n), max(1.0, share * (1 - share) / between))


def ratio_interval(
    ids: Sequence[str],
    numerator: Sequence[float],
    denominator: Sequence[float] | None = None,
    families: Sequence[str] | None = None,
) -> Interval | None:
    """The interval of sum(numerator) / sum(denominator); none of fewer than two families.

    Half-samples from ``MIN_FAMILIES`` families on, below Student's t of the linearised ratio.
    """
    table = _table(families or ids, numerator, denominator)
    if len(table) < 2:
        return None
    if len(table) < MIN_FAMILIES:
        return _student_interval(table)
    return _central(np.concatenate([sums[:, 0] / sums[:, 1] for sums in _half_sums(table)]))


def paired_interval(
    baseline: tuple[Sequence[float], Sequence[float]],
    variant: tuple[Sequence[float], Sequence[float]],
    families: Sequence[str] | None = None,
) -> Interval | None:
    """The interval of the variant's ratio less the baseline's; none of fewer than ``MIN_FAMILIES`` families.

    Nor is there one where so few items count in either that a half-sample may hold none of them: its ratio is no value,
    and to leave it out would be to draw only from the half-samples in which both were judged. NaN stays NaN.
    Each is (numerator, denominator) over the same items in one order; half-samples are the same ones for both. Of yes
    and no the interval holds that of ``changes_interval`` as well: twelve answers that all stayed as they were do not
    show that none ever changes.
    """
    owners = [str(place) for place in range(len(baseline[0]))] if families is None else families
    table = family_sums(owners, *(np.asarray(column, np.float64) for column in (*baseline, *variant)))
    # What holds nothing in either adds nothing, and alone has no ratio.
    table = table[table.any(1)]
    if len(table) < MIN_FAMILIES:
        return None
    if not np.isfinite(table).all():
        return math.nan, math.nan
    drawn = _half_sums(table)
    if any((sums[:, [1, 3]] == 0).any() for sums in drawn):
        return None
    low, high = _central(np.concatenate([sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1] for sums in drawn]))
    if not all(map(_is_yes_or_no, (baseline, variant))) or (families is not None and low != high):
        return low, high
    gained, lost = (sum(b - a == sign for a, b in zip(baseline[0], variant[0], strict=True)) for sign in (1, -1))
    # Families that all changed alike are as many answers as there are families.
    part = len(table) / len(baseline[0])
    wide = changes_interval(gained * part, lost * part, len(table))
    return min(low, wide[0]), max(high, wide[1])


def changes_interval(gained: float, lost: float, n: float) -> Interval:
    """The 95% interval of the difference of two shares on the same ``n`` items, from how many answers changed.

    Wald's with one item added to each kind of change (Bonett and Price 2012, "Adjusted Wald Confidence Interval for a
    Difference of Binomial Proportions Based on Paired Data", J. Educ. Behav. Stat. 37:479).
    """
    more, less = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = _Z * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    return max(more - less - half, -1.0), min(more - less + half, 1.0)


def described_interval(
    ids: Sequence[str],
    numerator: Sequence[float],
    denominator: Sequence[float] | None,
    families: Sequence[str] | None,
    *,
    unit: str,
    n_unit: str,
) -> tuple[Interval | None, str]:
    """The interval of one score and how it was made; a share of zeros and ones is told from other ``unit``s."""
    count = len(set(ids if families is None else families))
    is_yes_or_no = unit == "share" and denominator is None and set(numerator) <= {0.0, 1.0}
    if is_yes_or_no:
        method = WILSON if families is None else FAMILY_WILSON
        return share_interval(numerator, families), method.format(families=count)
    interval = ratio_interval(ids, numerator, denominator, families)
    if interval is None:
        return None, TOO_FEW
    if interval[0] == interval[1]:
        # No width is no certainty: a handful of items without an event do not show that there is none.
        return None, ALL_ALIKE
    if unit == "share":
        interval = max(interval[0], 0.0), min(interval[1], 1.0)
    if count < MIN_FAMILIES:
        return interval, STUDENT.format(families=count, unit=n_unit if families is None else f"families of {n_unit}")
    method = HALF_SAMPLES if families is None else FAMILY_HALF_SAMPLES
    return interval, method.format(unit=n_unit, families=count)


def reason(method: str) -> str:
    """Why a score has no interval, in few words, from the ``method`` that stands in its place."""
    return method.removeprefix("none: ").partition(",")[0]


def family_sums(families: Sequence[str], *columns: np.ndarray) -> np.ndarray:
    """(F, columns): the columns (n,) summed by family, families in the order in which they first appear."""
    places: dict[str, int] = {}
    owners = np.array([places.setdefault(family, len(places)) for family in families])
    return np.stack([np.bincount(owners, column, len(places)) for column in columns], axis=1)


def student_t(freedom: int, share: float = (1 + CONFIDENCE) / 2) -> float:
    """Quantile of Student's t by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), to 3e-3 from 5 on.

    Below 5 the table's values, for the 95% interval alone.
    """
    if freedom in _SMALL_T and share == (1 + CONFIDENCE) / 2:
        return _SMALL_T[freedom]
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _is_yes_or_no(ratio: tuple[Sequence[float], Sequence[float]]) -> bool:
    return set(ratio[0]) <= {0.0, 1.0} and set(ratio[1]) == {1.0}


def _table(owners: Sequence[str], numerator: Sequence[float], denominator: Sequence[float] | None) -> np.ndarray:
    """(F, 2): numerator and denominator by family, families that hold nothing to divide by left out."""
    bottom = np.ones(len(numerator)) if denominator is None else np.asarray(denominator, np.float64)
    table = family_sums(owners, np.asarray(numerator, np.float64), bottom)
    return table[table[:, 1] > 0]


def _student_interval(table: np.ndarray) -> Interval:
    """Value and Student's quantile times the linearised standard error of the ratio (Taylor, as in survey samples)."""
    count, (top, bottom) = len(table), table.sum(0)
    rest = table[:, 0] - top / bottom * table[:, 1]
    error = math.sqrt(count / (count - 1) * float((rest**2).sum())) / bottom
    half = student_t(count - 1) * error
    return float(top / bottom - half), float(top / bottom + half)


def _half_sums(table: np.ndarray) -> list[np.ndarray]:
    """Sums of ``table`` (F, columns) over the half-samples, in parts of some rows each."""
    count = len(table)
    if count <= _ALL_UP_TO:
        return [_halves(count, 0).astype(np.float64) @ table]
    parts = -(-RESAMPLES * count // _CHUNK)
    return [_halves(count, part).astype(np.float64) @ table for part in range(parts)]


@functools.lru_cache(maxsize=8)
def _halves(count: int, part: int) -> np.ndarray:
    """(resamples, count) zeros and ones: all half-samples of few families, else random ones; the empty one is none."""
    if count <= _ALL_UP_TO:
        numbers = np.arange(1, 2**count)[:, None]
        return (numbers >> np.arange(count) & 1).astype(np.uint8)
    parts = -(-RESAMPLES * count // _CHUNK)
    rows = RESAMPLES // parts + (part < RESAMPLES % parts)
    drawn = np.random.default_rng([_SEED, part]).integers(0, 2, (rows, count), np.uint8)
    return drawn[drawn.any(1)]


def _central(values: np.ndarray) -> Interval:
    """The values between which all but 5% of the half-samples lie: M of them part the line into M + 1 likely places."""
    if not np.isfinite(values).all():
        return math.nan, math.nan
    beyond = int((1 - CONFIDENCE) / 2 * (len(values) + 1) + 1e-9)
    assert beyond, "MIN_FAMILIES gives half-samples enough"
    ordered = np.partition(values, (beyond - 1, len(values) - beyond))
    return float(ordered[beyond - 1]), float(ordered[len(values) - beyond])
