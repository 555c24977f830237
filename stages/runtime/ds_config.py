"""Engine facts from ``ds_configs/`` and what a stage adds to them, as numbers. No torch and no DeepSpeed here.

A file in ``ds_configs`` says how an engine shards; batch sizes, clipping, precision and schedule belong to the stage,
which injects them. Keys are checked against what this project knows to work, since DeepSpeed ignores unknown ones.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.base import ConfigError, Fault

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

STAGE_OWNED = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size and micro_batch_size",
    "gradient_clipping": "max_grad_norm",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "communication_data_type": "precision",
    "optimizer": "lr, weight_decay, betas and eps",
    "scheduler": "schedule",
    "steps_per_print": "log_every_steps",
    "prescale_gradients": "nothing: the loss is already divided by the step's tokens",
    "gradient_predivide_factor": "nothing: the loss is already divided by the step's tokens",
    "zero_allow_untested_optimizer": "nothing: the stage brings its own optimizer",
    "zero_force_ds_cpu_optimizer": "nothing: the stage brings its own optimizer",
    "activation_checkpointing": "activation_checkpointing",
    "compile": "compile",
    "wandb": "the recipe's tracking section",
    "tensorboard": "the recipe's tracking section",
    "csv_monitor": "the recipe's tracking section",
    "comet": "the recipe's tracking section",
}
"""Keys of a DeepSpeed config that belong to a stage, and the field to set instead."""

ENGINE_KEYS = {"zero_optimization", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler"}

ZERO_KEYS = {
    "stage", "contiguous_gradients", "overlap_comm", "reduce_scatter", "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce", "round_robin_gradients", "sub_group_size", "memory_efficient_linear",
    "offload_param", "offload_optimizer", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
}  # fmt: skip

UNREAD_BY_ZERO1 = ("contiguous_gradients", "reduce_scatter")
"""What ZeRO-1 without off-loading has no use for: its gradients are reduced where they are (``zero_one``)."""


def engine_facts(name: str, directory: Path = DS_CONFIGS) -> dict[str, Any]:
    """The facts of ``directory/name.json``, checked.

    Raises:
        ConfigError: every fault, at path ``deepspeed``: no such file, a stage-owned or unknown key, "auto".
    """
    names = sorted(path.stem for path in directory.glob("*.json"))
    if name not in names:
        must = f"must name a file of ds_configs, one of {', '.join(names)}; got {name!r}"
        raise _error([f"{must}; set {_meant(name, names)}"])
    try:
        facts = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise _error([f"ds_configs/{name}.json must be JSON; got {error}; correct the file"]) from error
    if faults := _key_faults(name, facts):
        raise _error(faults)
    return facts


def _meant(name: str, names: list[str]) -> str:
    """The file that a wrong name may mean: the same ZeRO stage however written, else nearly the same letters."""
    if "offload" in name.lower():
        alike = [known for known in names if "offload" in known]
    else:
        alike = [known for known in names if known[-1:] in [letter for letter in name if letter.isdigit()]]
    return (alike or difflib.get_close_matches(name, names, n=1, cutoff=0.9) or ["zero1"])[0]


def zero_stage(facts: Mapping[str, Any]) -> int:
    """The ZeRO stage, 0 to 3, of checked facts."""
    return int(facts["zero_optimization"]["stage"])


def offloads(facts: Mapping[str, Any]) -> bool:
    """Whether weights or optimizer state live on the host."""
    zero = facts["zero_optimization"]
    return any(zero.get(key, {}).get("device", "none") != "none" for key in ("offload_param", "offload_optimizer"))


def combination_faults(
    facts: Mapping[str, Any], *, name: str, compile_model: bool, has_gpu: bool | None
) -> list[Fault]:
    """Combinations that the dependencies break, each with the way out; ``has_gpu`` None leaves devices out of it."""
    faults = []
    if has_gpu is False and offloads(facts):
        faults.append(
            Fault(
                "deepspeed", f"off-loading needs a GPU to off-load from; this machine has none; got {name}; set zero3"
            )
        )
    if compile_model and zero_stage(facts) == 3:
        message = f"must be false under ZeRO-3, whose gathers cannot be traced; got {name}; set deepspeed to zero2"
        faults.append(Fault("compile", message))
    return faults


def fitting_micro_batch_size(*, global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """The largest size up to ``micro_batch_size`` that divides the rows of a rank.

    ``micro_batch_size`` itself where the ranks do not divide ``global_batch_size``: that is refused elsewhere.
    """
    rows, rest = divmod(global_batch_size, world_size)
    if rest:
        return micro_batch_size
    return next(size for size in range(min(micro_batch_size, rows), 0, -1) if rows % size == 0)


def accumulation_steps(*, global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-steps per optimizer step on each rank.

    Raises:
        ConfigError: when the rows do not divide, naming a value that does.
    """
    if global_batch_size % world_size:
        message = (
            f"must be a multiple of the {world_size} ranks; got {global_batch_size}; set one, or start fewer ranks"
        )
        raise ConfigError(Fault("global_batch_size", message))
    fitting = fitting_micro_batch_size(
        global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size
    )
    rows = global_batch_size // world_size
    if rows % micro_batch_size:
        raise ConfigError(
            Fault(
                "micro_batch_size",
                f"must divide the {rows} sequences of a rank (global_batch_size {global_batch_size} over {world_size} "
                f"ranks); got {micro_batch_size}; set {fitting}",
            )
        )
    return rows // micro_batch_size


