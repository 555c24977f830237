"""Which steps are skipped, how they are counted, and when the run gives up (TRAPS T3)."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from stages.runtime.guards import GuardConfig, StepGuard, TooManySkippedSteps


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, -math.inf)])
def test_a_nonfinite_loss_or_norm_is_skipped(loss, norm):  # trap T3
    guard = StepGuard(GuardConfig())
    assert guard.judge(loss, norm) == "nonfinite"
    assert (guard.skipped_nonfinite, guard.skipped_spike, guard.taken) == (1, 0, 0)


def test_a_spike_is_called_after_the_window_only_and_does_not_move_the_mean():
    guard = StepGuard(GuardConfig(spike_factor=3.0, spike_window_steps=4))
    assert [guard.judge(2.0, norm) for norm in (1.0, 100.0, 1.0, 1.0)] == [None] * 4
    assert guard.mean_grad_norm == pytest.approx(25.75)
    assert guard.judge(2.0, 77.0) is None
    assert guard.mean_grad_norm == pytest.approx(25.75 + (77 - 25.75) / 4)
    before = guard.mean_grad_norm
    assert guard.judge(2.0, 3.01 * before) == "spike"
    assert guard.mean_grad_norm == before


def test_without_a_factor_no_finite_step_is_skipped():
    guard = StepGuard(GuardConfig(spike_window_steps=1))
    assert [guard.judge(2.0, norm) for norm in (1.0, 1e30)] == [None, None]


def test_skips_in_a_row_stop_the_run_and_a_good_step_starts_the_count_anew():  # trap T3
    guard = StepGuard(GuardConfig(max_skipped_in_a_row=2))
    for norm in (math.nan, 1.0, math.nan):
        guard.judge(2.0, norm)
        guard.stop_if_hopeless(7)
    guard.judge(2.0, math.nan)
    with pytest.raises(TooManySkippedSteps, match=r"step 8: 2 steps in a row were skipped \(3 non-finite"):
        guard.stop_if_hopeless(8)


def test_counters_survive_a_checkpoint():  # trap T6
    config = GuardConfig(spike_factor=2.0, spike_window_steps=2)
    guard = StepGuard(config)
    norms = [1.0, 1.5, math.nan, 9.0, 1.2, 2.9, 1.0, 8.0]
    for norm in norms[:4]:
        guard.judge(2.0, norm)
    resumed = StepGuard.restored(config, guard.state())
    assert [resumed.judge(2.0, norm) for norm in norms[4:]] == [guard.judge(2.0, norm) for norm in norms[4:]]
    assert resumed == guard


def test_a_factor_of_one_or_less_is_refused():
    with pytest.raises(ValidationError):
        GuardConfig(spike_factor=1.0)
