"""Rewards that a program can verify: small functions of a completion's text and the row of its question.

``REWARDS`` holds them by name; a recipe weighs them. A new one is one function here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.tasks import ANSWER

Reward = Callable[[str, Mapping[str, Any]], float]
"""``(text, row)`` to a number in [0, 1]; ``row`` is a row of a tasks artifact, with its ``answer``."""

REWARDS: dict[str, Reward] = {}


def reward(function: Reward) -> Reward:
    """Register a reward under its function's name."""
    REWARDS[getattr(function, "__name__")] = function  # noqa: B009 - Callable has no __name__ for the type checker
    return function


def extract_answer(text: str) -> str | None:
    """The final answer of a completion: all that follows the last ``Answer:``; none where nothing, or lines, follow.

    >>> extract_answer("61 = 1 * 61. Answer: 1")
    '1'
    """
    _, marker, after = text.rpartition(ANSWER)
    answer = after.strip()
    return answer if marker and answer and "\n" not in answer else None


def is_correct(text: str, row: Mapping[str, Any]) -> bool:
    """Whether the final answer is the row's, character for character; a text that merely holds it is wrong."""
    return extract_answer(text) == row["answer"]


@reward
def correct(text: str, row: Mapping[str, Any]) -> float:
    """One for the exact final answer."""
    return float(is_correct(text, row))


@reward
def answered(text: str, row: Mapping[str, Any]) -> float:
    """One for any final answer, right or wrong: the form alone."""
    return float(extract_answer(text) is not None)


@reward
def in_place(text: str, row: Mapping[str, Any]) -> float:
    """Share of the answer's words that stand in their place, zero for another number of words: a graded signal."""
    given, wanted = (extract_answer(text) or "").split(), row["answer"].split()
    if len(given) != len(wanted):
        return 0.0
    return sum(one == other for one, other in zip(given, wanted, strict=True)) / len(wanted)


def total(weights: Mapping[str, float], text: str, row: Mapping[str, Any]) -> float:
    """The weighted sum of the rewards that ``weights`` names."""
    return math.fsum(weight * REWARDS[name](text, row) for name, weight in weights.items())


def pass_at_k(samples: int, correct_samples: int, k: int) -> float:
    """Probability that one of ``k`` samples is right, estimated without bias from ``samples`` of them.

    ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, arXiv:2107.03374, equation 1).

    Raises:
        ValueError: unless 1 <= k <= samples and 0 <= correct_samples <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"field k must be 1 to {samples} samples; got {k}; draw more samples")
    if not 0 <= correct_samples <= samples:
        raise ValueError(f"field correct_samples must be 0 to {samples}; got {correct_samples}")
    return 1.0 - math.comb(samples - correct_samples, k) / math.comb(samples, k)


def mean_pass_at_k(correct_counts: Sequence[int], samples: int) -> dict[int, float]:
    """pass@k averaged over questions for k = 1, 2, 4, ... and ``samples``, from each question's right samples."""
    ks = sorted({2**power for power in range(samples.bit_length()) if 2**power <= samples} | {samples})
    return {k: math.fsum(pass_at_k(samples, count, k) for count in correct_counts) / len(correct_counts) for k in ks}
