"""How often a comparison calls two equal variants different, and how often it finds a difference that is there.

    python benchmarks/coverage.py --pairs 4000

Pairs of variants are drawn for each kind of score, handed to ``pipelines.paired.difference`` as an evaluation would,
and the verdicts counted: without a difference at most 6% may be called different at the 95% level; a planted difference
of two standard errors must be found as often as theory says (noncentral Student's t for normal families of one size,
the exact sign test for independent yes and no; of unequal sizes theory does not say); an interval must hold the planted
difference. Beside it stand the verdicts that the same pairs would get if the items of one family were taken for
independent, and by the plain percentile bootstrap. Exit code 1 where more than 6% are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from record import RESULTS, table, write_result

from pipelines.paired import difference
from pipelines.scores import Items, Score
from stages.runtime.suites.intervals import family_sums, student_t, wilson

MOST = 0.06
"""Share of equal pairs that may be called different."""
PLANTED_ERRORS = 2.0
_NORMAL = NormalDist()


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two variants on the same items: (n,) numerators, the denominator that both have, families by number.

    ``effect`` is the true difference.
    """

    left: np.ndarray
    right: np.ndarray
    denominator: np.ndarray
    effect: float
    families: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of score; ``draw`` makes a pair whose true difference is so many of its standard errors.

    ``theory`` is how often ``PLANTED_ERRORS`` should be found, where that is known.
    """

    unit: str
    draw: Callable[[np.random.Generator, float], Pair]
    theory: Callable[[], float] | None = None


def means(count: int, tail: int | None = None) -> Kind:
    """Margins in nats a token: what an item's two variants share is as large as what is their own."""
    variance = 1.0 if tail is None else tail / (tail - 2)

    def draw(rng: np.random.Generator, errors: float) -> Pair:
        shared, effect = rng.normal(size=count), errors * math.sqrt(2 * variance / count)
        own = rng.normal(size=(2, count)) if tail is None else rng.standard_t(tail, size=(2, count))
        return Pair(shared + own[0], shared + own[1] + effect, np.ones(count), effect)

    return Kind("nats_per_token", draw, None if tail else lambda: power(count - 1, PLANTED_ERRORS))


def clustered_means(families: int, size: int | None = None) -> Kind:
    """Margins of ``size`` facts about a subject (1 to 8 where it is none), half of whose variance is the subject's."""

    def draw(rng: np.random.Generator, errors: float) -> Pair:
        owners = uneven(rng, families) if size is None else np.repeat(np.arange(families), size)
        own = rng.normal(size=(2, len(owners))) + rng.normal(size=(2, families))[:, owners]
        sizes = np.bincount(owners).astype(float)
        variances = 2 * (sizes**2 + sizes)
        effect = errors * math.sqrt(variances.sum()) / len(owners)
        return Pair(own[0], own[1] + effect, np.ones(len(owners)), effect, owners)

    return Kind("nats_per_token", draw, None if size is None else lambda: power(families - 1, PLANTED_ERRORS))


def ratios(count: int, families: int | None = None) -> Kind:
    """Bits over bytes of documents whose lengths differ a hundredfold; ``families`` of 1 to 8 share their effects."""

    def draw(rng: np.random.Generator, errors: float) -> Pair:
        owners = None if families is None else uneven(rng, families)
        n = count if owners is None else len(owners)
        sizes, shared = rng.lognormal(6, 1, n), rng.normal(2, 0.4, n)
        own, variances = rng.normal(0, 0.1, (2, n)), 2 * 0.01 * sizes**2
        if families is not None and owners is not None:
            own = own + rng.normal(0, 0.1, (2, families))[:, owners]
            variances = np.bincount(owners, variances) + 2 * 0.01 * np.bincount(owners, sizes) ** 2
        effect = errors * math.sqrt(variances.sum()) / sizes.sum()
        bits = sizes * (shared + own[0]), sizes * (shared + own[1] + effect)
        return Pair(*bits, sizes, effect, owners)

    return Kind("bits_per_byte", draw)


