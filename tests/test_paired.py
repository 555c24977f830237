"""Intervals and verdicts of differences: exact where a difference is none, by families, never more than is known."""

import dataclasses
import importlib.util
import itertools
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from paired_scores import score

from pipelines.paired import difference, in_order
from pipelines.scores import Items, read_evaluation
from stages.base import ConfigError
from stages.runtime.artifact import ArtifactError
from stages.runtime.suites import intervals
from stages.runtime.suites.intervals import paired_interval, ratio_interval, share_interval, student_t, wilson


def ratio(numerator, denominator=None, families=None):
    ids = [str(number) for number in range(len(numerator))]
    return Items(ids, list(map(float, numerator)), list(denominator or [1.0] * len(ids)), families)


def verdict(left, right, families=None, better="higher"):
    return difference(score(ratio(left, families=families), better), score(ratio(right, families=families))).verdict


def changed(gained, lost, same):
    """Answers before and after: so many became right, so many wrong, the rest as before."""
    return [0] * gained + [1] * lost + [0, 1] * (same // 2), [1] * gained + [0] * lost + [0, 1] * (same // 2)


def test_the_interval_is_that_of_all_half_samples_written_out_in_loops():
    draws = random.Random(5)
    weights = [draws.uniform(1, 9) for _ in range(8)]
    left = [weight * draws.gauss(2, 0.3) for weight in weights]
    right = [value - weight * draws.gauss(0.1, 0.2) for value, weight in zip(left, weights, strict=True)]
    found = []
    for chosen in itertools.product([False, True], repeat=8):
        rows = [row for row in range(8) if chosen[row]]
        if rows:
            found.append(
                (sum(right[row] for row in rows) - sum(left[row] for row in rows)) / sum(weights[r] for r in rows)
            )
    found.sort()
    # 255 values part the line into 256 places; 6 of them on each side hold 2.3%, 7 would hold 2.7%.
    assert paired_interval((left, weights), (right, weights)) == pytest.approx((found[5], found[-6]))


def test_random_half_samples_agree_with_students_t_where_it_is_exact():
    drawn = np.random.default_rng(3).normal(0.1, 1.0, 200)
    low, high = ratio_interval([str(n) for n in range(200)], drawn.tolist())
    half = 1.972 * drawn.std(ddof=1) / math.sqrt(200)
    # 4,000 draws know a 2.5% quantile to about 0.05 of a standard error each.
    assert (low, high) == pytest.approx((drawn.mean() - half, drawn.mean() + half), abs=0.1 * half)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (5, 2.5706), (19, 2.0930), (100, 1.9840)]
)
def test_students_t_is_the_tables(freedom, expected):
    assert student_t(freedom) == pytest.approx(expected, abs=3e-3)


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    [(5, 0, "within noise"), (6, 0, "better"), (0, 6, "worse"), (7, 1, "within noise"), (9, 1, "better"),
     (12, 3, "better"), (10, 3, "within noise")],
)  # fmt: skip
def test_few_changed_answers_are_judged_as_the_exact_sign_test_judges_them(gained, lost, expected):  # trap M6
    # Two-sided binomial p: 5:0 0.063, 6:0 0.031, 7:1 0.070, 9:1 0.021, 12:3 0.035, 10:3 0.092 (McNemar 1947, exact).
    for same in (6, 60):
        assert verdict(*changed(gained, lost, same)) == expected


def test_what_a_percentile_bootstrap_calls_better_on_four_changed_answers_is_noise():  # trap M6
    left, right = changed(4, 0, 96)
    draws = np.random.default_rng(0).integers(0, 100, (4000, 100))
    gains = (np.array(right) - np.array(left))[draws].mean(1)
    assert np.quantile(gains, 0.025) > 0
    assert verdict(left, right) == "within noise"


