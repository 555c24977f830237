"""Bytes that a training step keeps for backward, as a stated model of two paths. No torch here.

The PyTorch path runs anywhere: the residual stream is fp32, autocast or not; a block saves it at each norm, its SwiGLU,
and what its mixer keeps (``saved_bytes`` in ``model.mixer_cost``). The kernel path is blocks compiled on their own
around kernels: the compiler keeps matrix products' inputs and results, a norm's scale in place of what it made, and
computes the rest again (``kernel_saved_bytes``). Rows are packed in both, so attention holds a mask or repeats keys.
The loss keeps gradients instead of logits. Tests hold the first to the bytes that autograd saves, the second to what
the compiler's partitioner decides; ``benchmarks/memory.py`` holds both to a GPU.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from model.mixer_cost import BF16_BYTES, FP32_BYTES, MIXER_COSTS, input_elements, kernel_of
from model.projections import fp8_fits
from model.spec import MixerSpec, ModelSpec

LOSS_CHUNK_ELEMENTS = 2**22
"""Logits that the loss holds at a time, at least 64 tokens' worth."""
KERNEL_CHUNK_ELEMENTS = 2**29
"""The same on a GPU."""
FP8_LOGIT_ELEMENTS = 2**30
"""The same of a head whose gradients run in 8 bits."""
FP8_TURNED_ELEMENTS = 2**31
"""Gradients by the logits that such a head holds at a time, turned, for one product."""


@dataclasses.dataclass(frozen=True)
class Path:
    """How a step computes: ``kernels`` in compiled blocks or PyTorch's own operators, and the dtypes of its stream.

    ``packed`` rows hold several documents; only kernels cost less without.
    """

    kernels: bool = False
    residual: Literal["fp32", "bf16"] = "fp32"
    packed: bool = True

    def __str__(self) -> str:
        return "kernels in compiled blocks" if self.kernels else "PyTorch operators, uncompiled"


PYTORCH = Path()


def activation_bytes(
    spec: ModelSpec,
    seq_len: int,
    micro_batch_size: int,
    activation_checkpointing: bool,
    precision: str = "bf16",
    path: Path = PYTORCH,
) -> int:
    """Bytes of activations at the peak of one micro-step of ``micro_batch_size`` packed rows of ``seq_len`` tokens.

    With ``activation_checkpointing`` every block keeps its input alone, and the largest is whole once, while it is
    recomputed. Weights, their bf16 copies and gradients are counted elsewhere.
    """
    dtype_bytes = FP32_BYTES if precision == "fp32" else BF16_BYTES
    stream = (BF16_BYTES if path.residual == "bf16" else FP32_BYTES) * spec.d_model
    blocks = [_block_bytes(spec, mixer, seq_len, precision, path) for mixer in spec.layer_mixers]
    kept = len(blocks) * stream + max(blocks) if activation_checkpointing else sum(blocks)
    tokens = seq_len * micro_batch_size
    # The final norm saves its fp32 input and its output before the weight; the loss, its gradient by the hidden states.
    ends = 2 * FP32_BYTES * spec.d_model + stream
    if precision == "fp8" and fp8_fits(spec.d_model, spec.vocab_size):
        return round(tokens * (kept + ends)) + _fp8_loss_bytes(spec, tokens)
    return round(tokens * (kept + ends)) + _loss_bytes(spec, tokens, dtype_bytes, path)


def _block_bytes(spec: ModelSpec, mixer: MixerSpec, seq_len: int, precision: str, path: Path) -> float:
    if path.kernels and precision != "fp32" and kernel_of(mixer):
        return _kernel_block_bytes(spec, mixer, precision, path)
    # Bytes a token of one block: two norms (input, normalised, scale), SwiGLU (four of d_ff), mixer.
    dtype_bytes = FP32_BYTES if precision == "fp32" else BF16_BYTES
    norms = 2 * FP32_BYTES * (2 * spec.d_model + 1)
    mlp = dtype_bytes * (input_elements(spec.d_model, 2, dtype_bytes) + 4 * spec.d_ff)
    return norms + mlp + MIXER_COSTS[mixer.mixer].saved_bytes(mixer, spec.d_model, seq_len, dtype_bytes)


def _kernel_block_bytes(spec: ModelSpec, mixer: MixerSpec, precision: str, path: Path) -> float:
    """A block's input, the mixer's result, two norms' scales, SwiGLU's input and factors, and what the mixer keeps."""
    kept = _kept_in_fp8 if precision == "fp8" else _kept_in_bf16
    stream = BF16_BYTES if path.residual == "bf16" else FP32_BYTES
    sums = stream * spec.d_model + BF16_BYTES * spec.d_model + 2 * FP32_BYTES
    # The product of the two factors is computed again; in fp8 its cast is kept in its place.
    product = kept(spec.d_ff, spec.d_model) if precision == "fp8" else 0
    mlp = kept(spec.d_model, spec.d_ff) + 2 * BF16_BYTES * spec.d_ff + product
    return sums + mlp + MIXER_COSTS[mixer.mixer].kernel_saved_bytes(mixer, spec.d_model, path.packed, kept)


def _kept_in_bf16(inputs: int, *outputs: int) -> int:
    """One bf16 copy, whatever the projections that share it."""
    return BF16_BYTES * inputs


def _kept_in_fp8(inputs: int, *outputs: int) -> int:
    """An 8-bit copy for those that are large enough, a bf16 one for the others."""
    fits = [fp8_fits(inputs, n) for n in outputs]
    return (any(fits) + BF16_BYTES * (not all(fits))) * inputs


def _loss_bytes(spec: ModelSpec, tokens: int, dtype_bytes: int, path: Path) -> int:
    """The head's waiting fp32 gradient, and one chunk of logits: as computed, in fp32, and as error.

    Kernels hold no fp32 logits, and the head in half precision; backward scales the waiting gradient into a new one.
    """
    head = spec.vocab_size * spec.d_model
    if not path.kernels:
        chunk = max(64 * spec.vocab_size, LOSS_CHUNK_ELEMENTS)
        return FP32_BYTES * head + chunk * (2 * dtype_bytes + FP32_BYTES)
    chunk = min(tokens * spec.vocab_size, KERNEL_CHUNK_ELEMENTS)
    return max((FP32_BYTES + dtype_bytes) * head + 2 * dtype_bytes * chunk, 2 * FP32_BYTES * head)


def _fp8_loss_bytes(spec: ModelSpec, tokens: int) -> int:
    """A stretch's errors, turned; beside them a chunk's logits and errors, or what the stretch adds to the head's fp32
    gradient, which is there from the second stretch on; and the head in bf16 and in 8 bits.
    """
    head, logits = spec.vocab_size * spec.d_model, tokens * spec.vocab_size
    # Both come in equal parts.
    chunk, turned = (logits / -(-logits // most) for most in (FP8_LOGIT_ELEMENTS, FP8_TURNED_ELEMENTS))
    waiting = FP32_BYTES * head if logits > turned else 0
    loss = (BF16_BYTES + 1) * head + waiting + turned + max((BF16_BYTES + 1) * chunk, FP32_BYTES * head)
    return round(max(loss, 2 * FP32_BYTES * head))
