"""What a training config must satisfy before launch, and what the run will cost. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from model.spec import ModelSpec
from stages.base import ConfigError, Fault
from stages.runtime import ds_config
from stages.runtime.schedule import decay_start


def faults(config: Any, model: ModelSpec | None) -> list[Fault]:
    """Every fault between fields of a training config, and between them and the model; none needs a device."""
    found = _schedule_faults(config)
    if model is None:
        found.append(Fault("kind", "needs the recipe's model section; got none; write one"))
    elif config.seq_len > model.max_seq_len:
        message = f"must be at most model.max_seq_len {model.max_seq_len}; got {config.seq_len}; set one or the other"
        found.append(Fault("seq_len", message))
    if config.global_batch_size % config.micro_batch_size:
        # What divides the rows of a rank divides those of all ranks, so no number of ranks could do.
        allowed = [size for size in range(1, config.global_batch_size + 1) if config.global_batch_size % size == 0]
        message = f"must divide global_batch_size {config.global_batch_size}; got {config.micro_batch_size}"
        found.append(Fault("micro_batch_size", f"{message}; set one of {allowed}"))
    for source, weight in (config.mixture or {}).items():
        if weight < 0:
            found.append(Fault(f"mixture.{source}", f"must be 0 or more; got {weight}; set its share of tokens"))
    if config.rewarm and config.from_ is None:
        found.append(Fault("rewarm", "means something with `from` only; got true and no `from`; remove it"))
    return found + _engine_faults(config)


def device_faults(config: Any, world_size: int | None, has_gpu: bool | None) -> list[Fault]:
    """What of a training config does not fit ``world_size`` ranks, or a machine without GPUs; None asks neither."""
    facts = ds_config.engine_facts(config.deepspeed)
    found = ds_config.combination_faults(facts, name=config.deepspeed, compile_model=config.compile, has_gpu=has_gpu)
    if world_size is None:
        return found
    try:
        ds_config.accumulation_steps(
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            world_size=world_size,
        )
    except ConfigError as error:
        found += error.faults
    return found


def mixture_faults(mixture: Mapping[str, float] | None, sources: Sequence[str]) -> list[Fault]:
    """Weights of sources that are not there, and sources that have no weight."""
    if mixture is None:
        return []
    found = []
    for name in mixture:
        if name not in sources:
            near = difflib.get_close_matches(name, sources, n=1, cutoff=0)[0]
            message = f"must name one of the data's sources {', '.join(sources)}; did you mean {near}?"
            found.append(Fault(f"mixture.{name}", message))
    for name in sources:
        if name not in mixture:
            message = "must give every source its weight; got none; set it, 0 leaves it out"
            found.append(Fault(f"mixture.{name}", message))
    return found


def plan(config: Any, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
    """Tokens, exact parameters, FLOPs, peak bytes of a device, and bytes on disk."""
    from model import cost

    assert model is not None, "check() refuses a recipe without a model"
    facts = ds_config.engine_facts(config.deepspeed)
    stage, offload = ds_config.zero_stage(facts), ds_config.offloads(facts)
    tokens = config.max_steps * config.global_batch_size * config.seq_len
    memory = cost.memory_per_gpu(
        model,
        zero_stage=stage,
        world_size=world_size,
        micro_batch_size=config.micro_batch_size,
        seq_len=config.seq_len,
        precision=config.precision,
        offload=offload,
        activation_checkpointing=config.activation_checkpointing,
    )
    checkpoint = cost.checkpoint_bytes(model, zero_stage=stage)
    # The one being written stands beside those kept; a pinned one stays.
    kept = config.keep_checkpoints + 1 + (pin_step(config) is not None)
    return {
        "tokens": tokens,
        "parameters": cost.count_parameters(model).total,
        "training_flops": tokens * cost.training_flops_per_token(model, config.seq_len),
        "memory_per_gpu_bytes": memory.total_bytes,
        "checkpoint_bytes": checkpoint,
        "disk_bytes": kept * checkpoint + cost.weights_file_bytes(model),
    }


def pin_step(config: Any) -> int | None:
    """The step whose checkpoint is kept for extensions: the last one before a WSD decay."""
    return decay_start(config.schedule, config.max_steps) if config.schedule.kind == "wsd" else None


def _schedule_faults(config: Any) -> list[Fault]:
    schedule, steps = config.schedule, config.max_steps
    found = []
    if schedule.warmup_steps >= steps:
        message = f"must be below max_steps {steps}; got {schedule.warmup_steps}; set fewer, or more max_steps"
        found.append(Fault("schedule.warmup_steps", message))
    elif schedule.kind == "wsd" and schedule.warmup_steps + schedule.decay_steps > steps:
        message = (
            f"must leave room for the {schedule.warmup_steps} warm-up steps within max_steps {steps}; "
            f"got {schedule.decay_steps}; set {steps - schedule.warmup_steps} or less"
        )
        found.append(Fault("schedule.decay_steps", message))
    return found


def _engine_faults(config: Any) -> list[Fault]:
    try:
        facts = ds_config.engine_facts(config.deepspeed)
    except ConfigError as error:
        return error.faults
    return ds_config.combination_faults(facts, name=config.deepspeed, compile_model=config.compile, has_gpu=None)