def shares(count: int, share: float) -> Kind:
    """Yes and no of independent items; half of the variance behind an answer is the item's."""
    error = math.sqrt(2 * (share - both_yes(share, share)) / count)

    def draw(rng: np.random.Generator, errors: float) -> Pair:
        latent = rng.normal(size=count) + rng.normal(size=(2, count))
        return Pair(*answers(latent, 2, share, errors * error), np.ones(count), errors * error)

    return Kind("share", draw, lambda: sign_test_power(count, share, share + PLANTED_ERRORS * error))


def clustered_shares(share: float, families: int) -> Kind:
    """Yes and no to 1 to 8 fillings of a template, to which a variant answers much alike."""

    def plain(rng: np.random.Generator, effect: float) -> Pair:
        owners = uneven(rng, families)
        latent = rng.normal(size=len(owners)) + rng.normal(size=(2, len(owners)))
        latent = latent + rng.normal(0, math.sqrt(2), (2, families))[:, owners]
        return Pair(*answers(latent, 4, share, effect), np.ones(len(owners)), effect, owners)

    @functools.cache
    def error() -> float:
        rng = np.random.default_rng(families)
        drawn = (plain(rng, 0.0) for _ in range(4000))
        return float(np.std([float((pair.right - pair.left).mean()) for pair in drawn]))

    return Kind("share", lambda rng, errors: plain(rng, errors * error() if errors else 0.0))


