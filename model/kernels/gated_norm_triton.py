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

CHANNELS_AT_ONCE = 264 * 4096
"""That all programs of the backward pass hold: two of 4096 on each of 132 multiprocessors, so that one computes while
the other waits. Fixed, since it decides the order of sums."""
FORWARD_CHANNELS, BACKWARD_CHANNELS = 1024, 512
"""Channels that a warp holds."""
BACKWARD_STAGES = 3
"""Rows in flight: two are on their way while one is computed."""
REGISTERS = 128
"""Of a thread of the backward pass, so that two programs share a multiprocessor."""


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
    d_y, block = torch.empty_like(y), triton.next_power_of_2(width // n_groups)
    programs = min(time, max(1, CHANNELS_AT_ONCE // (block * n_groups * batch)))
    partial = y.new_empty(programs * batch, width, dtype=torch.float32)
    gated_norm_backward_kernel[(programs, batch, n_groups)](
        d_out, y, z, weight, d_y, d_z, partial, time, width, width // n_groups,
        z.stride(0), z.stride(1), d_z.stride(0), d_z.stride(1), eps,
        block=block, stages=BACKWARD_STAGES, num_warps=_warps(block, BACKWARD_CHANNELS), maxnreg=REGISTERS,
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
    d_out, y, z, weight, d_y, d_z, partial, time, width, group_width,
    z_batch, z_time, d_z_batch, d_z_time, eps, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Gradients by y and z of one group of every N-th token of a row, and what they add to that of the weight.

    Programs (N, B, G). What a token's two sums need stays in registers until they are known.
    """
    column = tl.arange(0, block)
    inside = column < group_width
    column += tl.program_id(2) * group_width
    batch = tl.program_id(1).to(tl.int64)
    z += batch * z_batch
    d_z += batch * d_z_batch
    y += batch * time * width
    d_y += batch * time * width
    d_out += batch * time * width
    scales, d_scales = _loaded(weight + column, inside), tl.zeros([block], tl.float32)
    for t in tl.range(tl.program_id(0), time, tl.num_programs(0), num_stages=stages):
        row = tl.cast(t, tl.int64)
        gate = _loaded(z + row * z_time + column, inside)
        value = _loaded(y + row * width + column, inside)
        d_row = _loaded(d_out + row * width + column, inside)
        share = sigmoid(gate)
        opened = gate * share
        gated, through = value * opened, value * (share + opened * (1.0 - share))
        d_normed = d_row * scales
        scale = tl.rsqrt(tl.sum(gated * gated, 0) / group_width + eps)
        along = tl.sum(d_normed * gated, 0) * scale * scale / group_width
        d_scales += d_row * gated * scale
        d_gated = scale * (d_normed - gated * along)
        tl.store(d_y + row * width + column, (d_gated * opened).to(d_y.dtype.element_ty), mask=inside)
        tl.store(d_z + row * d_z_time + column, (d_gated * through).to(d_z.dtype.element_ty), mask=inside)
    partial += (batch * tl.num_programs(0) + tl.program_id(0)) * width + column
    tl.store(partial, d_scales, mask=inside)
