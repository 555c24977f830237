"""Our Triton kernels for Mamba-2's gated norm: RMSNorm of y silu(z) within groups, forward and backward.

B batch, T time, W width of the row, G groups of W / G channels.

    g = y silu(z);  n = g / sqrt(mean(g^2) + eps);  out = w n

A program holds one group of a token in registers, so each pass reads and writes every value once. The weight's gradient
is summed over a program's tokens, then over programs in one fixed order: the same bits each time.
"""

# mypy: allow-untyped-defs
# A kernel's arguments are whatever Triton makes of tensors and numbers.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.sigmoid_triton import sigmoid

ROWS = 32
"""Tokens that a program of the backward pass sums over."""
FORWARD_CHANNELS, BACKWARD_CHANNELS = 1024, 256
"""Channels that a warp holds."""
REGISTERS = 64
"""Of a thread of the backward pass: two programs of 4096 channels share a multiprocessor, and one computes while the
other waits."""


def gated_norm_forward(y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    """The normed rows (B, T, W), contiguous and in z's dtype.

    ``y`` (B, T, W) contiguous; ``z`` (B, T, W) with channels side by side and rows anywhere; ``weight`` (W,).
    """
    batch, time, width = y.shape
    out, block = z.new_empty(batch, time, width), triton.next_power_of_2(width // n_groups)
    gated_norm_kernel[(batch * time, n_groups)](
        y, z, weight, out, time, width, width // n_groups, z.stride(0), z.stride(1), eps,
        block=block, num_warps=_warps(block, FORWARD_CHANNELS),
    )  # fmt: skip
    return out


def gated_norm_backward(
    d_out: Tensor, y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float, d_z: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient by z into ``d_z`` (B, T, W), rows anywhere; return those by y, contiguous, and weight, fp32.

    ``d_out`` (B, T, W) is contiguous; the rest is as in ``gated_norm_forward``.
    """
    batch, time, width = y.shape
    rows = batch * time
    d_y, programs, block = torch.empty_like(y), triton.cdiv(rows, ROWS), triton.next_power_of_2(width // n_groups)
    partial = y.new_empty(programs, width, dtype=torch.float32)
    gated_norm_backward_kernel[(programs, n_groups)](
        d_out, y, z, weight, d_y, d_z, partial, rows, time, width, width // n_groups,
        z.stride(0), z.stride(1), d_z.stride(0), d_z.stride(1), eps,
        stretch=ROWS, block=block, num_warps=_warps(block, BACKWARD_CHANNELS), maxnreg=REGISTERS,
    )  # fmt: skip
    return d_y, partial.sum(0)


def _warps(block: int, channels: int) -> int:
    return min(16, max(1, block // channels))


@triton.jit
def _loaded(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gated_norm_kernel(
    y, z, weight, out, time, width, group_width, z_batch, z_time, eps, block: tl.constexpr,
):  # fmt: skip
    """One group of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < group_width
    column += tl.program_id(1) * group_width
    gate = _loaded(z + (row // time) * z_batch + (row % time) * z_time + column, inside)
    gated = _loaded(y + row * width + column, inside) * gate * sigmoid(gate)
    scale = tl.rsqrt(tl.sum(gated * gated, 0) / group_width + eps)
    normed = gated * scale * _loaded(weight + column, inside)
    tl.store(out + row * width + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm_backward_kernel(
    d_out, y, z, weight, d_y, d_z, partial, rows, time, width, group_width,
    z_batch, z_time, d_z_batch, d_z_time, eps, stretch: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Gradients by y and z of one group of a stretch of rows, and what it adds to that of the weight.

    What a row's two sums need is read again after them, from the nearest cache: held in registers meanwhile it would
    leave room for one program a multiprocessor, which then waits for each row.
    """
    column = tl.arange(0, block)
    inside = column < group_width
    column += tl.program_id(1) * group_width
    d_scales = tl.zeros([block], tl.float32)
    first = tl.program_id(0).to(tl.int64) * stretch
    for i in range(stretch):
        row = first + i
        there = inside & (row < rows)
        z_row = z + (row // time) * z_batch + (row % time) * z_time + column
        at = row * width + column
        gate = tl.load(z_row, mask=there, other=0.0, eviction_policy="evict_last").to(tl.float32)
        gated = tl.load(y + at, mask=there, other=0.0, eviction_policy="evict_last").to(tl.float32)
        gated *= gate * sigmoid(gate)
        d_normed = tl.load(d_out + at, mask=there, other=0.0, eviction_policy="evict_last").to(tl.float32)
        d_normed *= _loaded(weight + column, inside)
        scale = tl.rsqrt(tl.sum(gated * gated, 0) / group_width + eps)
        along = tl.sum(d_normed * gated, 0) * scale * scale / group_width

        gate, value, d_normed = _loaded(z_row, there), _loaded(y + at, there), _loaded(d_out + at, there)
        share = sigmoid(gate)
        opened = gate * share
        gated = value * opened
        d_scales += d_normed * gated * scale
        d_gated = scale * (d_normed * _loaded(weight + column, inside) - gated * along)
        tl.store(d_y + at, (d_gated * opened).to(d_y.dtype.element_ty), mask=there)
        d_gate = d_gated * value * share * (1.0 + gate * (1.0 - share))
        to = d_z + (row // time) * d_z_batch + (row % time) * d_z_time + column
        tl.store(to, d_gate.to(d_z.dtype.element_ty), mask=there)
    tl.store(partial + tl.program_id(0).to(tl.int64) * width + column, d_scales, mask=inside)
