"""Casting a half-precision tensor to 8 bits with a scale of its own, and turning it, by Triton. Imported where it runs.

The largest magnitude of each row comes with the tensor. Nothing depends on the order of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 16384
"""Rows whose magnitudes are compared at a time."""
ROWS, COLUMNS, WARPS = 256, 64, 4
BAND = 4
"""Tiles below each other that are taken before the next column of tiles: what is read and what is written turned then
both lie close together."""


@triton.jit
def scale_kernel(
    magnitudes: tl.tensor,
    scale: tl.tensor,
    unscale: tl.tensor,
    n_rows: tl.tensor,
    limit: tl.constexpr,
    smallest: tl.constexpr,
    stretch: tl.constexpr,
) -> None:
    """The factor that brings the largest of ``magnitudes`` (n_rows,) to ``limit``, and the one back; one program."""
    largest = tl.zeros((stretch,), tl.float32)
    for start in range(0, n_rows, stretch):
        row = start + tl.arange(0, stretch)
        largest = tl.maximum(largest, tl.load(magnitudes + row, mask=row < n_rows, other=0.0).to(tl.float32))
    amax = tl.maximum(tl.max(largest, 0), smallest)
    tl.store(scale, tl.div_rn(limit, amax))
    tl.store(unscale, tl.div_rn(amax, limit))


@triton.jit
def cast_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    narrow: tl.tensor,
    turned: tl.tensor,
    n_rows: tl.tensor,
    n_columns: tl.tensor,
    wide_rows: tl.tensor,
    wide_columns: tl.tensor,
    limit: tl.constexpr,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
    band: tl.constexpr,
) -> None:
    """One tile of ``x`` (n_rows, n_columns), scaled and saturated, to ``narrow`` (wide_rows, wide_columns), where zeros
    lie beyond it, and, turned, to ``turned``.
    """
    down, across = tl.cdiv(wide_rows, row_tile), tl.cdiv(wide_columns, column_tile)
    first = tl.program_id(0) // (band * across) * band
    height = tl.minimum(band, down - first)
    inside_band = tl.program_id(0) % (band * across)
    top, left = (first + inside_band % height) * row_tile, inside_band // height * column_tile
    row, column = tl.arange(0, row_tile), tl.arange(0, column_tile)
    inside = (top + row < n_rows)[:, None] & (left + column < n_columns)[None, :]
    # Only a tile's corner can lie beyond 32 bits.
    at = top.to(tl.int64) * n_columns + left + (row[:, None] * n_columns + column[None, :])
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    # NaN must stay NaN: a comparison with it is false, so it is kept.
    value = tl.where(value > limit, limit, tl.where(value < -limit, -limit, value))
    cast = value.to(narrow.dtype.element_ty)
    room = (top + row < wide_rows)[:, None] & (left + column < wide_columns)[None, :]
    at = top.to(tl.int64) * wide_columns + left + (row[:, None] * wide_columns + column[None, :])
    tl.store(narrow + at, cast, mask=room)
    at = left.to(tl.int64) * wide_rows + top + (column[:, None] * wide_rows + row[None, :])
    tl.store(turned + at, tl.trans(cast), mask=tl.trans(room))


def cast_by(
    x: Tensor, magnitudes: Tensor, dtype: torch.dtype, smallest: float, wide_rows: int, wide_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` (M, K), contiguous, scaled to fill ``dtype``: (M, K), (K, M), and the factor back (fp32, no dimension).

    Both have zeros up to ``wide_rows`` and ``wide_columns``. ``magnitudes`` (M,) are the largest of x's rows.
    Half precision only: from fp32, Triton 3.6 loses numbers when it turns a tile (seen on an H200).

    Raises:
        TypeError: for another precision.
    """
    if x.element_size() != 2:
        raise TypeError(f"x must be in half precision; got {x.dtype}; cast it first")
    (n_rows, n_columns), limit = x.shape, torch.finfo(dtype).max
    scale, unscale = (torch.empty((), dtype=torch.float32, device=x.device) for _ in range(2))
    scale_kernel[(1,)](magnitudes, scale, unscale, n_rows, limit, smallest, STRETCH, num_warps=32)
    narrow = torch.empty(wide_rows, wide_columns, dtype=dtype, device=x.device)
    turned = torch.empty(wide_columns, wide_rows, dtype=dtype, device=x.device)
    sizes = n_rows, n_columns, wide_rows, wide_columns, limit, ROWS, COLUMNS, BAND
    tiles = triton.cdiv(wide_rows, ROWS) * triton.cdiv(wide_columns, COLUMNS)
    cast_kernel[(tiles,)](x, scale, narrow, turned, *sizes, num_warps=WARPS)
    return narrow, turned, unscale
