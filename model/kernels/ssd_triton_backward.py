"""Mamba-2's scan in Triton, backward: states and their gradients between chunks, then all chunks at once.

B batch, T time, H heads, P head_dim, G groups, N d_state, C chunks, Q tokens a chunk, K blocks of heads. Needs
``triton``: reached through ``ssd_triton``. ``vectors`` and ``document`` come from ``prepare_kernel``. Sums over heads
go through fp32 buffers, summed in one order: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.ssd_triton_forward import from_chunk_start, joined, rows, through_chunk, to_chunk_end


@triton.jit
def states_kernel(
    x: tl.tensor, vectors: tl.tensor, b: tl.tensor, document: tl.tensor, out: tl.tensor,
    time: tl.tensor, plane: tl.tensor, n_heads: tl.tensor, heads_per_group: tl.tensor,
    x_batch: tl.tensor, x_time: tl.tensor, x_head: tl.tensor,
    b_batch: tl.tensor, b_time: tl.tensor, b_group: tl.tensor,
    head_dim: tl.constexpr, d_state: tl.constexpr, size: tl.constexpr, width: tl.constexpr, packed: tl.constexpr,
    backward: tl.constexpr,
) -> None:  # fmt: skip
    """The state before each chunk; ``backward`` the gradient of the state after it, from y's as x and C as B.

    ``out`` (B, C, H, N, P); programs (B * H * P / width,). The gradient runs from the end, and a chunk passes on what
    reached its start: sum_q decay since the start_q C_q dy_q^T, beside what goes through.
    """
    parts: tl.constexpr = head_dim // width
    batch = (tl.program_id(0) // (n_heads * parts)).to(tl.int64)
    head = (tl.program_id(0) // parts) % n_heads
    columns = (tl.program_id(0) % parts) * width + tl.arange(0, width)
    states, order = tl.arange(0, d_state), tl.arange(0, size)
    n_chunks = tl.cdiv(time, size)
    x += batch * x_batch + head * x_head
    b += batch * b_batch + (head // heads_per_group) * b_group
    totals = vectors + (batch * n_heads + head) * n_chunks * size
    sources = totals + plane
    document += batch * n_chunks * size
    out += (batch * n_chunks * n_heads + head) * d_state * head_dim
    state = tl.zeros((d_state, width), tl.float32)
    for number in range(0, n_chunks):
        chunk = n_chunks - 1 - number if backward else number
        times, end = chunk * size + order, chunk * size + size - 1
        x_tile = rows(x, x_time, times, columns, time)
        b_tile = rows(b, b_time, times, states, time)
        whole = tl.load(totals + end)
        if backward:
            weight = from_chunk_start(tl.load(totals + times), document, times, packed)
        else:
            weight = to_chunk_end(tl.load(sources + times), whole, document, times, end, packed)
        place = out + tl.cast(chunk, tl.int64) * n_heads * d_state * head_dim
        tl.store(place + states[:, None] * head_dim + columns[None, :], state.to(out.dtype.element_ty))
        added = (x_tile * weight[:, None]).to(x_tile.dtype)
        state = tl.dot(tl.trans(b_tile), added, acc=state * through_chunk(whole, document, end, packed))


@triton.jit
def between_kernel(
    d_y: tl.tensor, x: tl.tensor, vectors: tl.tensor, c: tl.tensor, document: tl.tensor,
    before: tl.tensor, d_after: tl.tensor, d_bc: tl.tensor, shares: tl.tensor, d_through: tl.tensor,
    time: tl.tensor, n_heads: tl.tensor, heads_per_group: tl.tensor, heads_per_block: tl.tensor,
    d_y_batch: tl.tensor, d_y_time: tl.tensor, d_y_head: tl.tensor,
    x_batch: tl.tensor, x_time: tl.tensor, x_head: tl.tensor,
    c_batch: tl.tensor, c_time: tl.tensor, c_group: tl.tensor,
    head_dim: tl.constexpr, d_state: tl.constexpr, size: tl.constexpr, packed: tl.constexpr,
) -> None:  # fmt: skip
    """What goes between chunks gives to B, C and the decays of one chunk, for a block of heads; programs (K, C, B).

    ``before`` and ``d_after`` (B, C, H, N, P) from ``states_kernel``. ``d_bc`` (2, B, K, T, N) takes each program's
    share; ``shares[0]`` (B, H, C Q) the gradient of log decay from the chunk's start to each token, ``shares[4]`` that
    of the skip, ``d_through`` (B, C, H) that of the whole chunk's log decay.
    """
    block, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_chunks, n_batch = tl.num_programs(1), tl.num_programs(2)
    columns, states, order = tl.arange(0, head_dim), tl.arange(0, d_state), tl.arange(0, size)
    times, end = chunk * size + order, chunk * size + size - 1
    c += batch * c_batch + (block * heads_per_block // heads_per_group) * c_group
    c_tile = rows(c, c_time, times, states, time)
    document += batch * n_chunks * size
    plane = n_batch.to(tl.int64) * n_heads * n_chunks * size
    d_b = tl.zeros((size, d_state), tl.float32)
    d_c = tl.zeros((size, d_state), tl.float32)
    for number in range(0, heads_per_block):
        head = block * heads_per_block + number
        at = (batch * n_heads + head) * n_chunks * size
        total, whole = tl.load(vectors + at + times), tl.load(vectors + at + end)
        source = tl.load(vectors + plane + at + times)
        x_tile = rows(x + batch * x_batch + head * x_head, x_time, times, columns, time)
        d_y_tile = rows(d_y + batch * d_y_batch + head * d_y_head, d_y_time, times, columns, time)
        chunk_at = (batch * n_chunks + chunk) * n_heads + head
        place = chunk_at * d_state * head_dim + states[:, None] * head_dim + columns[None, :]
        state, d_state_after = tl.load(before + place), tl.load(d_after + place)
        to_end = to_chunk_end(source, whole, document, times, end, packed)
        d_b = tl.dot((x_tile * to_end[:, None]).to(x_tile.dtype), tl.trans(d_state_after), acc=d_b)
        weighted = (d_y_tile * from_chunk_start(total, document, times, packed)[:, None]).to(d_y_tile.dtype)
        d_c = tl.dot(weighted, tl.trans(state), acc=d_c)
        tl.store(shares + at + times, tl.sum(weighted * tl.dot(c_tile, state), 1))
        d_skip = tl.sum(x_tile.to(tl.float32) * d_y_tile.to(tl.float32), 1)
        tl.store(shares + 4 * plane + at + times, d_skip)
        kept = tl.sum(tl.sum(state.to(tl.float32) * d_state_after.to(tl.float32), 1), 0)
        tl.store(d_through + chunk_at, kept * through_chunk(whole, document, end, packed))
    inside = (times < time)[:, None]
    share = d_bc + ((batch * tl.num_programs(0) + block) * time + times)[:, None] * d_state + states[None, :]
    tl.store(share, d_b, inside)
    tl.store(share + n_batch.to(tl.int64) * tl.num_programs(0) * time * d_state, d_c, inside)


@triton.jit
def within_kernel(
    d_y: tl.tensor, x: tl.tensor, vectors: tl.tensor, b: tl.tensor, c: tl.tensor, skip: tl.tensor,
    document: tl.tensor, d_after: tl.tensor, d_x: tl.tensor, d_bc: tl.tensor, shares: tl.tensor,
    time: tl.tensor, n_heads: tl.tensor, heads_per_group: tl.tensor, heads_per_block: tl.tensor,
    d_y_batch: tl.tensor, d_y_time: tl.tensor, d_y_head: tl.tensor,
    x_batch: tl.tensor, x_time: tl.tensor, x_head: tl.tensor,
    b_batch: tl.tensor, b_time: tl.tensor, b_group: tl.tensor,
    c_batch: tl.tensor, c_time: tl.tensor, c_group: tl.tensor,
    d_x_batch: tl.tensor, d_x_time: tl.tensor, d_x_head: tl.tensor,
    head_dim: tl.constexpr, d_state: tl.constexpr, size: tl.constexpr, packed: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of x, and what pairs of tokens of one chunk give to B, C and the decays; programs (K, C, B).

    ``d_bc`` is added to. ``shares[1:4]`` (B, H, C Q): gradients of log decay at the query's and, but for the step, the
    key's side, and of what the chunk's end holds of each token, but for the step. Pairs stand as (key, query).
    """
    block, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_chunks, n_batch = tl.num_programs(1), tl.num_programs(2)
    group = block * heads_per_block // heads_per_group
    columns, states, order = tl.arange(0, head_dim), tl.arange(0, d_state), tl.arange(0, size)
    times, end = chunk * size + order, chunk * size + size - 1
    inside = (times < time)[:, None]
    b_tile = rows(b + batch * b_batch + group * b_group, b_time, times, states, time)
    c_tile = rows(c + batch * c_batch + group * c_group, c_time, times, states, time)
    document += batch * n_chunks * size
    seen = order[:, None] <= order[None, :]
    if packed:
        own = tl.load(document + times)
        seen = seen & (own[:, None] == own[None, :])
    scores = tl.where(seen, tl.dot(b_tile, tl.trans(c_tile)), 0.0)
    d_scores = tl.zeros((size, size), tl.float32)
    plane = n_batch.to(tl.int64) * n_heads * n_chunks * size
    for number in range(0, heads_per_block):
        head = block * heads_per_block + number
        at = (batch * n_heads + head) * n_chunks * size
        total, whole = tl.load(vectors + at + times), tl.load(vectors + at + end)
        steps = tl.load(vectors + 2 * plane + at + times)
        x_tile = rows(x + batch * x_batch + head * x_head, x_time, times, columns, time)
        d_y_tile = rows(d_y + batch * d_y_batch + head * d_y_head, d_y_time, times, columns, time)
        place = ((batch * n_chunks + chunk) * n_heads + head) * d_state * head_dim
        d_state_after = tl.load(d_after + place + states[:, None] * head_dim + columns[None, :])
        # Bounded, not masked: what no token sees is zero in ``scores``, and in ``d_scores`` after the loop.
        decay = tl.exp2(tl.minimum(total[None, :] - total[:, None], 0.0))
        to_end = to_chunk_end(total, whole, document, times, end, packed)
        kept = tl.dot(b_tile, d_state_after) * to_end[:, None]
        wide = x_tile.to(tl.float32)
        tl.store(shares + 3 * plane + at + times, tl.sum(wide * kept, 1))
        d_input = tl.dot((scores * decay).to(x_tile.dtype), d_y_tile, acc=kept)
        d_x_tile = d_input * steps[:, None] + tl.load(skip + head) * d_y_tile.to(tl.float32)
        d_x_at = d_x + batch * d_x_batch + head * d_x_head + times[:, None] * d_x_time + columns[None, :]
        tl.store(d_x_at, d_x_tile.to(d_x.dtype.element_ty), inside)
        weighted = tl.dot(x_tile, tl.trans(d_y_tile)) * decay
        d_scores += weighted * steps[:, None]
        weighted *= scores
        tl.store(shares + plane + at + times, tl.sum(weighted * steps[:, None], 0))
        tl.store(shares + 2 * plane + at + times, tl.sum(weighted, 1))
    d_scores = tl.where(seen, d_scores, 0.0)
    share = d_bc + ((batch * tl.num_programs(0) + block) * time + times)[:, None] * d_state + states[None, :]
    d_b = tl.load(share, mask=inside, other=0.0)
    tl.store(share, tl.dot(d_scores.to(c_tile.dtype), c_tile, acc=d_b), inside)
    share += n_batch.to(tl.int64) * tl.num_programs(0) * time * d_state
    d_c = tl.load(share, mask=inside, other=0.0)
    tl.store(share, tl.dot(tl.trans(d_scores).to(b_tile.dtype), b_tile, acc=d_c), inside)


