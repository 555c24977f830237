"""Our Triton kernels for Mamba-2's step sizes: softplus(dt + bias), zero at padding, forward and backward.

B batch, T time, H heads.
"""

# mypy: allow-untyped-defs
# A kernel's arguments are whatever Triton makes of tensors and numbers.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.sigmoid_triton import sigmoid

ROWS = 64
"""Tokens a program takes."""


def steps_forward(dt: Tensor, bias: Tensor, valid: Tensor | None) -> Tensor:
    """Step sizes (B, T, H) in fp32, contiguous.

    ``dt`` (B, T, H) with heads side by side and rows anywhere; ``bias`` (H,); ``valid`` (B, T) false at padding.
    """
    batch, time, heads = dt.shape
    step = dt.new_empty(batch, time, heads, dtype=torch.float32)
    steps_kernel[(triton.cdiv(batch * time, ROWS),)](
        dt, bias, valid, step, batch * time, time, heads, dt.stride(0), dt.stride(1),
        stretch=ROWS, block=triton.next_power_of_2(heads),
    )  # fmt: skip
    return step


def steps_backward(d_step: Tensor, dt: Tensor, bias: Tensor, valid: Tensor | None, d_dt: Tensor) -> Tensor:
    """Write the gradient by dt into ``d_dt`` (B, T, H), rows anywhere; return the one by the bias (H,) in fp32.

    ``d_step`` (B, T, H) is contiguous; the rest is as in ``steps_forward``.
    """
    batch, time, heads = dt.shape
    programs = triton.cdiv(batch * time, ROWS)
    partial = dt.new_empty(programs, heads, dtype=torch.float32)
    steps_backward_kernel[(programs,)](
        d_step, dt, bias, valid, d_dt, partial, batch * time, time, heads,
        dt.stride(0), dt.stride(1), d_dt.stride(0), d_dt.stride(1),
        stretch=ROWS, block=triton.next_power_of_2(heads),
    )  # fmt: skip
    return partial.sum(0)


@triton.jit
def _biased(dt, bias, valid, row, column, rows, time, heads, dt_batch, dt_time):
    """dt + bias (stretch, block) in fp32, and which of them are tokens that count."""
    there = (row < rows)[:, None] & (column < heads)[None, :]
    value = tl.load(dt + ((row // time) * dt_batch + (row % time) * dt_time)[:, None] + column[None, :], mask=there)
    value = value.to(tl.float32) + tl.load(bias + column, mask=column < heads, other=0.0).to(tl.float32)[None, :]
    counts = there
    if valid is not None:
        counts = counts & (tl.load(valid + row, mask=row < rows, other=0) != 0)[:, None]
    return value, counts, there


@triton.jit
def steps_kernel(
    dt, bias, valid, step, rows, time, heads, dt_batch, dt_time, stretch: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Step sizes of one stretch of rows."""
    row = tl.program_id(0).to(tl.int64) * stretch + tl.arange(0, stretch)
    column = tl.arange(0, block)
    value, counts, there = _biased(dt, bias, valid, row, column, rows, time, heads, dt_batch, dt_time)
    # log(1 + e) to full precision however small e is: the rounding of 1 + e is taken out again.
    small = tl.exp(-tl.abs(value))
    rounded = 1.0 + small
    grown = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    result = tl.where(counts, tl.maximum(value, 0.0) + grown, 0.0)
    tl.store(step + row[:, None] * heads + column[None, :], result, mask=there)


@triton.jit
def steps_backward_kernel(
    d_step, dt, bias, valid, d_dt, partial, rows, time, heads, dt_batch, dt_time, d_dt_batch, d_dt_time,
    stretch: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Gradients by dt of one stretch of rows, and what it adds to that of the bias."""
    row = tl.program_id(0).to(tl.int64) * stretch + tl.arange(0, stretch)
    column = tl.arange(0, block)
    value, counts, there = _biased(dt, bias, valid, row, column, rows, time, heads, dt_batch, dt_time)
    d_value = tl.load(d_step + row[:, None] * heads + column[None, :], mask=there, other=0.0).to(tl.float32)
    d_value = tl.where(counts, d_value * sigmoid(value), 0.0)
    to = d_dt + ((row // time) * d_dt_batch + (row % time) * d_dt_time)[:, None] + column[None, :]
    tl.store(to, d_value.to(d_dt.dtype.element_ty), mask=there)
    tl.store(partial + tl.program_id(0).to(tl.int64) * heads + column, tl.sum(d_value, 0), mask=column < heads)
