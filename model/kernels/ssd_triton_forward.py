"""Mamba-2's scan in Triton, forward: each program walks one head's chunks with the state in registers.

B batch, T time, H heads, P head_dim, G groups, N d_state, C chunks, Q tokens a chunk. Needs ``triton``: reached through
``ssd_triton``. Decays are kept as base-2 logarithms, whose exponential is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
STRONGEST = tl.constexpr(-64.0)
"""A token that keeps less than 2^-64 of the state keeps none that fp32 beside it would show; bounded, the running sums
over a chunk keep the digits of weaker decays after it."""
TINY = tl.constexpr(1e-37)


@triton.jit
def joined(left: tl.tensor, left_starts: tl.tensor, right: tl.tensor, right_starts: tl.tensor) -> tl.tensor:
    """Two stretches of a sum that begins anew with each document."""
    return tl.where(right_starts > 0, right, left + right), left_starts | right_starts


@triton.jit
def prepare_kernel(
    step: tl.tensor, rate: tl.tensor, seq_idx: tl.tensor, vectors: tl.tensor, document: tl.tensor,
    time: tl.tensor, n_heads: tl.tensor,
    step_batch: tl.tensor, step_time: tl.tensor, step_head: tl.tensor, seq_batch: tl.tensor, seq_time: tl.tensor,
    size: tl.constexpr, width: tl.constexpr, packed: tl.constexpr,
) -> None:  # fmt: skip
    """What every kernel needs of each head's steps; programs (C, H / width, B).

    ``vectors`` (3, B, H, C Q): log2 of the decay from the chunk's or the document's start to each token; the same less
    log2 of the step, so that the difference of one's first and another's second is the logarithm of what a query sees
    of a key; the step. Sums begin anew with each document, so that none feels the rounding of another's.
    ``document`` (B, C Q): how many documents began in the chunk up to each token. Counted by changes, so that a number
    which comes back is another document. From ``time`` on steps are zero and no document begins.
    """
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    times = chunk * size + tl.arange(0, size)
    heads = tl.program_id(1) * width + tl.arange(0, width)
    padded = tl.num_programs(0) * size
    present = heads < n_heads
    steps_at = step + batch * step_batch + times[:, None] * step_time + heads[None, :] * step_head
    steps = tl.load(steps_at, mask=(times < time)[:, None] & present[None, :], other=0.0)
    rates = tl.load(rate + heads, mask=present, other=0.0)
    total = tl.maximum(steps * (rates * LOG2_E)[None, :], STRONGEST)
    if packed:
        inside = (times > 0) & (times < time)
        own = tl.load(seq_idx + batch * seq_batch + times * seq_time, mask=inside, other=0)
        before = tl.load(seq_idx + batch * seq_batch + (times - 1) * seq_time, mask=inside, other=0)
        starts = (own != before).to(tl.int32)
        tl.store(document + batch * padded + times, tl.cumsum(starts, 0))
        starts = tl.broadcast_to(starts[:, None], (size, width))
        total, _ = tl.associative_scan((total, starts), 0, joined)
    else:
        total = tl.cumsum(total, 0)
    source = tl.where(steps > 0, total - tl.log2(tl.maximum(steps, TINY)), float("inf"))
    place = vectors + (batch * n_heads + heads)[None, :] * padded + times[:, None]
    tl.store(place, total, present[None, :])
    place += tl.num_programs(2) * n_heads * padded
    tl.store(place, source, present[None, :])
    place += tl.num_programs(2) * n_heads * padded
    tl.store(place, steps, present[None, :])


@triton.jit
def rows(pointer: tl.tensor, stride: tl.tensor, times: tl.tensor, columns: tl.tensor, time: tl.tensor) -> tl.tensor:
    """A tile (Q, columns) with zeros from ``time`` on; the last dimension is contiguous."""
    return tl.load(pointer + times[:, None] * stride + columns[None, :], mask=(times < time)[:, None], other=0.0)


@triton.jit
def from_chunk_start(total: tl.tensor, document: tl.tensor, times: tl.tensor, packed: tl.constexpr) -> tl.tensor:
    """What each token (Q,) sees of the state before its chunk."""
    decay = tl.exp2(total)
    if packed:
        decay = tl.where(tl.load(document + times) == 0, decay, 0.0)
    return decay


@triton.jit
def to_chunk_end(
    source: tl.tensor, whole: tl.tensor, document: tl.tensor, times: tl.tensor, end: tl.tensor, packed: tl.constexpr
) -> tl.tensor:
    """What the state after the chunk, whose last place is ``end``, holds of each token's (Q,) input."""
    decay = whole - source
    if packed:
        decay = tl.where(tl.load(document + times) == tl.load(document + end), decay, float("-inf"))
    return tl.exp2(decay)