def answers(latent: np.ndarray, variance: float, share: float, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Zeros and ones of two variants' latent values (2, n), cut where ``share`` and ``share + effect`` lie above."""
    cuts = (math.sqrt(variance) * _NORMAL.inv_cdf(1 - wanted) for wanted in (share, share + effect))
    left, right = ((values > cut).astype(float) for values, cut in zip(latent, cuts, strict=True))
    return left, right


def both_yes(left: float, right: float) -> float:
    """P(both variants say yes) of ``shares``: the integral of what they share."""
    grid = np.linspace(-8, 8, 4001)
    cuts = [math.sqrt(2) * _NORMAL.inv_cdf(1 - one) for one in (left, right)]
    over = [_NORMAL.pdf(x) * _NORMAL.cdf(x - cuts[0]) * _NORMAL.cdf(x - cuts[1]) for x in grid]
    return float(np.sum(over) * (grid[1] - grid[0]))


def sign_test_power(count: int, left: float, right: float) -> float:
    """P(better) of the exact sign test on the changed answers (McNemar 1947), 2.5% on each side."""
    both = both_yes(left, right)
    lost, gained = left - both, right - both
    total = 0.0
    for changed in range(1, count + 1):
        tails = np.cumsum([_binomial(changed, k, 0.5) for k in range(changed, -1, -1)])[::-1]
        wins = [k for k in range(changed + 1) if tails[k] <= 0.025]
        found = sum(_binomial(changed, k, gained / (gained + lost)) for k in wins)
        total += _binomial(count, changed, gained + lost) * found
    return total


def uneven(rng: np.random.Generator, families: int) -> np.ndarray:
    """The family of each item, families of 1 to 8 items."""
    return np.repeat(np.arange(families), rng.integers(1, 9, families))


KINDS: dict[str, Kind] = {
    "means, 40 items": means(40),
    "means with heavy tails, 40 items": means(40, tail=3),
    "means, 12 families of 4": clustered_means(12, size=4),
    "means, 12 families": clustered_means(12),
    "means, 40 families": clustered_means(40),
    "ratios, 20 documents": ratios(20),
    "ratios, 80 documents": ratios(80),
    "ratios, 12 families": ratios(0, families=12),
    "ratios, 40 families": ratios(0, families=40),
    "shares of 0.3, 200 items": shares(200, 0.3),
    "shares of 0.03, 200 items": shares(200, 0.03),
    "shares of 0.3, 12 families": clustered_shares(0.3, 12),
    "shares of 0.3, 40 families": clustered_shares(0.3, 40),
}
"""What is simulated, by name."""


def measure(name: str, pairs: int, seed: int) -> dict[str, Any]:
    """One row: rates over ``pairs`` pairs without and with a difference."""
    kind, rng = KINDS[name], np.random.default_rng([seed, list(KINDS).index(name)])
    equal = [kind.draw(rng, 0.0) for _ in range(pairs)]
    unequal = [kind.draw(rng, PLANTED_ERRORS) for _ in range(pairs)]
    planted = [(pair, judged(pair, kind.unit)) for pair in unequal]
    called = sum(judged(pair, kind.unit).verdict != "within noise" for pair in equal)
    low, high = wilson(called, pairs)
    independent = None
    if equal[0].families is not None:
        alone = (dataclasses.replace(pair, families=None) for pair in equal)
        independent = _share([judged(pair, kind.unit).verdict != "within noise" for pair in alone])
    return {
        "kind": name, "unit": kind.unit, "pairs": pairs, "called_different": called / pairs,
        "called_different_low": low, "called_different_high": high,
        "as_if_independent": independent,
        "percentile_bootstrap": _share([_percentile_calls(pair, rng) for pair in equal]),
        "found": _share([one.verdict == "better" for _, one in planted]),
        "theory": None if kind.theory is None else kind.theory(),
        "interval_holds_it": _share(
            [one.interval is not None and one.interval[0] <= pair.effect <= one.interval[1] for pair, one in planted]
        ),
    }  # fmt: skip


def judged(pair: Pair, unit: str) -> Any:
    """The pair as two evaluations' scores, compared as ``compare.py`` compares them."""
    ids = [str(number) for number in range(len(pair.left))]
    families = None if pair.families is None else [str(name) for name in pair.families]
    scores = []
    for numerator in (pair.left, pair.right):
        items = Items(ids, numerator.tolist(), pair.denominator.tolist(), families)
        value = float(numerator.sum() / pair.denominator.sum())
        scores.append(Score(
            name="s/x", suite="s", value=value, unit=unit, better="higher", n=len(ids), n_unit="items", interval=None,
            set_hash="", suite_version=1, method="", decoding=None, settings={}, items=items,
        ))  # fmt: skip
    return difference(*scores)


def power(freedom: int, errors: float) -> float:
    """P(T > t) of Student's noncentral T, the difference ``errors`` standard errors: the two-sided 95% test's.

    T is (Z + errors) / S with S**2 chi-square over ``freedom``: the mean of P(Z > t S - errors) over S.
    """
    grid = np.linspace(1e-4, 5, 2001)
    log_density = (freedom - 1) * np.log(grid) - freedom * grid**2 / 2
    density = np.exp(log_density - log_density.max())
    beyond = np.array([1 - _NORMAL.cdf(student_t(freedom) * spread - errors) for spread in grid])
    return float((density * beyond).sum() / density.sum())


def _binomial(count: int, k: int, share: float) -> float:
    return math.comb(count, k) * share**k * (1 - share) ** (count - k)


def _percentile_calls(pair: Pair, rng: np.random.Generator) -> bool:
    """Whether the percentile bootstrap over families, 1,000 resamples, leaves zero out."""
    owners = [str(n) for n in (range(len(pair.left)) if pair.families is None else pair.families)]
    sums = family_sums(owners, pair.right - pair.left, pair.denominator)
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 1000) @ sums
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return bool(not low <= 0 <= high)


def _share(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / len(outcomes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=list(KINDS), action="append", help="this kind alone; repeatable")
    parser.add_argument("--result", type=Path, default=RESULTS / "coverage.json")
    arguments = parser.parse_args(argv)
    rows = []
    for name in arguments.kind or KINDS:
        rows.append(measure(name, arguments.pairs, arguments.seed))
        print(f"{name}: {rows[-1]['called_different']:.3f} called different", flush=True)
    print(table(rows))
    write_result(arguments.result, rows, {"pairs": arguments.pairs, "seed": arguments.seed, "level": 0.95})
    return int(any(row["called_different"] > MOST for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
