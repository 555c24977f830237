"""Model, optimizer and engine of a pretraining run, as its config describes them; a warm-up builds the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model import init
from model.block import compile_parts
from model.config import HybridConfig
from model.fp8 import convert_to_fp8
from model.lm import HybridForCausalLM, model_backends
from model.spec import ModelSpec
from stages.base import ConfigError, Fault
from stages.runtime import distributed, ds_config
from stages.runtime.checkpoint import load_weights
from stages.runtime.engine import TrainingEngine
from stages.runtime.fp8_limits import fp8_device_faults
from stages.runtime.optimizer import embedding_parameters, make_optimizer


def checked_engine_config(config: Any) -> dict[str, Any]:
    """DeepSpeed's config for this many ranks.

    Raises:
        ConfigError: for what the devices, or the ranks, do not fit.
    """
    facts, has_gpu = ds_config.engine_facts(config.deepspeed), torch.cuda.is_available()
    faults = ds_config.combination_faults(
        facts, name=config.deepspeed, compile_model=config.compile, has_gpu=has_gpu
    ) + fp8_device_faults(config.precision, torch.cuda.get_device_capability() if has_gpu else None)
    if faults:
        raise ConfigError(faults)
    return ds_config.engine_config(
        facts,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        world_size=distributed.world_size(),
        max_grad_norm=config.max_grad_norm,
        precision=config.precision,
    )


def build_engine(
    config: Any,
    spec: ModelSpec,
    engine_config: dict[str, Any],
    *,
    eos_id: int,
    pad_id: int,
    weights: Path | None = None,
    digest: str | None = None,
) -> tuple[HybridForCausalLM, TrainingEngine]:
    """The model (weights of the folder ``weights``, sealed as ``digest``) and its engine, proven in precision."""
    model = HybridForCausalLM(HybridConfig.from_spec(spec, eos_token_id=eos_id, pad_token_id=pad_id)).float()
    if weights is not None:
        load_weights(weights, model, digest)
    prepare_model(model, config)
    # Names are taken before the engine: ZeRO-3 flattens what it partitions.
    islands, kept = init.fp32_islands(model), undecayed(model, config.decay_embeddings)
    if config.compile:
        compile_parts(model)
    optimizer = make_optimizer(model, config, decay_embeddings=config.decay_embeddings, exempt=init.no_decay)
    engine = TrainingEngine(model, optimizer, engine_config)
    engine.assert_precision(islands, kept)
    return model, engine


def backend_lines(model: HybridForCausalLM, precision: str) -> list[str]:
    """What computes each layer, one line a layer.

    Raises:
        ConfigError: where a backend was asked for by name and is not there.
    """
    try:
        return model_backends(model, torch.float32 if precision == "fp32" else torch.bfloat16)
    except ValueError as error:
        raise ConfigError([Fault("model.mixers", str(error))]) from error


def prepare_model(model: HybridForCausalLM, config: Any) -> None:
    """Set how ``model`` computes and what it keeps, from ``config``; names of parameters stay."""
    if config.activation_checkpointing:
        # transformers renamed the method within the versions that we support.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if config.residual == "bf16":
        model.model.residual_dtype = torch.bfloat16
    if config.precision == "fp8":
        convert_to_fp8(model)


def undecayed(model: HybridForCausalLM, decay_embeddings: bool) -> set[str]:
    """Names of the parameters that weight decay must leave alone."""
    embeddings = {id(weight) for weight in embedding_parameters(model)}
    return {
        name
        for name, parameter in model.named_parameters()
        if (not decay_embeddings if id(parameter) in embeddings else init.no_decay(name, parameter))
    }
