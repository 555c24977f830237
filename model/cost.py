"""What a model costs, before any of it exists: exact parameters, FLOPs, decoding state, training memory. No torch here.

Counts are exact integers, equal to the built model's. FLOPs are the hybrid's own arithmetic, a multiply-add being two.
Memory is a stated model of what training holds; what a layer keeps for backward is in ``model.activations``.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from model.activations import PYTORCH, Path, activation_bytes
from model.mixer_cost import MIXER_COSTS
from model.projections import fp8_projections, projections
from model.spec import AttentionSpec, ModelSpec

__all__ = [
    "LayerCount",
    "MemoryEstimate",
    "ParameterCount",
    "Path",
    "activation_bytes",
    "checkpoint_bytes",
    "count_parameters",
    "forward_flops_per_token",
    "gradient_bytes",
    "kv_cache_bytes",
    "memory_per_gpu",
    "mixer_state_bytes",
    "optimizer_bytes",
    "training_flops_per_token",
    "weight_bytes",
    "weights_file_bytes",
]

FP32_BYTES, BF16_BYTES = 4, 2
Precision = Literal["bf16", "fp8", "fp32"]
Optimizer = Literal["adamw", "adamw_8bit", "muon"]

QUANTISED_BLOCK, LEAST_QUANTISED = 256, 4096
"""Weights that share the scale of their 8-bit moments, and the smallest matrix whose moments are so kept."""

# DeepSpeed's defaults, in elements: what ZeRO-1/2 reduce at once, and what ZeRO-3 keeps gathered at once.
BUCKET_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """Parameters of one block: the mixer's projections and the rest of it, SwiGLU, and the two norms before them."""

    word: str
    mixer: str
    projections: int
    mixer_other: int
    mlp: int
    norms: int

    @property
    def mixer_total(self) -> int:
        """All of the mixer's parameters."""
        return self.projections + self.mixer_other

    @property
    def total(self) -> int:
        """All of the block's parameters."""
        return self.mixer_total + self.mlp + self.norms


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Exact parameters. ``embedding`` holds the input embedding and, where it is not tied, the head."""

    embedding: int
    final_norm: int
    layers: tuple[LayerCount, ...]

    @property
    def total(self) -> int:
        """All parameters, a tied head counted once."""
        return self.embedding + self.non_embedding

    @property
    def non_embedding(self) -> int:
        """Blocks and final norm."""
        return self.final_norm + sum(layer.total for layer in self.layers)

    @property
    def mlp(self) -> int:
        """SwiGLU weights of all blocks."""
        return sum(layer.mlp for layer in self.layers)

    @property
    def by_mixer(self) -> dict[str, int]:
        """Parameters of all layers' mixers, by kind of mixer."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.mixer] = counts.get(layer.mixer, 0) + layer.mixer_total
        return counts


def count_parameters(spec: ModelSpec) -> ParameterCount:
    """The exact parameters of the model that ``spec`` describes."""
    layers = []
    for word, mixer in zip(spec.layer_words, spec.layer_mixers, strict=True):
        cost = MIXER_COSTS[mixer.mixer]
        projections = sum(d_in * d_out for d_in, d_out in cost.projections(mixer, spec.d_model).values())
        other = cost.other_parameters(mixer, spec.d_model)
        mlp, norms = 3 * spec.d_model * spec.d_ff, 2 * spec.d_model
        layers.append(LayerCount(word, mixer.mixer, projections, other, mlp, norms))
    matrices = 1 if spec.tie_embeddings else 2
    return ParameterCount(matrices * spec.vocab_size * spec.d_model, spec.d_model, tuple(layers))


def matmul_parameters(spec: ModelSpec) -> int:
    """Weights that every token is multiplied with: projections, SwiGLU, head; not the embedding's look-up."""
    layers = count_parameters(spec).layers
    return sum(layer.projections + layer.mlp for layer in layers) + spec.vocab_size * spec.d_model


def forward_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """FLOPs of one forward pass a token, averaged over documents of ``seq_len`` tokens.

    ``2`` a weight of every matrix product, and each mixer's own work over the sequence: chunked scans at their chunk
    size, attention over the pairs that its mask shows. Norms, activations and rotations are left out (well under 1%).
    """
    mixers = sum(MIXER_COSTS[m.mixer].sequence_flops(m, spec.d_model, seq_len) for m in spec.layer_mixers)
    return 2.0 * matmul_parameters(spec) + mixers


