"""Learning rates as pure functions of the step, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from stages.runtime.schedule import ConstantSchedule, CosineSchedule, WSDSchedule, decay_start, lr_at, same_path

COSINE = CosineSchedule(kind="cosine", warmup_steps=4)
WSD = WSDSchedule(kind="wsd", warmup_steps=2, decay_steps=4)
CONSTANT = ConstantSchedule(kind="constant", warmup_steps=2)


def rates(schedule, max_steps, ratio=0.1):
    return [lr_at(step, schedule, lr=1.0, max_steps=max_steps, min_lr_ratio=ratio) for step in range(max_steps)]


def test_warmup_rises_in_equal_parts_and_reaches_the_peak_on_its_last_step():
    assert rates(COSINE, 12)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_passes_the_middle_at_the_mean_and_ends_at_the_floor():
    after = rates(COSINE, 12)[4:]
    assert after[3] == pytest.approx(0.55)
    assert after[1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert after[-1] == pytest.approx(0.1)
    assert after == sorted(after, reverse=True)


def test_wsd_stays_at_the_peak_and_falls_in_equal_parts():
    assert rates(WSD, 10, ratio=0.0) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_constant_never_falls():
    assert rates(CONSTANT, 5) == [0.5, 1, 1, 1, 1]


def test_no_warmup_starts_at_the_peak():
    assert lr_at(0, ConstantSchedule(kind="constant"), lr=2e-3, max_steps=5, min_lr_ratio=0.1) == 2e-3


def test_the_decay_starts_where_rates_begin_to_depend_on_the_length():
    for schedule in (COSINE, WSD, CONSTANT):
        short, long = rates(schedule, 20), rates(schedule, 30)
        equal = next((step for step in range(20) if short[step] != long[step]), None)
        assert decay_start(schedule, 20) == equal


@pytest.mark.parametrize("schedule", [COSINE, WSD, CONSTANT])
def test_a_state_serves_two_lengths_exactly_when_all_rates_before_it_agree(schedule):
    for other in (12, 20, 30):
        for step in range(21):
            agree = step <= other and rates(schedule, 20)[:step] == rates(schedule, other)[:step]
            assert same_path(step, schedule, max_steps=20, other_max_steps=other) == agree
