"""Gated linear attention in Triton: the chunks of all documents, sums of decays, states, and outputs.

T tokens of all rows laid end to end, H heads, K head_k_dim, V head_v_dim, D documents, C chunks, Q tokens a chunk.
Needs ``triton``: reached through ``gla_triton``. A chunk belongs to one document, so nothing is masked by documents and
none feels another's rounding; decays are kept as base-2 logarithms, whose exponential is one instruction.
"""

# mypy: allow-untyped-defs
# A kernel's arguments are whatever Triton makes of tensors and numbers.

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
STRONGEST = tl.constexpr(-64.0)
"""A channel that keeps less than 2^-64 keeps nothing that shows beside what comes; bounded, the sums over a chunk keep
the digits of weaker decays after it."""


@triton.jit
def gla_chunks_kernel(edges, spans, firsts, n_chunks, size: tl.constexpr, n_edges: tl.constexpr, width: tl.constexpr):
    """Cut documents into chunks; programs (D + 1,), a document each, and one for the chunks left over, which are empty.

    ``edges`` (D + 1,), with ``width`` a power of two above D; ``spans`` (C, 2) takes each chunk's first token and the
    one after its last, ``firsts`` (D + 1,) each document's first chunk.
    """
    own, order = tl.program_id(0), tl.arange(0, width)
    start = tl.load(edges + order, mask=order < n_edges - 1, other=0)
    end = tl.load(edges + order + 1, mask=order < n_edges - 1, other=0)
    counts = (end - start + size - 1) // size
    first = tl.sum(tl.where(order < own, counts, 0), 0)
    tl.store(firsts + own, first)
    if own < n_edges - 1:
        token, last = tl.load(edges + own), tl.load(edges + own + 1)
        while token < last:
            tl.store(spans + 2 * first, token)
            tl.store(spans + 2 * first + 1, tl.minimum(token + size, last))
            token += size
            first += 1
    else:
        while first < n_chunks:
            tl.store(spans + 2 * first, 0)
            tl.store(spans + 2 * first + 1, 0)
            first += 1


@triton.jit
def tile(pointer, stride, times, columns, end):
    """Rows ``times`` of a tensor whose tokens are ``stride`` apart, (Q, columns), with zeros from ``end`` on."""
    at = times.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointer + at, mask=(times < end)[:, None], other=0.0)


@triton.jit
def gla_sums_kernel(log_decay, sums, spans, n_heads, head_k: tl.constexpr, size: tl.constexpr):
    """Running sums over each chunk of log2 of the decays, into ``sums`` (T, H, K); programs (C, H)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(spans + 2 * chunk), tl.load(spans + 2 * chunk + 1)
    times, keys = start + tl.arange(0, size), tl.arange(0, head_k)
    decays = tile(log_decay + head * head_k, n_heads * head_k, times, keys, end)
    total = tl.cumsum(tl.maximum(decays * LOG2_E, STRONGEST), 0)
    at = times.to(tl.int64)[:, None] * n_heads * head_k + head * head_k + keys[None, :]
    tl.store(sums + at, total, mask=(times < end)[:, None])


@triton.jit
def gla_states_kernel(
    k, v, sums, spans, firsts, out, scale, n_heads,
    head_k: tl.constexpr, head_v: tl.constexpr, size: tl.constexpr, width: tl.constexpr, backward: tl.constexpr,
):  # fmt: skip
    """The state before each chunk; ``backward`` the gradient of the one after it, from q as k and o's gradient as v.

    ``out`` (C, H, V, K); programs (D * H * K / width,), each with ``width`` key channels of one head of one document.
    """
    parts: tl.constexpr = head_k // width
    head = (tl.program_id(0) // parts) % n_heads
    document = tl.program_id(0) // (parts * n_heads)
    keys = head * head_k + (tl.program_id(0) % parts) * width + tl.arange(0, width)
    values, order = tl.arange(0, head_v), tl.arange(0, size)
    first, after = tl.load(firsts + document), tl.load(firsts + document + 1)
    place = values[:, None] * head_k + (keys - head * head_k)[None, :]
    state = tl.zeros((head_v, width), tl.float32)
    for number in range(0, after - first):
        chunk = after - 1 - number if backward else first + number
        start, end = tl.load(spans + 2 * chunk), tl.load(spans + 2 * chunk + 1)
        times = start + order
        k_tile = tile(k, n_heads * head_k, times, keys, end)
        v_tile = tile(v + head * head_v, n_heads * head_v, times, values, end)
        total = tile(sums, n_heads * head_k, times, keys, end)
        whole = tl.load(sums + (end - 1).to(tl.int64) * n_heads * head_k + keys)
        tl.store(out + (chunk.to(tl.int64) * n_heads + head) * head_v * head_k + place, state.to(out.dtype.element_ty))
        decay = tl.exp2(total) * scale if backward else tl.exp2(whole[None, :] - total)
        added = (k_tile * decay).to(k_tile.dtype)
        state = tl.dot(tl.trans(v_tile), added, acc=state * tl.exp2(whole)[None, :])


@triton.jit
def ours(sums, start, end, stride, keys, reach: tl.constexpr, strong: tl.constexpr):
    """Whether a chunk is one of this launch's: one whose decays all stay within ``reach``, or one of the others."""
    mine = start < end
    if mine:
        whole = tl.load(sums + (end - 1).to(tl.int64) * stride + keys)
        mine = (tl.min(whole, 0) < -reach) == strong
    return mine