def training_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Forward and backward FLOPs a token: backward is twice forward (one product for inputs, one for weights).

    Recomputation under activation checkpointing is not counted, so that utilisation (MFU) stays comparable.
    """
    return 3.0 * forward_flops_per_token(spec, seq_len)


def mixer_state_bytes(spec: ModelSpec, dtype_bytes: int = BF16_BYTES) -> int:
    """Bytes of one sequence's recurrent state, whatever its length: SSM and GLA states in fp32, convolution inputs in
    ``dtype_bytes`` each.
    """
    return sum(MIXER_COSTS[m.mixer].state_bytes(m, spec.d_model, dtype_bytes) for m in spec.layer_mixers)


def kv_cache_bytes(spec: ModelSpec, seq_len: int, dtype_bytes: int = BF16_BYTES) -> int:
    """Bytes of one sequence's keys and values after ``seq_len`` tokens; a window bounds them by window + global."""
    total = 0
    for mixer in spec.layer_mixers:
        if isinstance(mixer, AttentionSpec):
            tokens = MIXER_COSTS[mixer.mixer].cache_tokens(mixer, seq_len)
            total += 2 * mixer.n_kv_heads * mixer.head_dim * tokens * dtype_bytes
    return total


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU at the peak of a training step, and ``host_bytes`` of its share of the host's memory."""

    weights_bytes: int
    casts_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    buffers_bytes: int
    activations_bytes: int
    host_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the GPU: everything but the host's."""
        return sum(dataclasses.astuple(self)) - self.host_bytes


def weight_bytes(spec: ModelSpec, *, zero_stage: int, world_size: int) -> int:
    """fp32 parameters on one device: all of them, or one rank's share under ZeRO-3 (torch autocast casts copies)."""
    total = FP32_BYTES * count_parameters(spec).total
    return _share(total, world_size) if zero_stage == 3 else total


def gradient_bytes(spec: ModelSpec, *, zero_stage: int, world_size: int) -> int:
    """fp32 gradients on one rank: all of them under ZeRO-0/1, one rank's share under ZeRO-2/3."""
    total = FP32_BYTES * count_parameters(spec).total
    return _share(total, world_size) if zero_stage >= 2 else total


def optimizer_bytes(
    spec: ModelSpec, *, zero_stage: int, world_size: int, offload: bool = False, optimizer: Optimizer = "adamw"
) -> int:
    """State of ``optimizer``, one rank's share from ZeRO-1 on, and a master copy where there is one.

    DeepSpeed clones the partition it updates under ZeRO-1/2, although the weights are fp32 already, which is undone for
    one rank under ZeRO-1; ZeRO-3 does so only when the optimizer is off-loaded; ZeRO-0 updates the weights themselves.
    """
    master = offload if zero_stage == 3 else zero_stage > 0 and not _is_alone(zero_stage, world_size, offload)
    total = _state_bytes(spec, optimizer) + (FP32_BYTES * count_parameters(spec).total if master else 0)
    return _share(total, world_size) if zero_stage else total


def _is_alone(zero_stage: int, world_size: int, offload: bool) -> bool:
    """Whether ZeRO-1 has one rank and its GPU, so that weights are updated in place by gradients as they came."""
    return zero_stage == 1 and world_size == 1 and not offload