@triton.jit
def through_chunk(whole: tl.tensor, document: tl.tensor, end: tl.tensor, packed: tl.constexpr) -> tl.tensor:
    """What the state after the chunk holds of the state before."""
    decay = tl.exp2(whole)
    if packed:
        decay = tl.where(tl.load(document + end) == 0, decay, 0.0)
    return decay


@triton.jit
def scan_kernel(
    x: tl.tensor, vectors: tl.tensor, b: tl.tensor, c: tl.tensor, skip: tl.tensor, document: tl.tensor, y: tl.tensor,
    time: tl.tensor, plane: tl.tensor, n_heads: tl.tensor, heads_per_group: tl.tensor,
    x_batch: tl.tensor, x_time: tl.tensor, x_head: tl.tensor,
    b_batch: tl.tensor, b_time: tl.tensor, b_group: tl.tensor,
    c_batch: tl.tensor, c_time: tl.tensor, c_group: tl.tensor,
    y_batch: tl.tensor, y_time: tl.tensor, y_head: tl.tensor,
    head_dim: tl.constexpr, d_state: tl.constexpr, size: tl.constexpr, width: tl.constexpr, packed: tl.constexpr,
) -> None:  # fmt: skip
    """``width`` columns of one head of one row of the batch; programs (B * H * P / width,).

    ``plane`` is the distance between the planes of ``vectors``, here and in the backward pass's kernels.
    """
    parts: tl.constexpr = head_dim // width
    batch = (tl.program_id(0) // (n_heads * parts)).to(tl.int64)
    head = (tl.program_id(0) // parts) % n_heads
    group = head // heads_per_group
    columns = (tl.program_id(0) % parts) * width + tl.arange(0, width)
    states, order = tl.arange(0, d_state), tl.arange(0, size)
    padded = tl.cdiv(time, size) * size
    x += batch * x_batch + head * x_head
    y += batch * y_batch + head * y_head
    b += batch * b_batch + group * b_group
    c += batch * c_batch + group * c_group
    totals = vectors + (batch * n_heads + head) * padded
    sources = totals + plane
    document += batch * padded
    own_skip = tl.load(skip + head)
    state = tl.zeros((d_state, width), tl.float32)
    for first in range(0, time, size):
        times, end = first + order, first + size - 1
        x_tile = rows(x, x_time, times, columns, time)
        b_tile = rows(b, b_time, times, states, time)
        c_tile = rows(c, c_time, times, states, time)
        total, source, whole = tl.load(totals + times), tl.load(sources + times), tl.load(totals + end)
        # Masked before the exponential: above the diagonal it would overflow.
        seen = order[:, None] >= order[None, :]
        if packed:
            own = tl.load(document + times)
            seen = seen & (own[:, None] == own[None, :])
        decay = tl.exp2(tl.where(seen, total[:, None] - source[None, :], float("-inf")))
        weights = tl.dot(c_tile, tl.trans(b_tile)) * decay
        out = tl.dot(c_tile, state.to(c_tile.dtype)) * from_chunk_start(total, document, times, packed)[:, None]
        out = tl.dot(weights.to(x_tile.dtype), x_tile, acc=out)
        out += own_skip * x_tile.to(tl.float32)
        tl.store(y + times[:, None] * y_time + columns[None, :], out.to(y.dtype.element_ty), (times < time)[:, None])
        added = (x_tile * to_chunk_end(source, whole, document, times, end, packed)[:, None]).to(x_tile.dtype)
        state = tl.dot(tl.trans(b_tile), added, acc=state * through_chunk(whole, document, end, packed))
