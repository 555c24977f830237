"""What a training config must satisfy before launch, and what the run will cost. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from model.spec import ModelSpec
from stages.base import ConfigError, Fault
from stages.runtime import ds_config, fp8_limits, mixture_settings, optimizer_config
from stages.runtime.schedule import decay_start


def faults(config: Any, model: ModelSpec | None) -> list[Fault]:
    """Every fault between fields of a pretraining config, and between them and the model; none needs a device."""
    found = training_faults(config, model, "seq_len")
    found += mixture_settings.phase_faults(config)
    found += fp8_limits.fp8_model_faults(config.precision, model, config.seq_len)
    if config.residual == "bf16" and config.precision == "fp32":
        message = "must be fp32 where precision is fp32; got bf16; set precision to bf16, or residual to fp32"
        found.append(Fault("residual", message))
    if config.rewarm and config.from_ is None:
        found.append(Fault("rewarm", "means something with `from` only; got true and no `from`; remove it"))
    return found


def training_faults(config: Any, model: ModelSpec | None, length: str) -> list[Fault]:
    """Faults of the fields that every training stage has; ``length`` names the one with the longest sequence."""
    found = schedule_faults(config)
    longest = getattr(config, length)
    if model is not None and longest > model.max_seq_len:
        message = f"must be at most model.max_seq_len {model.max_seq_len}; got {longest}; set one or the other"
        found.append(Fault(length, message))
    return found + _engine_faults(config)


def device_faults(config: Any, world_size: int | None, has_gpu: bool | None) -> list[Fault]:
    """What of a training config does not fit ``world_size`` ranks, or a machine without GPUs; None asks neither."""
    facts = ds_config.engine_facts(config.deepspeed)
    found = ds_config.combination_faults(facts, name=config.deepspeed, compile_model=_compiles(config), has_gpu=has_gpu)
    found += fp8_limits.fp8_machine_faults(config.precision, has_gpu)
    if world_size is None:
        return found
    if config.global_batch_size % world_size:
        message = f"must be a multiple of the {world_size} ranks; got {config.global_batch_size}"
        found.append(Fault("global_batch_size", f"{message}; set one, or start fewer ranks"))
    return found


def fitted(config: Any, world_size: int) -> Any:
    """``config`` with the largest ``micro_batch_size``, up to the one asked for, that divides the rows of a rank.

    At a fixed ``global_batch_size`` it bounds memory and never changes the result.
    """
    size = ds_config.fitting_micro_batch_size(
        global_batch_size=config.global_batch_size, micro_batch_size=config.micro_batch_size, world_size=world_size
    )
    return config if size == config.micro_batch_size else config.model_copy(update={"micro_batch_size": size})


def plan(
    config: Any, model: ModelSpec | None, world_size: int, *, length: int, tokens_per_step: int | None = None
) -> dict[str, Any]:
    """Tokens (at most), exact parameters, FLOPs, peak bytes of a device, and bytes on disk.

    ``length`` is that of the longest sequence in tokens; ``tokens_per_step`` is ``global_batch_size * length`` where it
    is not given.
    """
    from model import cost

    assert model is not None, "check() refuses a recipe without a model"
    facts = ds_config.engine_facts(config.deepspeed)
    stage = ds_config.zero_stage(facts)
    tokens = config.max_steps * (tokens_per_step or config.global_batch_size * length)
    path = cost.Path(kernels=_compiles(config) and config.precision != "fp32", residual=_residual(config))
    memory = cost.memory_per_gpu(
        model,
        zero_stage=stage,
        world_size=world_size,
        micro_batch_size=config.micro_batch_size,
        seq_len=length,
        precision=config.precision,
        offload=ds_config.offloads(facts),
        activation_checkpointing=config.activation_checkpointing,
        optimizer=config.optimizer.kind,
        path=path,
        accumulation_steps=-(-config.global_batch_size // (world_size * config.micro_batch_size)),
    )
    checkpoint = cost.checkpoint_bytes(model, zero_stage=stage, optimizer=config.optimizer.kind)
    # The one being written stands beside those kept; a pinned one stays.
    kept = config.keep_checkpoints + 1 + (pin_step(config) is not None)
    return {
        "tokens": tokens,
        "parameters": cost.count_parameters(model).total,
        "training_flops": tokens * cost.training_flops_per_token(model, length),
        "memory_per_gpu_bytes": memory.total_bytes,
        "memory_assumes": str(path),
        "checkpoint_bytes": checkpoint,
        "disk_bytes": kept * checkpoint + cost.weights_file_bytes(model),
    }


def pin_step(config: Any) -> int | None:
    """The step whose checkpoint is kept for extensions: the last one before a WSD decay."""
    return decay_start(config.schedule, config.max_steps) if config.schedule.kind == "wsd" else None


def schedule_faults(config: Any) -> list[Fault]:
    """Warm-up and decay that do not fit into ``max_steps``."""
    schedule, steps = config.schedule, config.max_steps
    if schedule.warmup_steps >= steps:
        message = f"must be below max_steps {steps}; got {schedule.warmup_steps}; set fewer, or more max_steps"
        found = [Fault("schedule.warmup_steps", message)]
        if schedule.kind == "wsd" and schedule.decay_steps > steps:
            # Told at once: no warm-up, however short, leaves room for this decay.
            message = (
                f"must fit into max_steps {steps} together with warmup_steps; got {schedule.decay_steps}; "
                f"set both to {steps} in all, or more max_steps"
            )
            found.append(Fault("schedule.decay_steps", message))
        return found
    if schedule.kind == "wsd" and schedule.warmup_steps + schedule.decay_steps > steps:
        message = (
            f"must leave room for the {schedule.warmup_steps} warm-up steps within max_steps {steps}; "
            f"got {schedule.decay_steps}; set {steps - schedule.warmup_steps} or less"
        )
        return [Fault("schedule.decay_steps", message)]
    return []


def _engine_faults(config: Any) -> list[Fault]:
    try:
        facts = ds_config.engine_facts(config.deepspeed)
    except ConfigError as error:
        return error.faults
    found = ds_config.combination_faults(facts, name=config.deepspeed, compile_model=_compiles(config), has_gpu=None)
    return found + optimizer_config.engine_faults(config.optimizer, facts, config.deepspeed)


def _compiles(config: Any) -> bool:
    """Whether the stage compiles its model; fine-tuning never does."""
    return getattr(config, "compile", False)


def _residual(config: Any) -> Literal["fp32", "bf16"]:
    """The residual stream's dtype; fine-tuning leaves it as autocast has it."""
    return "bf16" if getattr(config, "residual", "fp32") == "bf16" else "fp32"
