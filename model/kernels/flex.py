"""Attention through windows with global tokens, over packed rows: PyTorch's flex attention and its block masks.

B batch, T time, H query heads, J key and value heads, P head_dim, Q tokens a block, N blocks a row.

Query t sees a key s <= t of its own document that lies in its window, [first window key, t], or among the document's
global tokens, [document's start, end of the globals). Both are intervals, so which blocks a query reaches, and which it
sees whole, is told by comparing their borders: nothing of the size T x T is made.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.boundaries import Layout

BLOCK_TOKENS = 128
"""Queries and keys of a block; flex attention's own default."""


def visible_blocks(layout: Layout, window: int | None, global_tokens: int) -> BlockMask:
    """``Layout.attention_mask`` of rows without padding as blocks of queries and keys, made once a forward pass."""
    key = ("blocks", window, global_tokens)
    if key not in layout.memo:
        layout.memo[key] = _visible_blocks(layout, window, global_tokens)
    return layout.memo[key]


def attend_flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """Attention of ``q`` (B, H, T, P) over the ``k`` and ``v`` (B, J, T, P) that ``blocks`` lets it see."""
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    o: Tensor = attend(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
    return o


@functools.cache
def _compiled() -> Any:
    """Flex attention outside of a compiled block; uncompiled it would hold all scores in memory."""
    return torch.compile(flex_attention, dynamic=False)


def _visible_blocks(layout: Layout, window: int | None, global_tokens: int) -> BlockMask:
    time = layout.positions.shape[1]
    ends = (_order(layout) - layout.positions + global_tokens).to(torch.int32)  # where the global tokens end
    starts, ends = torch.broadcast_tensors(_document_starts(layout), ends)  # (B or 1, T)

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        start, end = (part[0][t] if len(part) == 1 else part[b, t] for part in (starts, ends))
        causal = (t >= s) & (s >= start)
        return causal if window is None else causal & ((t - s < window) | (s < end))

    partial, full = _blocks(starts, ends, window)
    counts_and_indices = (*_listed(partial), *_listed(full))
    return BlockMask.from_kv_blocks(
        *counts_and_indices, BLOCK_SIZE=BLOCK_TOKENS, mask_mod=sees, seq_lengths=(time, time)
    )


def _order(layout: Layout) -> Tensor:
    return torch.arange(layout.positions.shape[1], device=layout.positions.device)


def _document_starts(layout: Layout) -> Tensor:
    """(B or 1, T) int32: the place in the row where a token's document starts."""
    if layout.doc_ids is None:
        return torch.zeros_like(layout.positions, dtype=torch.int32)
    is_start = functional.pad(layout.doc_ids[:, 1:] != layout.doc_ids[:, :-1], (1, 0), value=True)
    return torch.where(is_start, _order(layout), 0).cummax(1).values.to(torch.int32)


def _blocks(starts: Tensor, ends: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Blocks (B or 1, 1, N, N) of queries and keys seen in part, and those seen whole."""
    time = starts.shape[1]
    t = torch.arange(time, device=starts.device)[:, None]
    first = torch.arange(0, time, BLOCK_TOKENS, device=starts.device)  # (N): each key block's first and last key
    last = first + BLOCK_TOKENS - 1
    starts, ends = torch.broadcast_tensors(starts[..., None], ends[..., None])  # (B or 1, T, 1)
    near = starts if window is None else torch.maximum(starts, t - window + 1)
    ends = torch.minimum(ends, t + 1)
    reached = ((near <= last) & (first <= t)) | (torch.maximum(starts, first) < torch.minimum(ends, last + 1))
    whole = ((near <= first) & (last <= t)) | ((starts <= first) & (last < ends))
    reached, whole = (_by_query_block(part) for part in (reached, whole))
    full = whole.all(2)
    return (reached.any(2) & ~full)[:, None], full[:, None]


def _by_query_block(seen: Tensor) -> Tensor:
    """(B, T, N) to (B, N, Q, N); a last block that is not full is nobody's, so never whole."""
    return functional.pad(seen, (0, 0, 0, -seen.shape[1] % BLOCK_TOKENS)).unflatten(1, (-1, BLOCK_TOKENS))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block sees (B, 1, N), and their indices, those seen first (B, 1, N, N); int32."""
    seen = blocks.to(torch.int32)
    order = torch.argsort(seen, dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32), order.to(torch.int32)
