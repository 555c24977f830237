"""A stage that runs out of memory says in one line what was planned, what was measured, and what would fit."""

from __future__ import annotations

import pytest
import torch
from fake_chain import Train, records
from tiny_run import config, spec

from stages.pretrain import Pretrain
from stages.runtime import out_of_memory
from stages.runtime.engine import TrainingEngine
from stages.runtime.out_of_memory import HEADROOM, explained, is_out_of_memory

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def planned(**changes) -> int:
    return Pretrain.plan(config(**changes), spec(), 1)["memory_per_gpu_bytes"]


def said(monkeypatch: pytest.MonkeyPatch, total: float, **changes) -> str:
    monkeypatch.setattr(out_of_memory, "_measured", lambda: ("1.0 GiB allocated at most", int(total)))
    return str(explained(FULL, Pretrain(), config(**changes), spec(), 1))


def test_the_line_has_plan_measurement_and_the_largest_micro_batch_that_fits(monkeypatch):
    sizes = {size: planned(global_batch_size=12, micro_batch_size=size) for size in (1, 2, 3, 4, 6)}
    assert sizes[1] < sizes[2] < sizes[3] < sizes[4] < sizes[6]
    line = said(monkeypatch, (sizes[3] + 1) / HEADROOM + 2, global_batch_size=12, micro_batch_size=6)
    assert line.startswith("out of memory at micro_batch_size 6; the plan foresaw ")
    assert f"{sizes[6] / 2**30:.1f} GiB; measured: 1.0 GiB allocated at most; set micro_batch_size to 3, which" in line
    assert "\n" not in line


def test_where_nothing_smaller_fits_other_ways_are_named(monkeypatch):
    assert "no micro_batch_size fits: set activation_checkpointing" in said(monkeypatch, 1, micro_batch_size=4)
    assert "micro_batch_size is 1 already: set activation_" in said(monkeypatch, 1, micro_batch_size=1)


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (FULL, True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_failures(error, known):
    assert is_out_of_memory(error) is known
    assert (explained(error, Pretrain(), config(), spec(), 1) is error) is not known


def test_the_lifecycle_ends_with_the_line_and_exit_code_1(cli, tmp_path, capsys, monkeypatch):
    def full(self, context):
        raise FULL

    monkeypatch.setattr(Train, "run", full)
    assert cli("--stage", "train", "--set", "train.micro_batch_size=2") == 1
    captured = capsys.readouterr().err
    assert "train failed: out of memory at micro_batch_size 2; measured: " in captured
    assert "Traceback" not in captured
    record = records(tmp_path)["train"]
    assert (record["state"], record["exit_code"]) == ("failed", 1)
    assert record["error"].startswith("out of memory at micro_batch_size 2; measured: ")


def test_a_training_step_lets_the_error_through_to_the_lifecycle(tmp_path, monkeypatch):
    from tiny_run import context, make_tokens

    def full(*_):
        raise FULL

    monkeypatch.setattr(TrainingEngine, "accumulate", full)
    at = context(tmp_path / "run", make_tokens(tmp_path / "tokens"))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        Pretrain().run(at)
    assert "set micro_batch_size to 1, which would fit" in str(
        explained(caught.value, Pretrain(), at.config, at.model, 1)
    )
