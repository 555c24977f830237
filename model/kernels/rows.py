"""How kernels are told of documents: an int32 number a token, or the edges of all documents laid end to end.

B batch, T time, n documents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from model.boundaries import Layout

FEWEST_EDGES = 64


def document_numbers(layout: Layout) -> Tensor | None:
    """(B, T) int32, or none where every row is one document; made once a forward pass."""
    if layout.doc_ids is None:
        return None
    key = ("numbers",)
    if key not in layout.memo:
        layout.memo[key] = layout.doc_ids.to(torch.int32).contiguous()
    return layout.memo[key]


def document_edges(layout: Layout, batch: int, time: int) -> Tensor:
    """Edges of the documents in ``batch`` rows of ``time`` tokens laid end to end, int32, made once a forward pass.

    ``[[0, 0, 1], [0, 0, 0]]`` gives ``[0, 2, 3, 6, 6, ...]``: the last edge is repeated up to a power of two, so that a
    compiled block sees few shapes.
    """
    key = ("edges", batch, time)
    if key not in layout.memo:
        layout.memo[key] = _edges(layout, batch, time)
    return layout.memo[key]


def _edges(layout: Layout, batch: int, time: int) -> Tensor:
    rows = torch.arange(batch, device=layout.positions.device)[:, None].expand(batch, time)
    starts = functional.pad(torch.zeros_like(rows[:, 1:], dtype=torch.bool), (1, 0), value=True)
    if layout.doc_ids is not None:
        starts = starts | functional.pad(layout.doc_ids[:, 1:] != layout.doc_ids[:, :-1], (1, 0), value=True)
    first = starts.flatten().nonzero()[:, 0].to(torch.int32)
    count = max(FEWEST_EDGES, 1 << int(first.numel()).bit_length())
    return functional.pad(first, (0, count - first.numel()), value=batch * time)
