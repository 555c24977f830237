"""Every fine-tuning stage, killed, stopped, damaged and resumed on one rank and on two: it ends as if undisturbed.

A stage takes part by its line in ``finetune_cases.CASES``. One process a stage has the imports and forks the lives.
"""

from __future__ import annotations

import pytest
from finetune_cases import CASES, STEPS, campaign

SAVED, KILLED = 85, -9


@pytest.fixture(scope="module", params=sorted(CASES))
def seen(request, tmp_path_factory):
    return campaign(request.param, tmp_path_factory.mktemp(request.param), "lives")


def test_a_run_killed_after_a_step_and_in_a_file_operation_is_the_uninterrupted_one(seen):  # trap T6
    found = seen["one_rank"]
    assert found["codes"] == [0, KILLED, KILLED, 0], found
    assert found["differences"] == []


def test_two_ranks_stopped_then_killed_and_resumed_are_the_uninterrupted_two(seen):  # trap T6
    found = seen["two_ranks"]
    assert found["codes"] == [0, SAVED, KILLED, 0], found
    assert found["differences"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(CASES))
def test_two_ranks_under_zero1_too(kind, tmp_path):  # trap T6
    found = campaign(kind, tmp_path / kind, "zero1")["two_ranks_zero1"]
    assert found["codes"] == [0, SAVED, KILLED, 0], found
    assert found["differences"] == []


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found_and_the_one_before_is_taken(seen):  # trap O2
    assert seen["flips"] == []


def test_the_output_holds_what_was_trained_and_not_the_parent(seen):  # trap T4
    assert seen["untrained"] == []


def test_a_checkpoint_of_two_ranks_is_refused_on_one(seen):
    code, said = seen["other_ranks"]
    assert code == 2
    assert f"the checkpoint of step {STEPS} was saved by 2 ranks and loads on as many; got 1; start 2 ranks" in said