def engine_config(
    facts: Mapping[str, Any],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    max_grad_norm: float,
    precision: str,
) -> dict[str, Any]:
    """DeepSpeed's config: the facts and the stage's numbers.

    bf16, and with it fp8, is torch's autocast, which keeps every parameter and the optimizer fp32; ``bf16.enabled``
    would cast A_log, D and dt_bias too (TRAPS K7). No module is listed as safe for bf16 communication, so gradients are
    reduced, and ZeRO-3 gathers weights, in fp32: otherwise biases in linear layers would be rounded on the way.
    """
    steps = accumulation_steps(
        global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size
    )
    config: dict[str, Any] = {
        **facts,
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": max_grad_norm,
        "zero_force_ds_cpu_optimizer": False,
    }
    if world_size == 1:
        # There is nothing to overlap, and the buffers for it would only be filled.
        config["zero_optimization"] = {**facts["zero_optimization"], "overlap_comm": False}
    if precision != "fp32":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def _key_faults(name: str, facts: Any) -> list[str]:
    file = f"ds_configs/{name}.json"
    zero = facts.get("zero_optimization") if isinstance(facts, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        return [f"{file} must hold zero_optimization.stage 0, 1, 2 or 3; correct the file"]
    faults = [
        f"{file} must hold engine facts only; got {key}, which the stage owns; remove it and set {STAGE_OWNED[key]}"
        for key in facts
        if key in STAGE_OWNED
    ]
    faults += [_unknown(file, key, ENGINE_KEYS) for key in facts if key not in STAGE_OWNED and key not in ENGINE_KEYS]
    faults += [_unknown(file, f"zero_optimization.{key}", ZERO_KEYS) for key in zero if key not in ZERO_KEYS]
    if zero["stage"] == 1 and not offloads(facts):
        faults += [
            f"{file} must hold what ZeRO-1 reads; got zero_optimization.{key}, which it does not; remove it"
            for key in UNREAD_BY_ZERO1
            if key in zero
        ]
    faults += [f"{file} must hold plain values; got auto for {key}; write the value" for key in _autos(facts)]
    return faults + _value_faults(file, zero)


def _value_faults(file: str, zero: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed would end on, or take for something else, long after the start."""
    faults = []
    for key in ("overlap_comm", "use_multi_rank_bucket_allreduce", "contiguous_gradients"):
        if not isinstance(zero.get(key, True), bool) and zero[key] != "auto":
            faults.append(f"{file}: zero_optimization.{key} must be true or false; got {zero[key]!r}; set true")
    size = zero.get("reduce_bucket_size", 1)
    if size != "auto" and not (type(size) in (int, float) and size >= 1 and size == int(size)):
        must = "must be a whole number of elements, 1 or more"
        faults.append(f"{file}: zero_optimization.reduce_bucket_size {must}; got {size!r}; set 500000000")
    return faults


def _unknown(file: str, key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0)[0]
    return f"{file} holds the unknown key {key}, which would be ignored; did you mean {near}? One of {sorted(known)}"


def _autos(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _autos(item, f"{path}.{key}".lstrip("."))]
    return [path] if value == "auto" else []


def _error(messages: list[str]) -> ConfigError:
    return ConfigError([Fault("deepspeed", message) for message in messages])
