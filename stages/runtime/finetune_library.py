"""Dealings with transformers, accelerate and TRL: their arguments, their noise, and the traces that they leave."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers

from stages.base import StageContext
from stages.runtime.finetune_trainer import accumulation

NOISY = ("accelerate", "datasets", "deepspeed", "DeepSpeed", "transformers", "trl")


def training_arguments(config: Any, context: StageContext, engine_config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that every TRL config takes: numbers of the stage, and all that the library must leave to us.

    ``bf16`` stays off whatever the precision: the library would cast every parameter (TRAPS K7), while the engine's
    autocast keeps them.
    """
    has_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(context.work / "trainer"),
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation(config),
        "learning_rate": config.lr,
        "max_grad_norm": config.max_grad_norm,
        "bf16": False,
        _recomputation_field(): config.activation_checkpointing,
        "deepspeed": dict(engine_config),
        "seed": context.seed % 2**32,
        "use_cpu": not has_gpu,
        "dataloader_pin_memory": has_gpu,
        "ignore_data_skip": True,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


def _recomputation_field() -> str:
    """transformers renamed the argument within the versions that we support."""
    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


@contextlib.contextmanager
def borrowed_libraries() -> Iterator[None]:
    """Keep the libraries quiet inside, and afterwards clear what they keep for the process's life.

    accelerate and transformers hold device, ranks and engine config in globals and in the environment: a next run in
    the same process would be built with them.
    """
    import datasets

    environment = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    levels = {name: logging.getLogger(name).level for name in NOISY}
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        _forget(environment)


def _forget(environment: Mapping[str, str]) -> None:
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]
