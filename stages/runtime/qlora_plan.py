"""What QLoRA takes: a frozen base in four bits, and gradients, moments and checkpoints of the adapters alone."""

from __future__ import annotations

import math
from typing import Any

from model import cost
from model.activations import activation_bytes
from model.mixer_cost import MIXER_COSTS
from model.projections import projections
from model.spec import ModelSpec
from stages.runtime import ds_config, settings
from stages.runtime.qlora_config import AdapterConfig, QuantisationConfig, adapter_parameters, saved_names

FP32_BYTES = 4
ADAMW_BYTES = 8
MASTER_BYTES = 4
"""ZeRO-1/2 keep the fp32 values that are trained once more, beside their moments."""
_SCALES_PER_SCALE, _SCALE_LEVELS_BYTES, _LEVELS_BYTES = 256, 4 * 256, 4 * 16
"""Scales in eight bits share one in fp32 by so many; each matrix has code books, for those scales and for NF4."""


def plan(config: Any, spec: ModelSpec, world_size: int) -> dict[str, Any]:
    """The figures of ``settings.plan``, of adapters on a frozen base.

    ``training_flops``: the base's products forwards and by their inputs backwards, never by their weights; the
    adapters' all three ways. ``memory_per_gpu_bytes`` has the largest matrix dequantised, and every activation of the
    whole model's training, an upper bound by what the frozen weights' gradients would have read.
    """
    length, stage = config.max_length, ds_config.zero_stage(ds_config.engine_facts(config.deepspeed))
    trained = trained_parameters(spec, config.adapter)
    figures = settings.plan(config, spec, world_size, length=length)
    state = checkpoint_bytes(spec, config, stage)
    kept = config.keep_checkpoints + 1 + (settings.pin_step(config) is not None)
    base = base_bytes(spec, config.quantisation)
    flops = 2 * cost.forward_flops_per_token(spec, length) + 6 * trained
    memory = base + memory_of_trained(trained, stage, world_size)
    memory += max(d_in * d_out for d_in, d_out in projections(spec).values()) * FP32_BYTES
    memory += activation_bytes(
        spec, length, config.micro_batch_size, config.activation_checkpointing, config.precision
    )  # fmt: skip
    return figures | {
        "base_bytes": base,
        "training_flops": figures["tokens"] * flops,
        "memory_per_gpu_bytes": memory,
        "memory_assumes": f"the base in NF4, {figures['memory_assumes']}",
        "checkpoint_bytes": state,
        "disk_bytes": kept * state + cost.weights_file_bytes(spec) + FP32_BYTES * trained,
    }


def trained_parameters(spec: ModelSpec, adapter: AdapterConfig) -> int:
    """Parameters of A and B, DoRA's lengths, and the modules that are trained whole.

    A norm or convolution of a mixer counts as all that its mixer has beside projections.
    """
    whole = sum(_saved_parameters(spec, name) for name in saved_names(spec, adapter))
    return adapter_parameters(spec, adapter) + whole


def base_bytes(spec: ModelSpec, quantisation: QuantisationConfig) -> int:
    """The frozen base as it is held: half a byte a weight of the projections with their scales, the rest in fp32."""
    sizes = [d_in * d_out for d_in, d_out in projections(spec).values()]
    packed = sum(math.ceil(size / 2) + _statistics_bytes(size, quantisation) for size in sizes)
    return packed + FP32_BYTES * (cost.count_parameters(spec).total - sum(sizes))


def memory_of_trained(trained: int, zero_stage: int, world_size: int) -> int:
    """Weights, gradients and AdamW's state of what is trained, on one rank."""
    if zero_stage == 0:
        return trained * (2 * FP32_BYTES + ADAMW_BYTES)
    return trained * 2 * FP32_BYTES + math.ceil(trained * (MASTER_BYTES + ADAMW_BYTES) / world_size)


def checkpoint_bytes(spec: ModelSpec, config: Any, zero_stage: int) -> int:
    """Engine state on disk, all ranks together: what is trained with its moments, and what the engine adds of the base.

    It leaves frozen parameters out, but for the scales of the four-bit ones and for a tied embedding, which it knows by
    its other name.
    """
    trained = trained_parameters(spec, config.adapter)
    scales = sum(_statistics_bytes(d_in * d_out, config.quantisation) for d_in, d_out in projections(spec).values())
    tied = FP32_BYTES * spec.vocab_size * spec.d_model if spec.tie_embeddings else 0
    state = trained * (ADAMW_BYTES + (MASTER_BYTES if zero_stage else 0))
    return FP32_BYTES * trained + state + scales + tied


def _statistics_bytes(size: int, quantisation: QuantisationConfig) -> int:
    """The scales of one matrix of ``size`` weights."""
    scales = math.ceil(size / quantisation.blocksize)
    if not quantisation.double_quant:
        return _LEVELS_BYTES + scales * FP32_BYTES
    nested = FP32_BYTES * math.ceil(scales / _SCALES_PER_SCALE) + _SCALE_LEVELS_BYTES
    return _LEVELS_BYTES + scales + nested + FP32_BYTES


def _saved_parameters(spec: ModelSpec, name: str) -> int:
    last = name.rpartition(".")[2]
    if last in ("embed_tokens", "lm_head"):
        return spec.vocab_size * spec.d_model
    if ".mixer." not in name:
        return spec.d_model
    mixer = spec.layer_mixers[int(name.split(".")[2])]
    return MIXER_COSTS[mixer.mixer].other_parameters(mixer, spec.d_model)
