"""Fine-tuning configs: what is refused before anything is loaded, and the order in which rows are seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import finetune_cases as cases
import pytest
from tiny_run import spec

SFT = cases.CASES["sft"]


def faults(**changes):
    stage = SFT.stage_class()
    return {fault.path: fault.message for fault in stage.check(cases.config(SFT, **changes), spec())}


def test_the_tiny_config_has_no_fault():
    assert faults() == {}


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"max_length": 65}, "max_length", "at most model.max_seq_len 64; got 65"),
        ({"deepspeed": "zero9"}, "deepspeed", "got 'zero9'"),
        ({"schedule": {"kind": "cosine", "warmup_steps": 4}}, "schedule.warmup_steps", "below max_steps 4; got 4"),
        ({"schedule": {"kind": "wsd", "decay_steps": 5}}, "schedule.decay_steps", "got 5; set 4 or less"),
    ],
)
def test_faults_are_named_with_field_and_way_out(changes, path, message):
    import re

    assert re.search(message, faults(**changes)[path])


def test_a_warm_up_and_a_decay_that_each_exceed_the_steps_are_told_at_once():
    found = faults(schedule={"kind": "wsd", "warmup_steps": 16, "decay_steps": 70})
    assert set(found) == {"schedule.warmup_steps", "schedule.decay_steps"}
    assert "below max_steps 4; got 16" in found["schedule.warmup_steps"]
    assert "max_steps 4 together with warmup_steps; got 70; set both to 4 in all" in found["schedule.decay_steps"]
    # A decay that a shorter warm-up leaves room for is no fault.
    assert set(faults(schedule={"kind": "wsd", "warmup_steps": 16, "decay_steps": 3})) == {"schedule.warmup_steps"}


def test_several_faults_come_together():
    assert set(faults(max_length=65, schedule={"kind": "cosine", "warmup_steps": 4}, deepspeed="zero9")) == {
        "max_length", "schedule.warmup_steps", "deepspeed",
    }  # fmt: skip


def test_ranks_that_do_not_divide_the_batch_are_refused():
    stage, config = SFT.stage_class(), cases.config(SFT)
    assert stage.check_devices(config, 2, False) == []
    (fault,) = stage.check_devices(config, 3, False)
    assert (fault.path, "multiple of the 3 ranks; got 4" in fault.message) == ("global_batch_size", True)
    (fault,) = stage.check_devices(cases.config(SFT, deepspeed="zero3_cpu_offload"), None, False)
    assert "needs a GPU" in fault.message


def parent(tmp_path: Path, final_lr: float) -> Path:
    import json

    from stages.runtime.artifact import write_record

    output = tmp_path / "output"
    output.mkdir()
    (output / "config.json").write_text(json.dumps({**spec().model_dump(mode="json"), "model_type": "x"}))
    write_record(tmp_path, {"format": 1, "state": "done", "metrics": {"final_lr": final_lr}})
    return tmp_path


def test_a_rate_above_the_parents_last_is_refused_unless_rewarmed(tmp_path):  # trap T1
    stage, parents = SFT.stage_class(), {"from_": parent(tmp_path, 1e-3)}
    (fault,) = stage.check_parents(cases.config(SFT, lr=2e-3), spec(), parents)
    assert fault.path == "lr"
    assert "at most the parent's final lr 0.001 on a warm start; got 0.002" in fault.message
    assert stage.check_parents(cases.config(SFT, lr=1e-3), spec(), parents) == []
    assert stage.check_parents(cases.config(SFT, lr=2e-3, rewarm=True), spec(), parents) == []


def test_another_model_than_the_parents_is_refused(tmp_path):
    stage, parents = SFT.stage_class(), {"from_": parent(tmp_path, 1e-2)}
    (fault,) = stage.check_parents(cases.config(SFT), spec(d_ff=64), parents)
    assert "model.d_ff must be the parent's 48; got 64" in fault.message


def test_fields_that_only_say_how_to_run_stay_out_of_the_key():
    stage = SFT.stage_class()
    key = stage.key_config(cases.config(SFT))
    for changes in (
        {"micro_batch_size": 1}, {"deepspeed": "zero3"}, {"activation_checkpointing": True}, {"eval_every_steps": 1},
        {"checkpoint_every_steps": 1}, {"log_every_steps": 7}, {"rewarm": True}, {"min_stop_probability": 0.7},
    ):  # fmt: skip
        assert stage.key_config(cases.config(SFT, **changes)) == key
    for changes in ({"lr": 1e-4}, {"over_length": "truncate"}, {"max_length": 32}, {"precision": "bf16"}):
        assert stage.key_config(cases.config(SFT, **changes)) != key


def test_the_plan_counts_tokens_parameters_and_bytes():
    figures = SFT.stage_class().plan(cases.config(SFT), spec(), 1)
    assert figures["tokens"] == 4 * 4 * 64
    assert figures["disk_bytes"] > 3 * figures["checkpoint_bytes"]


def test_the_stages_are_imported_without_torch():
    code = "import stages, sys; print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"


def test_rows_come_in_permutations_and_a_resumed_run_sees_the_same_ones():  # trap T6
    from stages.runtime.finetune_trainer import RowOrder

    whole = list(RowOrder(7, rows=20, seed=3))
    assert len(whole) == len(RowOrder(7, rows=20, seed=3)) == 20
    assert [sorted(whole[start : start + 7]) for start in (0, 7)] == [list(range(7))] * 2
    assert whole[:7] != whole[7:14]
    assert whole != list(RowOrder(7, rows=20, seed=4))
    for first in (0, 5, 7, 12, 20):
        assert list(RowOrder(7, rows=20, seed=3, first=lambda first=first: first)) == whole[first:]
