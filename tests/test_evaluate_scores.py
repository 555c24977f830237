"""Intervals against textbook values, items that reproduce their score, draws that move no generator (TRAPS M2, M6)."""

import math
import random

import numpy as np
import pytest

from stages.runtime.suites.scores import Items, ScoreSheet, bootstrap, content_hash, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (81, 263, 0.25525, 0.36619)],
)
def test_wilsons_interval_is_the_textbooks(successes, n, low, high):  # Newcombe 1998, table I
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_the_bootstrap_of_a_mean_is_as_wide_as_the_normal_law_says():
    drawn = np.random.default_rng(3).normal(2.0, 1.0, 400)
    low, high = bootstrap(Items([str(n) for n in range(400)], drawn.tolist()))
    half = 1.96 * drawn.std() / 20
    # 1,000 resamples know a 2.5% quantile to about 0.06 of a standard error each.
    assert low == pytest.approx(drawn.mean() - half, abs=0.2 * half)
    assert high == pytest.approx(drawn.mean() + half, abs=0.2 * half)


def test_documents_are_drawn_whole_with_their_bytes():
    items = Items(["a", "b", "c"], [2.0, 4.0, 30.0], [1.0, 2.0, 15.0])
    assert items.value() == 2.0
    assert bootstrap(items) == pytest.approx((2.0, 2.0))
    assert Items(["a", "b"], [1.0, 9.0], [1.0, 3.0]).value() == 2.5


def test_one_item_has_no_interval():
    assert bootstrap(Items(["a"], [1.0])) is None


def test_intervals_repeat_themselves_and_move_no_generator():  # trap M2
    items = Items([str(n) for n in range(30)], [float(n % 7) for n in range(30)])
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    assert bootstrap(items) == bootstrap(items)
    assert (random.random(), np.random.random()) == expected


def test_groups_are_parts_of_the_whole_and_carry_set_unit_and_n():  # trap M6
    sheet = ScoreSheet("suite", 3, "hash", {"a": 1}, {"temperature": 0.0})
    items = Items(list("abcd"), [1.0, 0.0, 1.0, 1.0])
    sheet.add_groups("suite/rate", items, ["x", "x", "y", "y"], unit="share", better="higher", n_unit="replies")
    assert [(score.name, score.value, score.n) for score in sheet.scores] == [
        ("suite/rate", 0.75, 4), ("suite/rate/x", 0.5, 2), ("suite/rate/y", 1.0, 2),
    ]  # fmt: skip
    for score in sheet.scores:
        assert (score.suite_version, score.set_hash, score.unit, score.n_unit) == (3, "hash", "share", "replies")
        assert score.interval[0] <= score.value <= score.interval[1]
        assert sheet.items[score.items].value() == score.value


def test_a_single_group_is_the_whole():
    sheet = ScoreSheet("suite", 1, "hash", {})
    sheet.add_groups("m", Items(["a", "b"], [1.0, 3.0]), ["x", "x"], unit="tokens", better="none", n_unit="replies")
    assert [score.name for score in sheet.scores] == ["m"]


def test_content_is_known_by_its_data_not_by_its_order():
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash([1, 2]) != content_hash([2, 1])
    assert math.isclose(Items(["a"] * 10, [0.1] * 10).value(), 0.1, rel_tol=0, abs_tol=0)
