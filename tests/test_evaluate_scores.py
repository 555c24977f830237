"""Intervals against textbook values, items that reproduce their score, draws that move no generator (TRAPS M2, M6)."""

import math
import random

import numpy as np
import pytest

from stages.runtime.suites.intervals import effective_n
from stages.runtime.suites.scores import (
    Items,
    Score,
    ScoreSheet,
    bootstrap,
    content_hash,
    interval_of,
    named_unit,
    wilson,
)

HASH = "0" * 64


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
    sheet = ScoreSheet("suite", 3, HASH, {"a": 1}, {"temperature": 0.0})
    items = Items(list("abcd"), [1.0, 0.0, 1.0, 1.0])
    sheet.add_groups("suite/rate", items, ["x", "x", "y", "y"], unit="share", better="higher", n_unit="replies")
    assert [(score.name, score.value, score.n) for score in sheet.scores] == [
        ("suite/rate", 0.75, 4), ("suite/rate/x", 0.5, 2), ("suite/rate/y", 1.0, 2),
    ]  # fmt: skip
    for score in sheet.scores:
        assert (score.suite_version, score.set_hash, score.unit, score.n_unit) == (3, HASH, "share", "replies")
        assert score.interval[0] <= score.value <= score.interval[1]
        assert sheet.items[score.items].value() == score.value


def test_a_single_group_is_the_whole():
    sheet = ScoreSheet("suite", 1, HASH, {})
    items = Items(["a", "b"], [1.0, 3.0])
    sheet.add_groups("m_tokens", items, ["x", "x"], unit="tokens", better="none", n_unit="replies")
    assert [score.name for score in sheet.scores] == ["m_tokens"]


def test_content_is_known_by_its_data_not_by_its_order():
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash([1, 2]) != content_hash([2, 1])
    assert math.isclose(Items(["a"] * 10, [0.1] * 10).value(), 0.1, rel_tol=0, abs_tol=0)


def test_a_share_of_families_that_agree_within_is_worth_as_many_items_as_families():  # trap M6
    # Ten families of six equal items each: the variance between families is that of ten independent items.
    families = [str(number // 6) for number in range(60)]
    values = [float(number // 6 < 4) for number in range(60)]
    # 0.4 * 0.6 / 10 per item, times 10 / 9 for the estimated variance.
    assert effective_n(values, families) == pytest.approx(9.0)
    interval, method = interval_of(Items([str(n) for n in range(60)], values, families=families), "share", "prompts")
    # Student's quantile instead of the normal one can only widen it.
    low, high = wilson(0.4 * 9, 9)
    assert interval[0] <= low < high <= interval[1]
    assert "10 families" in method


def test_items_that_differ_within_families_as_much_as_between_keep_their_n():
    drawn = np.random.default_rng(5).integers(0, 2, 4000).astype(float).tolist()
    families = [str(number // 4) for number in range(4000)]
    # The estimated variance between 1,000 families varies by about sqrt(2 / 1000) of itself.
    assert effective_n(drawn, families) == pytest.approx(4000, rel=0.2)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_all_agree_each_family_counts_once(value):
    assert effective_n([value] * 12, ["a"] * 6 + ["b"] * 6) == 2.0
    interval, _ = interval_of(
        Items([str(n) for n in range(12)], [value] * 12, families=["a"] * 6 + ["b"] * 6), "share", "x"
    )
    assert interval[1] - interval[0] > 0.6


def test_the_bootstrap_draws_families_whole():  # trap M6
    generator = np.random.default_rng(11)
    effects = generator.normal(0, 1, 100)
    values = np.repeat(effects, 10) + generator.normal(0, 0.1, 1000)
    ids, families = [str(n) for n in range(1000)], [str(n // 10) for n in range(1000)]
    low, high = bootstrap(Items(ids, values.tolist(), families=families))
    half = 1.96 * np.std(values.reshape(100, 10).mean(1)) / 10
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    alone_low, alone_high = bootstrap(Items(ids, values.tolist()))
    # As if each item were new, the interval is shorter by about the root of a family's size.
    assert (high - low) / (alone_high - alone_low) == pytest.approx(math.sqrt(10), rel=0.15)


def test_ratios_whose_families_may_be_empty_have_an_interval():
    items = Items(list("abcd"), [1.0, 2.0, 0.0, 0.0], [2.0, 4.0, 0.0, 0.0])
    assert items.value() == 0.5
    assert bootstrap(items) == pytest.approx((0.5, 0.5))


GOOD = {
    "name": "suite/rate", "suite": "suite", "suite_version": 1, "value": 0.5, "unit": "share", "better": "higher",
    "n": 4, "n_unit": "replies", "interval": (0.1, 0.9), "method": "Wilson", "set_hash": HASH, "decoding": None,
    "settings": {},
    "items": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"n": 0}, "say of how many items"),
        ({"n_unit": ""}, "say of how many items"),
        ({"interval": None}, "have an interval"),
        ({"interval": (0.9, 0.1)}, "ordered interval"),
        ({"unit": "points"}, "have one of the units"),
        ({"set_hash": ""}, "carry the SHA-256 of its set"),
        ({"value": math.nan}, "finite value"),
        ({"better": "up"}, "which way is better"),
    ],
)
def test_a_score_that_cannot_be_believed_cannot_be_made(change, rule):  # traps M3, M6
    assert Score(**GOOD).value == 0.5
    with pytest.raises(ValueError, match=rule):
        Score(**GOOD | change)


@pytest.mark.parametrize(
    ("name", "unit", "part"),
    [
        ("suite/rate", "bits_per_byte", None),
        ("suite/repetition_ratio", "share", None),
        ("bpb/de", "nats_per_token", "language"),
        ("suite/length_tokens/en", "share", "language"),
        ("suite/accuracy", "ratio", None),
    ],
)
def test_a_ratio_cannot_be_called_a_difference(name, unit, part):  # trap M7
    with pytest.raises(ValueError, match="must be named by its unit"):
        Score(**GOOD | {"name": name, "unit": unit, "part": part})


def test_names_state_their_units_and_parts_do_not():
    found = {named_unit(*name) for name in (("bpb/de", "language"), ("bpb/all",), ("harness/x/bits_per_byte",))}
    assert found == {"bits_per_byte"}
    assert named_unit("decoding/repetition_ratio_greedy") == "ratio"
    assert named_unit("safety/refusal/ratio", "template") is None
    assert named_unit("reasoning/moderation") is None


def test_what_is_written_of_items_gives_them_back():
    items = Items(["a", "b"], [1.0, 0.0], families=["x", "x"])
    assert items.plain() == {"ids": ["a", "b"], "numerator": [1.0, 0.0], "families": ["x", "x"]}
    assert items.only([False, True]) == Items(["b"], [0.0], families=["x"])
