"""GRPO before anything is built: faults with their way out, what the fields mean, figures, intervals."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tiny_run import spec

from stages.grpo import GRPO
from stages.runtime.grpo_report import decode_outcomes, encode_outcomes, paired_gain, summary_of
from stages.runtime.suites.intervals import wilson


def config(**changes: Any) -> Any:
    plain = {
        "kind": "grpo", "from": "sft", "max_length": 64, "max_completion_length": 16, "global_batch_size": 16,
        "micro_batch_size": 4, "max_steps": 4, "lr": 1e-4, "precision": "fp32",
    }  # fmt: skip
    return GRPO.Config.model_validate(plain | changes)


def faults(**changes: Any) -> dict[str, str]:
    return {fault.path: fault.message for fault in GRPO.check(config(**changes), spec())}


def test_a_plain_config_has_no_faults() -> None:
    assert faults() == {}


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"num_generations": 5}, "global_batch_size", "a multiple of num_generations 5; got 16; set 20"),
        ({"generation_batch_size": 40}, "generation_batch_size", "a multiple of global_batch_size 16; got 40; set 48"),
        (
            {"generation_batch_size": 32, "max_steps": 5},
            "max_steps",
            "2 steps that share a generation batch; got 5",
        ),
        ({"num_iterations": 3, "max_steps": 4}, "max_steps", "set 6"),
        (
            {"num_iterations": 2, "schedule": {"kind": "wsd", "decay_steps": 1}},
            "schedule.decay_steps",
            "a multiple of the 2 steps that share a generation batch; got 1; set 2",
        ),
        ({"max_completion_length": 64}, "max_completion_length", "room for the prompt in max_length 64; got 64"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level", "set loss_type: grpo for GSPO"),
        ({"rewards": {"corect": 1.0}}, "rewards.corect", "must be one of answered, correct, in_place"),
        ({"rewards": {"correct": 0.0}}, "rewards", "must weigh one reward above 0"),
        ({"deepspeed": "zero3"}, "deepspeed", "rollouts decode with them; got zero3; set zero2"),
    ],
)
def test_what_does_not_fit_is_refused_before_launch(changes: dict[str, Any], field: str, words: str) -> None:
    assert words in faults(**changes)[field]


def test_all_faults_come_at_once() -> None:
    assert set(faults(num_generations=5, rewards={"x": 1.0}, deepspeed="zero3")) == {
        "global_batch_size", "rewards.x", "deepspeed",
    }  # fmt: skip


def test_groups_are_never_torn_apart_by_ranks() -> None:
    assert GRPO.check_devices(config(), 2, False) == []
    (fault,) = GRPO.check_devices(config(num_generations=16), 2, False)
    assert fault.path == "global_batch_size"
    assert "multiple of 32" in fault.message


@pytest.mark.parametrize(("loss_type", "scale"), [("dapo", "group"), ("dr_grpo", "none"), ("grpo", "group")])
def test_advantages_are_scaled_as_the_loss_asks_unless_told_otherwise(loss_type: str, scale: str) -> None:
    assert config(loss_type=loss_type).advantage_scale == scale
    assert config(loss_type=loss_type, scale_rewards="batch").advantage_scale == "batch"


def test_the_plan_counts_completions_and_a_generation_counts_steps() -> None:
    made = config(generation_batch_size=32, num_iterations=2, oversampling=3, max_steps=8)
    assert made.steps_per_generation == 4
    assert GRPO.plan(made, spec(), 1)["completions"] == 2 * 32 * 3


def test_the_stage_is_known_without_importing_what_trains() -> None:
    code = (
        "import sys, stages, stages.grpo, stages.tasks, stages.runtime.grpo_report\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_paired_interval_is_that_of_drawing_questions_anew() -> None:
    generator = np.random.default_rng(5)
    before = (generator.random(400) < 0.5).tolist()
    after = [bool(was) or bool(generator.random() < 0.2) for was in before]
    gain, low, high = paired_gain(before, after)
    difference = np.array(after, float) - np.array(before, float)
    drawn = difference[generator.integers(0, 400, (4_000, 400))].mean(1)
    assert gain == difference.mean()
    # A quantile of 4,000 draws is off by about 4% of the interval's half width.
    expected = np.quantile(drawn, [0.025, 0.975])
    assert np.allclose([low, high], expected, atol=0.15 * (expected[1] - expected[0]))
    assert paired_gain(before, after) == (gain, low, high)


def test_pairing_by_another_number_of_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="the same questions; got 2 and 3"):
        paired_gain([True, False], [True, False, True])


@pytest.mark.parametrize(("right", "count"), [(0, 10), (3, 10), (10, 10), (250, 500)])
def test_the_interval_of_a_share_holds_those_shares_that_the_score_test_keeps(right: int, count: int) -> None:
    low, high = wilson(right, count)
    for edge in {low, high} - {0.0, 1.0}:
        # At its edges the observed share lies 1.96 standard errors, under the edge itself, away.
        assert abs(right / count - edge) == pytest.approx(1.959964 * (edge * (1 - edge) / count) ** 0.5, rel=1e-5)
    assert low <= right / count <= high


def test_outcomes_survive_a_checkpoint() -> None:
    for outcomes in itertools.product([True, False], repeat=3):
        assert decode_outcomes(encode_outcomes(list(outcomes))) == list(outcomes)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.01, 0.2, "raised"), (-0.1, 0.2, "within noise"), (-0.3, -0.1, "lowered")]
)
def test_the_summary_calls_nothing_a_gain_that_is_within_noise(low: float, high: float, verdict: str) -> None:
    # trap M6
    metrics = {
        "before/accuracy": 0.5, "accuracy": 0.6, "n": 500, "accuracy_gain": 0.1, "accuracy_gain_low": low,
        "accuracy_gain_high": high, "probe/pass@1": 0.4, "probe/pass@16": 0.9, "probe/informative": 0.8, "groups": 10,
        "groups_all_zero": 1, "groups_all_one": 2, "groups_filtered": 3,
    }  # fmt: skip
    first, probe, _ = summary_of(metrics)
    assert first.endswith(verdict)
    assert "n = 500" in first
    assert "pass@1 0.400  pass@16 0.900" in probe