@triton.jit
def gather_steps_kernel(
    vectors: tl.tensor, document: tl.tensor, shares: tl.tensor, d_through: tl.tensor, rate: tl.tensor,
    d_step: tl.tensor, d_rate_skip: tl.tensor,
    time: tl.tensor, n_heads: tl.tensor, size: tl.constexpr, width: tl.constexpr, packed: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of step (B, T, H), and each chunk's of rate and skip (2, B, C, H); programs (C, H / width, B).

    A decay weighs what passes over it: pairs around it, inputs before it, and the state before the chunk.
    """
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    n_chunks, n_batch = tl.num_programs(0), tl.num_programs(2).to(tl.int64)
    times = chunk * size + tl.arange(0, size)
    heads = tl.program_id(1) * width + tl.arange(0, width)
    present = heads < n_heads
    mask = (times < time)[:, None] & present[None, :]
    plane = n_batch * n_heads * n_chunks * size
    at = (batch * n_heads + heads)[None, :] * n_chunks * size + times[:, None]
    steps = tl.load(vectors + 2 * plane + at, mask=mask, other=0.0)
    queries = tl.load(shares + plane + at, mask=mask, other=0.0) + tl.load(shares + at, mask=mask, other=0.0)
    keys = tl.load(shares + 2 * plane + at, mask=mask, other=0.0)
    kept = tl.load(shares + 3 * plane + at, mask=mask, other=0.0)
    chunk_at = (batch * n_chunks + chunk) * n_heads + heads
    d_kept = steps * kept
    d_decay = queries - steps * keys
    if packed:
        document += batch * n_chunks * size
        own, after = tl.load(document + times), tl.load(document + tl.minimum(times + 1, (chunk + 1) * size - 1))
        ends = tl.broadcast_to((own != after).to(tl.int32)[:, None], (size, width))
        d_decay, _ = tl.associative_scan((d_decay, ends), 0, joined, reverse=True)
    else:
        d_decay = tl.cumsum(d_decay, 0, reverse=True)
    d_decay += tl.cumsum(d_kept, 0) - d_kept + tl.load(d_through + chunk_at, mask=present, other=0.0)[None, :]
    rates = tl.load(rate + heads, mask=present, other=0.0)
    d_step += (batch * time + times)[:, None] * n_heads + heads[None, :]
    tl.store(d_step, keys + kept + d_decay * rates[None, :], mask)
    tl.store(d_rate_skip + chunk_at, tl.sum(d_decay * steps, 0), present)
    d_skip = tl.sum(tl.load(shares + 4 * plane + at, mask=mask, other=0.0), 0)
    tl.store(d_rate_skip + n_batch * n_chunks * n_heads + chunk_at, d_skip, present)


@triton.jit
def gather_heads_kernel(
    d_bc: tl.tensor, d_b: tl.tensor, d_c: tl.tensor,
    time: tl.tensor, n_blocks: tl.tensor, blocks_per_group: tl.tensor,
    d_b_batch: tl.tensor, d_b_time: tl.tensor, d_b_group: tl.tensor,
    d_c_batch: tl.tensor, d_c_time: tl.tensor, d_c_group: tl.tensor,
    d_state: tl.constexpr, size: tl.constexpr,
) -> None:  # fmt: skip
    """``d_bc`` (2, B, K, T, N) summed over the blocks of each group, in order; programs (T / size, G, B)."""
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    times, states = tl.program_id(0) * size + tl.arange(0, size), tl.arange(0, d_state)
    inside = (times < time)[:, None]
    total_b = tl.zeros((size, d_state), tl.float32)
    total_c = tl.zeros((size, d_state), tl.float32)
    for number in range(0, blocks_per_group):
        block = batch * n_blocks + group * blocks_per_group + number
        share = d_bc + (block * time + times)[:, None] * d_state + states[None, :]
        total_b += tl.load(share, mask=inside, other=0.0)
        total_c += tl.load(share + tl.num_programs(2) * n_blocks * time * d_state, mask=inside, other=0.0)
    d_b += batch * d_b_batch + group * d_b_group + times[:, None] * d_b_time + states[None, :]
    d_c += batch * d_c_batch + group * d_c_group + times[:, None] * d_c_time + states[None, :]
    tl.store(d_b, total_b.to(d_b.dtype.element_ty), inside)
    tl.store(d_c, total_c.to(d_c.dtype.element_ty), inside)
