"""Bytes that a training step keeps for backward, as a stated model of the PyTorch path. No torch here.

The residual stream is fp32, autocast or not; a block saves it at each norm, its SwiGLU, and what its mixer keeps
(``saved_bytes`` in ``model.mixer_cost``). Rows are packed, so attention holds a mask. The loss keeps gradients instead
of logits. A test holds the model to the bytes that autograd really saves.
"""

from __future__ import annotations

from model.mixer_cost import FP32_BYTES, MIXER_COSTS, input_elements
from model.spec import MixerSpec, ModelSpec

LOSS_CHUNK_ELEMENTS = 2**22
"""Logits that the loss holds at a time, at least 64 tokens' worth."""


def activation_bytes(
    spec: ModelSpec, seq_len: int, micro_batch_size: int, activation_checkpointing: bool, precision: str = "bf16"
) -> int:
    """Bytes of activations at the peak of one micro-step of ``micro_batch_size`` packed rows of ``seq_len`` tokens.

    With ``activation_checkpointing`` every block keeps its input alone, and the largest is whole once, while it is
    recomputed. Weights, their bf16 copies and gradients are counted elsewhere.
    """
    dtype_bytes = FP32_BYTES if precision == "fp32" else 2
    blocks = [_block_bytes(spec, mixer, seq_len, dtype_bytes) for mixer in spec.layer_mixers]
    stream = FP32_BYTES * spec.d_model
    kept = len(blocks) * stream + max(blocks) if activation_checkpointing else sum(blocks)
    tokens = seq_len * micro_batch_size
    # The final norm saves its input and its output before the weight; the loss, its gradient by the hidden states.
    return round(tokens * (kept + 3 * stream)) + _loss_bytes(spec, dtype_bytes)


def _block_bytes(spec: ModelSpec, mixer: MixerSpec, seq_len: int, dtype_bytes: int) -> float:
    """Bytes a token of one block: two norms (input, normalised, scale), SwiGLU (four of d_ff), mixer."""
    norms = 2 * FP32_BYTES * (2 * spec.d_model + 1)
    mlp = dtype_bytes * (input_elements(spec.d_model, 2, dtype_bytes) + 4 * spec.d_ff)
    return norms + mlp + MIXER_COSTS[mixer.mixer].saved_bytes(mixer, spec.d_model, seq_len, dtype_bytes)


def _loss_bytes(spec: ModelSpec, dtype_bytes: int) -> int:
    """The head's waiting fp32 gradient, and one chunk of logits: as computed, in fp32, and as error."""
    chunk = max(64 * spec.vocab_size, LOSS_CHUNK_ELEMENTS)
    return FP32_BYTES * spec.vocab_size * spec.d_model + chunk * (2 * dtype_bytes + FP32_BYTES)
