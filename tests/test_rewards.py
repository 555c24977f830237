"""Rewards: the final answer and nothing else, exactly; pass@k without bias."""

from __future__ import annotations

import itertools

import pytest

from data.rewards import REWARDS, extract_answer, is_correct, mean_pass_at_k, pass_at_k, total

ROW = {"answer": "13"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 13", "13"),
        ("7 + 6 = 13. Answer: 13", "13"),
        ("Answer: 12 Answer: 13 ", "13"),
        ("Answer: a b c", "a b c"),
        ("13", None),
        ("Answer:", None),
        ("Answer: 13\nor so", None),
        ("answer: 13", None),
        ("", None),
    ],
)
def test_the_final_answer_is_what_follows_the_last_marker(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", ["Answer: 12 or 13", "Answer: 13.", "Answer: 013", "13", "Answer: 1 3", "Answer: 12"])
def test_a_text_that_only_holds_the_answer_is_wrong(text: str) -> None:
    assert not is_correct(text, ROW)
    assert REWARDS["correct"](text, ROW) == 0.0


def test_rewards_are_weighed_and_summed() -> None:
    weights = {"correct": 2.0, "answered": 0.5}
    assert total(weights, "Answer: 13", ROW) == 2.5
    assert total(weights, "Answer: 14", ROW) == 0.5
    assert total(weights, "fourteen", ROW) == 0.0


def test_words_in_their_place_earn_their_share() -> None:
    row = {"answer": "a b c d"}
    assert REWARDS["in_place"]("Answer: a b d c", row) == 0.5
    assert REWARDS["in_place"]("Answer: a b c", row) == 0.0
    assert REWARDS["in_place"]("a b c d", row) == 0.0
    assert REWARDS["in_place"]("Answer: a b c d", row) == 1.0


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_reward_lies_between_zero_and_one(name: str) -> None:
    texts = ["", "Answer: 13", "Answer: 1 3", "Answer: x", "13"]
    assert all(0.0 <= REWARDS[name](text, ROW) <= 1.0 for text in texts)


@pytest.mark.parametrize(("samples", "right"), [(6, 0), (6, 1), (6, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(samples: int, right: int) -> None:
    outcomes = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        draws = list(itertools.combinations(outcomes, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_averaged_over_questions_at_powers_of_two() -> None:
    found = mean_pass_at_k([0, 6, 3], 6)
    assert sorted(found) == [1, 2, 4, 6]
    assert found[1] == pytest.approx((0 + 1 + 0.5) / 3)
    assert found[6] == pytest.approx(2 / 3)


def test_pass_at_k_refuses_more_draws_than_samples() -> None:
    with pytest.raises(ValueError, match="field k must be 1 to 4"):
        pass_at_k(4, 2, 5)
    with pytest.raises(ValueError, match="field correct_samples"):
        pass_at_k(4, 5, 2)
