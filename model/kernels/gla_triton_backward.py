"""Gated linear attention in Triton, backward: all chunks at once, from the states and their gradients between them.

T tokens of all rows laid end to end, H heads, K head_k_dim, V head_v_dim, C chunks, Q tokens a chunk. Needs ``triton``:
reached through ``gla_triton``. Every sum has one order: the same bits each time.
"""

# mypy: allow-untyped-defs
# A kernel's arguments are whatever Triton makes of tensors and numbers.

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.gla_triton_forward import across, ours, tile


@triton.jit
def gla_values_kernel(
    d_o, k, v, sums, d_after, spans, scores, d_v, d_scores, scale, n_heads,
    head_k: tl.constexpr, head_v: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """The gradient by v, and that by scores before their scale (T, H, Q), zero above the diagonal; programs (C, H)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(spans + 2 * chunk), tl.load(spans + 2 * chunk + 1)
    if start < end:
        order, keys, values = tl.arange(0, size), tl.arange(0, head_k), tl.arange(0, head_v)
        times, stride = start + order, n_heads * head_k
        inside = (times < end)[:, None]
        d_tile = tile(d_o + head * head_v, n_heads * head_v, times, values, end)
        v_tile = tile(v + head * head_v, n_heads * head_v, times, values, end)
        at = times.to(tl.int64)[:, None] * n_heads * size + head * size + order[None, :]
        d_pairs = tl.where(order[:, None] >= order[None, :], tl.dot(d_tile, tl.trans(v_tile)) * scale, 0.0)
        tl.store(d_scores + at, d_pairs.to(d_scores.dtype.element_ty), mask=inside)
        weights = tl.load(scores + at, mask=inside, other=0.0)
        d_values = tl.dot(tl.trans(weights), d_tile)
        k_tile = tile(k + head * head_k, stride, times, keys, end)
        total = tile(sums + head * head_k, stride, times, keys, end)
        whole = tl.load(sums + (end - 1).to(tl.int64) * stride + head * head_k + keys)
        kept = (k_tile * tl.exp2(whole[None, :] - total)).to(k_tile.dtype)
        place = (chunk.to(tl.int64) * n_heads + head) * head_v * head_k
        d_state = tl.load(d_after + place + values[:, None] * head_k + keys[None, :])
        d_values = tl.dot(kept, tl.trans(d_state), acc=d_values)
        at = times.to(tl.int64)[:, None] * n_heads * head_v + head * head_v + values[None, :]
        tl.store(d_v + at, d_values.to(d_v.dtype.element_ty), mask=inside)


@triton.jit
def gla_keys_kernel(
    d_o, q, k, v, sums, before, d_after, spans, d_scores, d_q, d_k, d_decay, scale, n_heads,
    head_k: tl.constexpr, head_v: tl.constexpr, size: tl.constexpr, levels: tl.constexpr, reach: tl.constexpr,
    strong: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Gradients by q, k and the log decays of ``width`` key channels of a chunk of a head; programs (C, H, K / width).

    Chunks and their pairs are taken as by ``gla_outputs_kernel``. A pair gives the same number to the query's and to
    the key's sum of decays, so that what cancels cancels.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(spans + 2 * chunk), tl.load(spans + 2 * chunk + 1)
    order, values = tl.arange(0, size), tl.arange(0, head_v)
    keys, stride = tl.program_id(2) * width + tl.arange(0, width), n_heads * head_k
    sums += head * head_k
    if ours(sums, start, end, stride, tl.arange(0, head_k), reach, strong):
        times = start + order
        inside = (times < end)[:, None]
        place = (chunk.to(tl.int64) * n_heads + head) * head_v * head_k + values[:, None] * head_k + keys[None, :]
        state, d_state = tl.load(before + place), tl.load(d_after + place)
        whole = tl.load(sums + (end - 1).to(tl.int64) * stride + keys)
        d_whole = tl.exp2(whole) * tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
        d_queries = tl.dot(tile(d_o + head * head_v, n_heads * head_v, times, values, end), state)
        d_keys = tl.dot(tile(v + head * head_v, n_heads * head_v, times, values, end), d_state)

        total = tile(sums, stride, times, keys, end)
        q_tile = tile(q + head * head_k, stride, times, keys, end)
        k_tile = tile(k + head * head_k, stride, times, keys, end)
        at = times.to(tl.int64)[:, None] * n_heads * size + head * size + order[None, :]
        d_pairs = tl.load(d_scores + at, mask=inside, other=0.0)
        if strong:
            d_queries *= tl.exp2(total) * scale
            d_keys *= tl.exp2(whole[None, :] - total)
            kept = k_tile * d_keys
            d_total = q_tile * d_queries - kept
            alike = tl.sum(tl.where(order[:, None] == order[None, :], d_pairs.to(tl.float32), 0.0), 1)[:, None]
            d_queries += alike * k_tile
            d_keys += alike * q_tile
            d_pairs = tl.where(order[:, None] > order[None, :], d_pairs, tl.trans(d_pairs))
            for level in range(0, levels):
                number = order >> level
                right = (number % 2 == 1)[:, None]
                decay = across(sums, total, stride, start, keys, order, end, level)
                side = (tl.where(right, q_tile, k_tile) * decay).to(q_tile.dtype)
                # Halves of one block look at each other: queries at keys, and keys at queries.
                facing = (number[:, None] // 2 == number[None, :] // 2) & (number[:, None] != number[None, :])
                given = tl.dot(tl.where(facing, d_pairs, 0.0).to(side.dtype), side)
                change = side * given
                d_total += tl.where(right, change, -change)
                given *= decay
                d_queries += tl.where(right, given, 0.0)
                d_keys += tl.where(right, 0.0, given)
        else:
            middle = 0.5 * whole[None, :]
            since, until = tl.exp2(total - middle), tl.exp2(middle - total)
            queries, side = (q_tile * since).to(q_tile.dtype), (k_tile * until).to(k_tile.dtype)
            d_queries = tl.dot(d_pairs, side, acc=d_queries * (tl.exp2(middle) * scale))
            d_keys *= tl.exp2(whole[None, :] - middle)
            kept = side * d_keys
            d_keys = tl.dot(tl.trans(d_pairs), queries, acc=d_keys)
            d_total = queries * d_queries - side * d_keys
            d_queries *= since
            d_keys *= until
        d_whole += tl.sum(kept, 0)
        at = times.to(tl.int64)[:, None] * stride + head * head_k + keys[None, :]
        tl.store(d_q + at, d_queries.to(d_q.dtype.element_ty), mask=inside)
        tl.store(d_k + at, d_keys.to(d_k.dtype.element_ty), mask=inside)
        tl.store(d_decay + at, tl.cumsum(d_total, 0, reverse=True) + d_whole[None, :], mask=inside)