def _state_bytes(spec: ModelSpec, optimizer: Optimizer) -> int:
    """Two fp32 moments a parameter; of the blocks' projections one under Muon, two in eight bits under 8-bit AdamW."""
    sizes = [d_in * d_out for d_in, d_out in projections(spec).values()]
    rest = count_parameters(spec).total
    held = 0
    if optimizer == "muon":
        held, rest = FP32_BYTES * sum(sizes), rest - sum(sizes)
    elif optimizer == "adamw_8bit":
        quantised = [size for size in sizes if size >= LEAST_QUANTISED]
        held = 2 * sum(size + FP32_BYTES * -(-size // QUANTISED_BLOCK) for size in quantised)
        rest -= sum(quantised)
    return held + 2 * FP32_BYTES * rest


def checkpoint_bytes(spec: ModelSpec, *, zero_stage: int, optimizer: Optimizer = "adamw") -> int:
    """Engine state on disk for resume, all ranks together: the fp32 weights, the optimizer's state, and under ZeRO-1/2
    the weights once more beside it, whether memory holds them twice or not.
    """
    weights = weights_file_bytes(spec)
    return weights + _state_bytes(spec, optimizer) + (weights if zero_stage in (1, 2) else 0)


def weights_file_bytes(spec: ModelSpec, dtype_bytes: int = FP32_BYTES) -> int:
    """Tensor bytes of the exported safetensors files, ``dtype_bytes`` a parameter."""
    return dtype_bytes * count_parameters(spec).total


def memory_per_gpu(
    spec: ModelSpec,
    *,
    zero_stage: int,
    world_size: int,
    micro_batch_size: int,
    seq_len: int,
    precision: Precision = "bf16",
    offload: bool = False,
    activation_checkpointing: bool = False,
    optimizer: Optimizer = "adamw",
    path: Path = PYTORCH,
    accumulation_steps: int | None = None,
) -> MemoryEstimate:
    """Peak memory of one rank in a training step of this project's engine: fp32 weights, torch autocast for bf16.

    ``casts_bytes`` are the copies of the matrices in half precision or 8 bits, kept from forward to backward. With one
    micro-step (``accumulation_steps``; None is any number) the peak is either where backward begins, before there are
    gradients, or where it ends, with gradients in place of activations. ``offload`` puts the
    shares of gradients and optimizer state on the host, and under ZeRO-3 that of the weights (``zero3_cpu_offload``).
    The allocator's slack and the CUDA context (1-2 GB) come on top.

    Raises:
        ValueError: for a ZeRO stage, size or combination that does not exist, naming the field.
    """
    _check(zero_stage, world_size, micro_batch_size, seq_len, offload)
    facts = {"zero_stage": zero_stage, "world_size": world_size}
    weights, gradients = weight_bytes(spec, **facts), gradient_bytes(spec, **facts)
    states = optimizer_bytes(spec, **facts, offload=offload, optimizer=optimizer)
    moved = weights if offload and zero_stage == 3 else 0
    whole = MemoryEstimate(
        weights_bytes=weights - moved,
        casts_bytes=_cast_bytes(spec, precision, path, kept=accumulation_steps != 1 and zero_stage < 3),
        gradients_bytes=0 if offload else gradients,
        optimizer_bytes=0 if offload else states,
        buffers_bytes=0 if _is_alone(zero_stage, world_size, offload) else _buffer_bytes(spec, zero_stage),
        activations_bytes=activation_bytes(spec, seq_len, micro_batch_size, activation_checkpointing, precision, path),
        host_bytes=moved + gradients + states if offload else 0,
    )
    if accumulation_steps != 1 or zero_stage == 3:
        return whole
    before = dataclasses.replace(whole, gradients_bytes=0, buffers_bytes=0)
    after = dataclasses.replace(whole, activations_bytes=0, casts_bytes=0)
    return max(before, after, key=lambda estimate: estimate.total_bytes)


def _cast_bytes(spec: ModelSpec, precision: Precision, path: Path, *, kept: bool) -> int:
    """On the kernel path the head's copy ends with the loss; in 8 bits a matrix is kept turned, else in bf16.

    What is ``kept`` for all micro-batches of a step is kept both ways in 8 bits.
    """
    if precision == "fp32":
        return 0
    if not path.kernels:
        return BF16_BYTES * matmul_parameters(spec)
    sizes = projections(spec)
    narrow = set(fp8_projections(sizes)) if precision == "fp8" else set()
    in_8_bits = 2 if kept else 1
    return sum(d_in * d_out * (in_8_bits if name in narrow else BF16_BYTES) for name, (d_in, d_out) in sizes.items())


def _buffer_bytes(spec: ModelSpec, zero_stage: int) -> int:
    """Reduction buckets of ZeRO-1/2/3, and the gathered weights of ZeRO-3, at DeepSpeed's sizes, in fp32."""
    parameters = count_parameters(spec).total
    buckets = min(parameters, BUCKET_ELEMENTS) if zero_stage else 0
    gathered = min(parameters, LIVE_ELEMENTS) if zero_stage == 3 else 0
    return FP32_BYTES * (buckets + gathered)


def _check(zero_stage: int, world_size: int, micro_batch_size: int, seq_len: int, offload: bool) -> None:
    faults = []
    if zero_stage not in (0, 1, 2, 3):
        faults.append(f"zero_stage must be 0, 1, 2 or 3; got {zero_stage}; set 1")
    sizes = {"world_size": world_size, "micro_batch_size": micro_batch_size, "seq_len": seq_len}
    faults += [f"{name} must be at least 1; got {size}; set 1" for name, size in sizes.items() if size < 1]
    if offload and zero_stage == 0:
        faults.append("offload needs ZeRO; got zero_stage 0; set zero_stage 3")
    if faults:
        raise ValueError("; ".join(faults))


def _share(total: int, world_size: int) -> int:
    """One rank's part, rounded up: DeepSpeed pads partitions to the same size."""
    return -(-total // world_size)
