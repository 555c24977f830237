"""The gradient of the loss by its logits, straight to 8 bits and turned as well, by Triton. Imported where it runs.

T rows (tokens), V columns (vocabulary). Nothing depends on the order of programs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
STRETCH, ROW_WARPS = 2048, 2
"""Columns that a row's sum takes at a time."""
ROWS, COLUMNS, WARPS = 128, 64, 4
BAND = 4
"""Tiles below each other that are taken before the next column of tiles, as in ``cast_triton``."""


@triton.jit
def row_kernel(
    logits: tl.tensor,
    goals: tl.tensor,
    shifts: tl.tensor,
    losses: tl.tensor,
    n_columns: tl.tensor,
    scale_bits: tl.constexpr,
    ignored: tl.constexpr,
    stretch: tl.constexpr,
) -> None:
    """One row of ``logits`` (T, V): its loss, and its ``shift``: softmax x 2**scale_bits is 2**(logit log2(e) + shift).

    A row that is not scored has no loss, and a shift of minus infinity; NaN stays NaN in both.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * n_columns
    largest, total = -float("inf"), 0.0
    for start in range(0, n_columns, stretch):
        column = start + tl.arange(0, stretch)
        value = tl.load(logits + column, mask=column < n_columns, other=-float("inf")).to(tl.float32)
        # Powers of two take one multiplication less than powers of e.
        highest = tl.maximum(largest, tl.max(value, 0) * LOG2_E)
        total = total * tl.exp2(largest - highest) + tl.sum(tl.exp2(value * LOG2_E - highest), 0)
        largest = highest
    log_sum = largest + tl.log2(total)
    goal = tl.load(goals + row)
    scored = goal != ignored
    aim = tl.load(logits + tl.where(scored, goal, 0)).to(tl.float32)
    tl.store(shifts + row, tl.where(scored, scale_bits - log_sum, -float("inf")))
    tl.store(losses + row, (log_sum * LN_2 - aim) * scored.to(tl.float32))


@triton.jit
def error_kernel(
    logits: tl.tensor,
    goals: tl.tensor,
    shifts: tl.tensor,
    narrow: tl.tensor,
    turned: tl.tensor,
    n_rows: tl.tensor,
    n_columns: tl.tensor,
    wide_rows: tl.tensor,
    wide_columns: tl.tensor,
    turned_stride: tl.tensor,
    scale: tl.constexpr,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
    band: tl.constexpr,
) -> None:
    """One tile of (softmax - one-hot) ``scale`` of ``logits`` (n_rows, n_columns) to ``narrow`` (n_rows, wide_columns)
    and, turned, to ``turned`` (n_columns, wide_rows), whose rows are ``turned_stride`` apart; zeros lie beyond it.

    Two rows are turned as one number of 16 bits, so ``wide_rows`` and ``turned_stride`` are even. Turning 8 bits, the
    compiler would turn the logits in their place and compute everything twice.
    """
    down, across = tl.cdiv(wide_rows, row_tile), tl.cdiv(wide_columns, column_tile)
    first = tl.program_id(0) // (band * across) * band
    height = tl.minimum(band, down - first)
    inside_band = tl.program_id(0) % (band * across)
    top, left = (first + inside_band % height) * row_tile, inside_band // height * column_tile
    pair, column = tl.arange(0, row_tile // 2), tl.arange(0, column_tile)
    even = errors_of(logits, goals, shifts, narrow, n_rows, n_columns, wide_columns, top, left, 2 * pair, column, scale)
    odd = errors_of(
        logits, goals, shifts, narrow, n_rows, n_columns, wide_columns, top, left, 2 * pair + 1, column, scale
    )
    pairs = even.to(tl.uint8, bitcast=True).to(tl.uint16) | (odd.to(tl.uint8, bitcast=True).to(tl.uint16) << 8)
    room = (left + column < n_columns)[:, None] & (top // 2 + pair < wide_rows // 2)[None, :]
    corner = (turned + (left.to(tl.int64) * turned_stride + top)).to(tl.pointer_type(tl.uint16))
    tl.store(corner + (column[:, None] * (turned_stride // 2) + pair[None, :]), tl.trans(pairs), mask=room)


@triton.jit
def errors_of(
    logits: tl.tensor,
    goals: tl.tensor,
    shifts: tl.tensor,
    narrow: tl.tensor,
    n_rows: tl.tensor,
    n_columns: tl.tensor,
    wide_columns: tl.tensor,
    top: tl.tensor,
    left: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    scale: tl.constexpr,
) -> tl.tensor:
    """The errors at ``top + row`` and ``left + column``, stored to ``narrow``."""
    held = top + row < n_rows
    inside = held[:, None] & (left + column < n_columns)[None, :]
    # Only a tile's corner can lie beyond 32 bits.
    at = top.to(tl.int64) * n_columns + left + (row[:, None] * n_columns + column[None, :])
    value = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
    # No column is negative, and so is what is not scored.
    goal = tl.load(goals + top + row, mask=held, other=-1).to(tl.int32) - left
    shift = tl.load(shifts + top + row, mask=held, other=-float("inf"))
    error = tl.exp2(value * LOG2_E + shift[:, None])
    error = tl.where(goal[:, None] == column[None, :], error - scale, error)
    cast = error.to(narrow.dtype.element_ty)
    room = held[:, None] & (left + column < wide_columns)[None, :]
    at = top.to(tl.int64) * wide_columns + left + (row[:, None] * wide_columns + column[None, :])
    tl.store(narrow + at, cast, mask=room)
    return cast


def errors(
    logits: Tensor, goals: Tensor, turned: Tensor, wide_columns: int, scale: float, ignored: int
) -> tuple[Tensor, Tensor]:
    """Summed loss of ``logits`` (T, V), nats, and its gradient by them times ``scale``, (T, wide_columns).

    The gradient is also written, turned, to ``turned`` (V, T or more), which may be part of a wider buffer and whose
    dtype it has. Zeros fill both up.
    """
    assert (turned.shape[1] | turned.stride(0)) % 2 == 0, "two rows are turned as one number"
    (n_rows, n_columns), logits = logits.shape, logits.contiguous()
    shifts, losses = (torch.empty(n_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    bits = math.log2(scale)
    row_kernel[(n_rows,)](logits, goals, shifts, losses, n_columns, bits, ignored, STRETCH, num_warps=ROW_WARPS)
    narrow = torch.empty(n_rows, wide_columns, dtype=turned.dtype, device=logits.device)
    sizes = n_rows, n_columns, turned.shape[1], wide_columns, turned.stride(0)
    tiles = triton.cdiv(turned.shape[1], ROWS) * triton.cdiv(wide_columns, COLUMNS)
    error_kernel[(tiles,)](logits, goals, shifts, narrow, turned, *sizes, scale, ROWS, COLUMNS, BAND, num_warps=WARPS)
    return losses.sum(), narrow
