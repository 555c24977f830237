"""Attention through windows with global tokens, over packed rows: PyTorch's flex attention and its block masks.

B batch, T time, H query heads, J key and value heads, P head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.boundaries import Layout


def visible_blocks(layout: Layout, window: int | None, global_tokens: int) -> BlockMask:
    """``Layout.attention_mask`` of rows without padding as blocks of queries and keys, made once a forward pass."""
    key = ("blocks", window, global_tokens)
    if key not in layout.memo:
        batch, time = (None, layout.positions.shape[1]) if layout.doc_ids is None else layout.doc_ids.shape
        sees = _visibility(layout, window, global_tokens)
        layout.memo[key] = create_block_mask(sees, batch, None, time, time, device=str(layout.positions.device))
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


def _visibility(layout: Layout, window: int | None, global_tokens: int) -> Callable[..., Tensor]:
    """Whether query t of row b sees key s, as tensors of indices give it."""
    doc_ids = layout.doc_ids
    positions = layout.positions if doc_ids is None else layout.positions.expand_as(doc_ids)

    def near(row: Tensor | int, t: Tensor, s: Tensor) -> Tensor:
        if window is None:
            return t >= s
        distance = positions[row, t] - positions[row, s]
        return (t >= s) & ((distance < window) | (positions[row, s] < global_tokens))

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if doc_ids is None:
            return near(0, t, s)
        return near(b, t, s) & (doc_ids[b, t] == doc_ids[b, s])

    return sees
