"""What a reinforcement run says of itself: intervals of its scores, and whether anything was learnt. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 20_000
Z95 = 1.959963984540054
"""The normal distribution's 97.5% point."""


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share, right also near 0 and 1 (Wilson 1927)."""
    share, z2 = right / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    # At the ends the formula gives them exactly, but for rounding.
    return (0.0 if right == 0 else centre - half), (1.0 if right == count else centre + half)


def paired_gain(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """Gain in accuracy on the same questions, and its 95% interval by the paired bootstrap (Efron 1979).

    A question's difference is -1, 0 or 1, so that drawing questions anew is drawing counts of these from a multinomial
    distribution. The draws are always the same.

    Raises:
        ValueError: for two lists of different length, or empty ones.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"before and after must be of the same questions; got {len(before)} and {len(after)}")
    count = len(before)
    difference = np.asarray(after, dtype=np.int64) - np.asarray(before, dtype=np.int64)
    shares = [float((difference == value).mean()) for value in (-1, 0, 1)]
    draws = np.random.default_rng(0).multinomial(count, shares, size=RESAMPLES)
    low, high = np.quantile((draws[:, 2] - draws[:, 0]) / count, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def encode_outcomes(outcomes: Sequence[bool]) -> str:
    """Outcomes as a text of zeros and ones, as a checkpoint keeps them."""
    return "".join("1" if outcome else "0" for outcome in outcomes)


def decode_outcomes(text: str) -> list[bool]:
    """What ``encode_outcomes`` was given."""
    return [character == "1" for character in text]


def summary_of(metrics: Mapping[str, Any]) -> list[str]:
    """Lines about held-out accuracy, the probe and the groups."""
    low, high = metrics["accuracy_gain_low"], metrics["accuracy_gain_high"]
    verdict = "raised" if low > 0 else "lowered" if high < 0 else "within noise"
    ks = sorted(int(name.rpartition("@")[2]) for name in metrics if name.startswith("probe/pass@"))
    passed = "  ".join(f"pass@{k} {metrics[f'probe/pass@{k}']:.3f}" for k in ks)
    return [
        f"held-out accuracy {metrics['before/accuracy']:.3f} -> {metrics['accuracy']:.3f} on n = {metrics['n']:,}: "
        f"{metrics['accuracy_gain']:+.3f}, paired 95% interval [{low:+.3f}, {high:+.3f}], {verdict}",
        f"before the first step, on training questions: {passed}; "
        f"{metrics['probe/informative']:.1%} of groups differ in reward",
        f"groups {metrics['groups']:,}: {metrics['groups_all_zero']:,} all wrong, {metrics['groups_all_one']:,} all "
        f"right, {metrics['groups_filtered']:,} of those trained on filtered",
    ]
