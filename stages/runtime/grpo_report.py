"""What a reinforcement run says of itself: intervals of its scores, and whether anything was learnt. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.runtime.suites.intervals import ratio_interval


def paired_gain(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """Gain in accuracy on the same questions, and its 95% interval by the paired bootstrap.

    A question's difference is -1, 0 or 1. One question alone leaves everything possible.

    Raises:
        ValueError: for two lists of different length, or empty ones.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"before and after must be of the same questions; got {len(before)} and {len(after)}")
    difference = [float(now) - float(was) for was, now in zip(before, after, strict=True)]
    low, high = ratio_interval([str(number) for number in range(len(before))], difference) or (-1.0, 1.0)
    return sum(difference) / len(difference), low, high


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
