"""Files in ds_configs hold engine facts only, and the stage adds the rest as numbers."""

from __future__ import annotations

import json

import pytest

from stages.base import ConfigError
from stages.runtime.ds_config import (
    DS_CONFIGS,
    STAGE_OWNED,
    accumulation_steps,
    combination_faults,
    engine_config,
    engine_facts,
    offloads,
    zero_stage,
)

SHIPPED = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
NUMBERS = {
    "global_batch_size": 16, "micro_batch_size": 2, "world_size": 4, "max_grad_norm": 0.5, "precision": "bf16",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def write(**facts):
        (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": 1}} | facts))
        return tmp_path

    return write


def test_the_shipped_files_are_the_ones_promised_and_all_pass():
    assert SHIPPED == ["zero0", "zero1", "zero2", "zero3", "zero3_cpu_offload"]
    assert [zero_stage(engine_facts(name)) for name in SHIPPED] == [0, 1, 2, 3, 3]
    assert [name for name in SHIPPED if offloads(engine_facts(name))] == ["zero3_cpu_offload"]


@pytest.mark.parametrize("key", sorted(STAGE_OWNED))
def test_a_stage_owned_key_is_refused_by_name(folder, key):
    with pytest.raises(ConfigError, match=rf"deepspeed: .*got {key}, which the stage owns; remove it and set"):
        engine_facts("mine", folder(**{key: 1}))


def test_every_fault_of_a_file_is_named_at_once(folder):  # trap T7
    zero = {"stage": 2, "overlap_com": True, "reduce_bucket_size": "auto"}
    with pytest.raises(ConfigError) as caught:
        engine_facts("mine", folder(zero_optimization=zero, bf16={"enabled": True}, zero_optimisation={}))
    text = str(caught.value)
    assert len(caught.value.faults) == 4
    assert "overlap_com, which would be ignored; did you mean overlap_comm?" in text
    assert "zero_optimisation, which would be ignored; did you mean zero_optimization?" in text
    assert "got auto for zero_optimization.reduce_bucket_size" in text
    assert "set precision" in text


@pytest.mark.parametrize("key", ["contiguous_gradients", "reduce_scatter"])
def test_what_zero1_does_not_read_is_refused_unless_it_is_offloaded(folder, key):
    with pytest.raises(ConfigError, match=rf"must hold what ZeRO-1 reads; got zero_optimization\.{key}.*remove it"):
        engine_facts("mine", folder(zero_optimization={"stage": 1, key: True}))
    for zero in ({"stage": 2}, {"stage": 1, "offload_optimizer": {"device": "cpu"}}):
        assert zero_stage(engine_facts("mine", folder(zero_optimization=zero | {key: True}))) == zero["stage"]


def test_a_key_of_gathers_that_nothing_reads_is_refused(folder):
    with pytest.raises(ConfigError, match="allgather_bucket_size, which would be ignored"):
        engine_facts("mine", folder(zero_optimization={"stage": 2, "allgather_bucket_size": 5}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("reduce_bucket_size", "x"), ("reduce_bucket_size", 0), ("reduce_bucket_size", 1.5), ("overlap_comm", 3)],
)
def test_a_value_that_the_engine_would_end_on_is_refused_before(folder, key, value):
    with pytest.raises(ConfigError, match=rf"zero_optimization\.{key} must be .*got {value!r}; set"):
        engine_facts("mine", folder(zero_optimization={"stage": 1, key: value}))
    fine = {"stage": 1, "reduce_bucket_size": 5e8, "overlap_comm": False}
    assert engine_facts("mine", folder(zero_optimization=fine))["zero_optimization"] == fine


@pytest.mark.parametrize("zero", [{"stage": 4}, {}, 1])
def test_a_file_without_a_zero_stage_is_refused(folder, zero):
    with pytest.raises(ConfigError, match=r"must hold zero_optimization\.stage 0, 1, 2 or 3"):
        engine_facts("mine", folder(zero_optimization=zero))


def test_an_unknown_name_is_refused_with_the_nearest_one(tmp_path):
    with pytest.raises(ConfigError, match="got 'zero_3'; set zero3"):
        engine_facts("zero_3")
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ConfigError, match="must be JSON"):
        engine_facts("mine", tmp_path)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_stage_injects_numbers_and_deepspeed_takes_them(name):
    import torch.distributed
    from deepspeed.runtime.config import DeepSpeedConfig

    config = engine_config(engine_facts(name), **NUMBERS)
    assert '"auto"' not in json.dumps(config)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (16, 2)
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (2, 0.5)
    if not torch.distributed.is_initialized():
        # On one rank the same rows are twice as many micro-steps for each rank taken away.
        alone = engine_config(engine_facts(name), **(NUMBERS | {"world_size": 1}))
        assert DeepSpeedConfig(alone).gradient_accumulation_steps == 8


def test_one_rank_has_nothing_to_overlap():
    facts = {"zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 5}}
    assert engine_config(facts, **NUMBERS)["zero_optimization"]["overlap_comm"] is True
    alone = engine_config(facts, **(NUMBERS | {"world_size": 1}))["zero_optimization"]
    assert alone == {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 5}
    assert facts["zero_optimization"]["overlap_comm"] is True


def test_bf16_is_autocast_and_never_a_cast_of_parameters():  # trap K7
    config = engine_config(engine_facts("zero1"), **NUMBERS)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert "bf16" not in config
    assert "torch_autocast" not in engine_config(engine_facts("zero1"), **(NUMBERS | {"precision": "fp32"}))


def test_rows_that_do_not_divide_name_what_does():
    assert accumulation_steps(global_batch_size=12, micro_batch_size=3, world_size=2) == 2
    with pytest.raises(ConfigError, match=r"micro_batch_size: must divide the 6 sequences.*got 4; set 3"):
        accumulation_steps(global_batch_size=12, micro_batch_size=4, world_size=2)


def test_combinations_that_break_are_refused_with_the_way_out():
    offload, zero3 = engine_facts("zero3_cpu_offload"), engine_facts("zero3")
    (fault,) = combination_faults(offload, name="zero3_cpu_offload", compile_model=False, has_gpu=False)
    assert "needs a GPU" in fault.message
    assert "set zero3" in fault.message
    assert combination_faults(offload, name="zero3_cpu_offload", compile_model=False, has_gpu=True) == []
    (fault,) = combination_faults(zero3, name="zero3", compile_model=True, has_gpu=None)
    assert fault.path == "compile"