@pytest.mark.parametrize("families", [None, [str(place) for place in range(12)]])
def test_answers_that_all_stayed_or_all_changed_leave_room_for_others(families):  # trap M6
    for left, right, value in (([0] * 12, [0] * 12, 0), ([1] * 12, [0] * 12, -1)):
        found = difference(score(ratio(left, families=families)), score(ratio(right, families=families)))
        low, high = found.interval
        # Of 12 answers without one change, the rule of three leaves 3 / 12 for the share that changes.
        assert found.value == value
        assert 0.15 < high - low < 0.5
        assert -1 <= low <= value <= high <= 1
    assert intervals.changes_interval(0, 0, 12) == pytest.approx((-0.198, 0.198), abs=1e-3)
    many = [str(place // 8) for place in range(96)]
    same = difference(score(ratio([1] * 96, families=many)), score(ratio([1] * 96, families=many)))
    assert same.interval == pytest.approx((-0.198, 0.198), abs=1e-3)


@pytest.mark.parametrize("families", [None, [str(place // 4) for place in range(60)]])
def test_of_pairs_without_a_difference_few_are_called_different(families):  # trap M6
    draws, called, pairs = np.random.default_rng(1), 0, 300
    owners = np.arange(60) if families is None else np.array(families, int)
    for _ in range(pairs):
        own, noise = draws.normal(size=(2, 60))[:, owners], draws.normal(size=(2, 60))
        called += verdict(own[0] + noise[0], own[1] + noise[1], families) != "within noise"
    # 5% of 300 is 15 with a standard deviation of 3.8: 27 is three of them above.
    assert called <= 27


@pytest.fixture
def coverage(monkeypatch):
    """``benchmarks/coverage.py``, which counts the same over thousands of pairs."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    # By its file: a well-known package has the same name.
    spec = importlib.util.spec_from_file_location("coverage_benchmark", folder / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    ["ratios, 20 documents", "ratios, 12 families", "shares of 0.03, 200 items", "shares of 0.3, 12 families",
     "means, 12 families of 4"],
)  # fmt: skip
def test_of_each_kind_of_score_few_pairs_without_a_difference_are_called_different(coverage, name):  # trap M6
    kind, draws, pairs = coverage.KINDS[name], np.random.default_rng(6), 150
    found = [coverage.judged(kind.draw(draws, 0.0), kind.unit).verdict for _ in range(pairs)]
    # 5% of 150 is 7.5 with a standard deviation of 2.7: 15 is below three of them above.
    assert sum(verdict != "within noise" for verdict in found) <= 15


def test_the_power_that_the_benchmark_expects_is_theorys(coverage):
    # scipy.stats.nct: a paired t test of 10 pairs at 0.9 standard deviations, of 34 at 0.5.
    assert coverage.power(9, 0.9 * math.sqrt(10)) == pytest.approx(0.71718, abs=1e-3)
    assert coverage.power(33, 0.5 * math.sqrt(34)) == pytest.approx(0.80778, abs=1e-3)
    # Of three answers that may change the sign test calls nothing better, however they do.
    assert coverage.sign_test_power(3, 0.1, 0.9) == 0.0
    assert coverage.both_yes(0.5, 0.5) == pytest.approx(0.25 + math.asin(0.5) / (2 * math.pi), abs=1e-6)


def test_fillings_of_one_template_taken_for_independent_would_be_called_different():
    draws, called, pairs = np.random.default_rng(1), 0, 200
    owners = np.arange(60) // 4
    for _ in range(pairs):
        own, noise = draws.normal(size=(2, 60))[:, owners], draws.normal(size=(2, 60))
        called += verdict(own[0] + noise[0], own[1] + noise[1]) != "within noise"
    # Variance 2 (1 + 1/4) / 15 taken for 2 * 2 / 60 is 2.5 times too small: P(|z| > 1.96 / sqrt(2.5)) is 0.215.
    assert called / pairs > 0.215 - 3 * 0.029


def test_a_difference_of_two_standard_errors_is_found_as_often_as_theory_says():
    draws, found, pairs, count = np.random.default_rng(2), 0, 300, 60
    for _ in range(pairs):
        shared, noise = draws.normal(size=count), draws.normal(size=count)
        found += verdict(shared, shared + noise + 2 / count**0.5) == "better"
    # P(t > 2.001 - 2) of the noncentral t with 59 degrees of freedom is 0.503; 300 draws have a deviation of 2.9%.
    assert 0.503 - 3 * 0.029 < found / pairs < 0.503 + 3 * 0.029


@pytest.mark.parametrize(
    ("better", "shift", "expected"),
    [("higher", 1, "better"), ("higher", -1, "worse"), ("lower", 1, "worse"), ("lower", -1, "better"),
     ("none", 1, "higher"), ("none", -1, "lower"), ("higher", 0, "within noise")],
)  # fmt: skip
def test_the_verdict_follows_the_direction_of_the_score(better, shift, expected):
    draws = random.Random(3)
    left = [draws.random() for _ in range(50)]
    right = [value + shift + (draws.random() - 0.5) * 0.1 for value in left]
    assert difference(score(ratio(left), better), score(ratio(right), better)).verdict == expected


def test_items_are_paired_by_name_whatever_their_order():
    left = ratio([draw / 7 for draw in range(30)], families=[str(draw // 3) for draw in range(30)])
    right = Items(left.ids[::-1], [value + 1 for value in left.numerator[::-1]], left.denominator, left.families[::-1])
    found = difference(score(left), score(right))
    assert found.interval == pytest.approx((1, 1))
    assert (found.n, found.families) == (30, 10)


def test_other_families_of_the_same_items_are_refused():  # trap M3
    left = ratio(range(12))
    right = dataclasses.replace(left, families=["a", "b"] * 6)
    with pytest.raises(ConfigError, match="must have its items in the same families"):
        in_order(right, left, "s/x")


@pytest.mark.parametrize("families", [None, ["a", "b", "c", "d", "e"] * 20])
def test_too_few_independent_items_get_no_verdict(families):
    left, right = [0.0] * (5 if families is None else 100), [1.0] * (5 if families is None else 100)
    found = difference(score(ratio(left, families=families)), score(ratio(right, families=families)))
    assert (found.verdict, found.interval, found.families) == ("too few items", None, 5)


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_model_that_gives_no_numbers_is_never_better(better):
    left, right = ratio([1.0] * 50), ratio([1.0] * 49 + [float("nan")])
    assert difference(score(left, better), score(right, better)).verdict == "not a number"


@pytest.mark.parametrize("count", [10, 60])
def test_a_half_sample_without_a_counted_item_leaves_no_interval_and_says_so(count):  # trap M6
    # Of the variant's replies three alone were long enough to be judged: 1 half-sample in 8 holds none of them.
    some = [1.0] * 3 + [0.0] * (count - 3)
    left, right = ratio([0.5] * count), ratio([0.25] * 3 + [0.0] * (count - 3), some)
    for one, other in ((left, right), (right, left)):
        found = difference(score(one), score(other))
        assert (found.verdict, found.interval, found.n) == ("too few counted items", None, count)
    broken = ratio([math.nan, *right.numerator[1:]], some)
    assert difference(score(left), score(broken)).verdict == "not a number"


def test_enough_counted_items_among_others_are_compared_as_if_the_others_were_not_there():
    # Of 100 that count a half-sample lacks all once in 2**100 draws.
    sizes = [1.0] * 100 + [0.0] * 20
    draws = [place % 7 for place in range(100)] + [0] * 20
    found = difference(score(ratio(draws, sizes)), score(ratio([2 * one for one in draws], sizes)))
    assert found.verdict == "better"
    assert found.value == pytest.approx(sum(draws) / 100)


@pytest.mark.parametrize("value", [0.0, 0.4])
def test_scores_whose_items_all_say_the_same_are_called_alike_and_not_noise(value):
    sizes = [3.0 + place % 2 for place in range(30)]
    items = ratio([value * size for size in sizes], sizes)
    found = difference(score(items), score(items))
    assert (found.value, found.interval, found.verdict) == (0.0, (0.0, 0.0), "alike")


@pytest.mark.parametrize(("counted", "expected"), [(6, "alike"), (5, "too few counted items")])
def test_zero_against_zero_is_alike_where_other_items_count_in_each(counted, expected):
    left, right = ([1.0] * n + [0.0] * (12 - n) for n in (counted, 8))
    found = difference(score(ratio([0.0] * 12, left)), score(ratio([0.0] * 12, right)))
    assert (found.value, found.interval, found.verdict) == (0.0, None, expected)


def test_without_items_nothing_is_called_better():
    bare = dataclasses.replace(score(ratio([0.0] * 50)), items=None)
    assert difference(bare, score(ratio([1.0] * 50))).verdict == "not paired"


def test_a_share_of_dependent_items_has_the_interval_of_its_families():
    values, families = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 5, [str(place // 3) for place in range(30)]
    low, high = share_interval(values, families)
    # Ten families that are all yes or all no are ten items: 5 of 10 at Student's 2.262 in place of 1.96.
    between = 0.25 * 10 / 9
    n = 0.25 / (between / 10)
    assert (low, high) == pytest.approx(wilson(n / 2, n, 2.2622), abs=1e-3)
    assert high - low > 1.5 * (wilson(15, 30)[1] - wilson(15, 30)[0])
    assert share_interval(values, [str(place) for place in range(30)]) == wilson(15, 30)
    assert share_interval([1.0] * 8, ["one"] * 8) == (0.0, 1.0)


def test_where_all_dependent_items_agree_a_large_family_does_not_count_by_its_size():
    families = ["big"] * 90 + [str(place) for place in range(10)]
    low, high = share_interval([0.0] * 100, families)
    assert low == 0.0
    # 100**2 / (90**2 + 10) is 1.23 items.
    assert high == pytest.approx(wilson(0, 10_000 / 8_110, student_t(10))[1])
    assert high > 0.75


def test_few_documents_get_students_t_of_the_ratio():
    bits, sizes = [2.0, 4.4, 5.7, 8.8], [1.0, 2.0, 3.0, 4.0]
    low, high = ratio_interval(list("abcd"), bits, sizes)
    value = 20.9 / 10
    rest = [bit - value * size for bit, size in zip(bits, sizes, strict=True)]
    error = math.sqrt(4 / 3 * sum(each**2 for each in rest)) / 10
    assert (low, high) == pytest.approx((value - 3.1824 * error, value + 3.1824 * error))
    assert ratio_interval(["a"], [1.0]) is None


def test_documents_without_a_byte_of_text_add_nothing():
    bits, sizes = [float(n) for n in range(2, 12)], [float(n) for n in range(1, 11)]
    ids = [str(n) for n in range(10)]
    assert ratio_interval([*ids, "empty"], [*bits, 0.0], [*sizes, 0.0]) == ratio_interval(ids, bits, sizes)
    pair = (bits, sizes), ([bit * 1.1 for bit in bits], sizes)
    padded = [([*top, 0.0], [*bottom, 0.0]) for top, bottom in pair]
    assert paired_interval(*padded) == paired_interval(*pair)


def test_large_sets_are_drawn_in_parts_that_do_not_change_the_law(monkeypatch):
    drawn = np.random.default_rng(4).normal(size=50)
    ids = [str(n) for n in range(50)]
    whole = ratio_interval(ids, drawn.tolist())
    monkeypatch.setattr(intervals, "_CHUNK", 50 * 700)
    intervals._halves.cache_clear()
    try:
        parts = ratio_interval(ids, drawn.tolist())
    finally:
        intervals._halves.cache_clear()
    assert parts != whole
    assert parts == pytest.approx(whole, abs=0.15 * (whole[1] - whole[0]))


def test_intervals_repeat_themselves_and_move_no_generator():  # trap M2
    left, right = ratio([n % 7 for n in range(30)]), ratio([n % 5 for n in range(30)])
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    assert difference(score(left), score(right)) == difference(score(left), score(right))
    assert (random.random(), np.random.random()) == expected


def test_families_are_read_from_the_artifact_and_must_be_as_many_as_the_items(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    entry = {"name": "s/x", "suite": "s", "value": 0.5, "unit": "share", "n": 2, "set_hash": "h", "items": "s/x"}
    (output / "scores.json").write_text(json.dumps({"scores": [entry]}))
    items = {"s/x": {"ids": ["a", "b"], "numerator": [0, 1], "families": ["t", "t"]}}
    (output / "items.json").write_text(json.dumps(items))
    (found,) = read_evaluation("judge", tmp_path).scores
    assert found.items.families == ["t", "t"]
    items["s/x"]["families"] = ["t"]
    (output / "items.json").write_text(json.dumps(items))
    with pytest.raises(ArtifactError, match="1 families"):
        read_evaluation("judge", tmp_path)