@triton.jit
def across(sums, total, stride, start, keys, order, end, level):
    """Decay (Q, K) between each token of a chunk and the border in the middle of its block of ``2 2^level`` tokens.

    What a key left of the border loses on its way there, and a query right of it since: the decay between them is the
    product, and no exponent is above zero.
    """
    border = start + ((order >> level + 1) * 2 + 1 << level) - 1
    return tl.exp2(-tl.abs(total - tile(sums, stride, border, keys, end)))


@triton.jit
def gla_outputs_kernel(
    q, k, v, sums, states, spans, o, scores, scale, n_heads,
    head_k: tl.constexpr, head_v: tl.constexpr, size: tl.constexpr, levels: tl.constexpr, reach: tl.constexpr,
    strong: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk of one head, and its ``scores`` (T, H, Q), zero above the diagonal; programs (C, H).

    Decays that stay within 2^-reach over a chunk are ratios to the one at its middle, and all pairs one product. If
    ``strong``, pairs are joined two by two instead: a block's right half looks at its left half through the border
    between them. Halves of all blocks of one size are one product, of which the pairs within a block are kept.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(spans + 2 * chunk), tl.load(spans + 2 * chunk + 1)
    order, keys, values = tl.arange(0, size), tl.arange(0, head_k), tl.arange(0, head_v)
    times, stride = start + order, n_heads * head_k
    sums += head * head_k
    if ours(sums, start, end, stride, keys, reach, strong):
        q_tile = tile(q + head * head_k, stride, times, keys, end)
        k_tile = tile(k + head * head_k, stride, times, keys, end)
        total = tile(sums, stride, times, keys, end)
        if strong:
            alike = tl.sum(q_tile.to(tl.float32) * k_tile.to(tl.float32), 1)
            pairs = tl.where(order[:, None] == order[None, :], alike[:, None], 0.0)
            for level in range(0, levels):
                number = order >> level
                side = tl.where((number % 2 == 1)[:, None], q_tile, k_tile)
                side = (side * across(sums, total, stride, start, keys, order, end, level)).to(q_tile.dtype)
                # The right half of a block and the left half of the same one have numbers that differ by one.
                seen = (number[:, None] == number[None, :] + 1) & (number % 2 == 1)[:, None]
                pairs = tl.where(seen, tl.dot(side, tl.trans(side)), pairs)
        else:
            middle = 0.5 * tl.load(sums + (end - 1).to(tl.int64) * stride + keys)[None, :]
            queries = (q_tile * tl.exp2(total - middle)).to(q_tile.dtype)
            pairs = tl.dot(queries, tl.trans((k_tile * tl.exp2(middle - total)).to(k_tile.dtype)))
            pairs = tl.where(order[:, None] >= order[None, :], pairs, 0.0)
        weights = (pairs * scale).to(q_tile.dtype)
        at = times.to(tl.int64)[:, None] * n_heads * size + head * size + order[None, :]
        tl.store(scores + at, weights, mask=(times < end)[:, None])
        place = (chunk.to(tl.int64) * n_heads + head) * head_v * head_k
        state = tl.load(states + place + values[:, None] * head_k + keys[None, :])
        out = tl.dot((q_tile * (tl.exp2(total) * scale)).to(q_tile.dtype), tl.trans(state))
        out = tl.dot(weights, tile(v + head * head_v, n_heads * head_v, times, values, end), acc=out)
        at = times.to(tl.int64)[:, None] * n_heads * head_v + head * head_v + values[None, :]
        tl.store(o + at, out.to(o.dtype.element_ty), mask=(times < end)[:, None])
