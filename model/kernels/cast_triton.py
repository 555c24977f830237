"""Casting a half-precision tensor to 8 bits with a scale of its own, and turning it, by Triton. Imported where it runs.

Two readings: the first finds the largest magnitude, the second casts. Nothing depends on the order of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024
"""Programs that share the search for the largest magnitude; each leaves one number."""
STRETCH = 4096
ROWS, COLUMNS = 128, 64


@triton.jit
def amax_kernel(
    x: tl.tensor, partial: tl.tensor, size: tl.tensor, programs: tl.constexpr, stretch: tl.constexpr
) -> None:
    """Each program's largest magnitude of ``x`` (size,), into ``partial`` (programs,)."""
    largest = tl.zeros((stretch,), tl.float32)
    for start in range(tl.program_id(0) * stretch, size, programs * stretch):
        offset = start + tl.arange(0, stretch)
        value = tl.load(x + offset, mask=offset < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    tl.store(partial + tl.program_id(0), tl.max(largest, 0))


@triton.jit
def cast_kernel(
    x: tl.tensor,
    partial: tl.tensor,
    narrow: tl.tensor,
    turned: tl.tensor,
    unscale: tl.tensor,
    n_rows: tl.tensor,
    n_columns: tl.tensor,
    limit: tl.constexpr,
    smallest: tl.constexpr,
    programs: tl.constexpr,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
) -> None:
    """One tile of ``x`` (n_rows, n_columns), scaled and saturated, into ``narrow`` and, turned, into ``turned``."""
    amax = tl.maximum(tl.max(tl.load(partial + tl.arange(0, programs)), 0), smallest)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(unscale, tl.div_rn(amax, limit))
    row = tl.program_id(0).to(tl.int64) * row_tile + tl.arange(0, row_tile)
    column = tl.program_id(1).to(tl.int64) * column_tile + tl.arange(0, column_tile)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    value = tl.load(x + row[:, None] * n_columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = value * tl.div_rn(limit, amax)
    # NaN must stay NaN: a comparison with it is false, so it is kept.
    value = tl.where(value > limit, limit, tl.where(value < -limit, -limit, value))
    cast = value.to(narrow.dtype.element_ty)
    tl.store(narrow + row[:, None] * n_columns + column[None, :], cast, mask=inside)
    tl.store(turned + column[:, None] * n_rows + row[None, :], tl.trans(cast), mask=tl.trans(inside))


def cast_both(x: Tensor, dtype: torch.dtype, smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` (M, K), contiguous, scaled to fill ``dtype``: (M, K), (K, M), and the factor back (fp32, no dimension).

    Half precision only: from fp32, Triton 3.6 loses numbers when it turns a tile (seen on an H200).

    Raises:
        TypeError: for another precision.
    """
    if x.element_size() != 2:
        raise TypeError(f"x must be in half precision; got {x.dtype}; cast it first")
    n_rows, n_columns = x.shape
    partial = torch.empty(PROGRAMS, dtype=torch.float32, device=x.device)
    amax_kernel[(PROGRAMS,)](x, partial, x.numel(), PROGRAMS, STRETCH, num_warps=4)
    narrow = torch.empty(n_rows, n_columns, dtype=dtype, device=x.device)
    turned = torch.empty(n_columns, n_rows, dtype=dtype, device=x.device)
    unscale = torch.empty((), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n_rows, ROWS), triton.cdiv(n_columns, COLUMNS))
    limit = torch.finfo(dtype).max
    sizes = n_rows, n_columns, limit, smallest, PROGRAMS, ROWS, COLUMNS
    cast_kernel[grid](x, partial, narrow, turned, unscale, *sizes, num_warps=4)
    return narrow, turned, unscale
