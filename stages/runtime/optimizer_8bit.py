"""AdamW with moments in eight bits, quantised in blocks by bitsandbytes' kernels (Dettmers et al. 2022)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from stages.runtime.flat import Layout
from stages.runtime.optimizer_base import SplitOptimizer

BLOCK = 256
"""Elements that share a scale; fixed by bitsandbytes' kernels."""
LEAST_ELEMENTS = 4096
"""Smaller tensors keep fp32 moments, as bitsandbytes advises (its ``min_8bit_size``)."""


class AdamW8bit(SplitOptimizer):
    """AdamW with 8-bit moments for groups with ``"own": True``, with fp32 moments for the others.

    Blocks are counted from each parameter's first element, whatever the flat tensor that it lies in, so moments are
    those of the unsharded optimizer to the last bit, but for the block that the boundary between two ranks cuts: there
    each side has a scale of its own.
    """

    def update(
        self,
        group: dict[str, Any],
        state: dict[str, Any],
        flat: torch.Tensor,
        gradients: list[torch.Tensor],
        layout: Layout,
    ) -> None:
        """See ``SplitOptimizer``."""
        from bitsandbytes import functional

        spans = blocked(layout)
        if "codes1" not in state:
            state.update(_empty_state(flat, spans))
        state["updates"] += 1
        signed, unsigned = _code_books(flat.device)
        beta1, beta2 = group["betas"]
        for span in spans:
            part = slice(span.at, span.at + span.numel)
            begin = span.at - layout.pieces[span.piece].at
            gradient = gradients[span.piece][begin : begin + span.numel]
            scales = slice(span.scale, span.scale + _blocks(span.numel))
            # Decay was applied before, in AdamW's order on every device: the kernels do not agree on it.
            functional.optimizer_update_8bit_blockwise(
                "adam", gradient, flat[part], state["codes1"][part], state["codes2"][part], beta1, beta2,
                0.0, 0.0, group["eps"], state["updates"], group["lr"], signed, unsigned, state["scales1"][scales],
                state["scales2"][scales], 0.0, 1.0, False,
            )  # fmt: skip


class Span(NamedTuple):
    """``numel`` elements from ``at`` of a flat tensor, within ``piece`` of its layout; the scales of their blocks stand
    from ``scale`` on.
    """

    at: int
    numel: int
    scale: int
    piece: int


def blocked(layout: Layout) -> list[Span]:
    """The spans of ``layout`` in which blocks follow one another as in the whole parameter."""
    spans: list[Span] = []
    scale = 0
    for number, piece in enumerate(layout.pieces):
        head = min(-piece.start % BLOCK, piece.numel)
        for at, numel in ((piece.at, head), (piece.at + head, piece.numel - head)):
            if numel:
                spans.append(Span(at, numel, scale, number))
                scale += _blocks(numel)
    return spans


def _blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _empty_state(flat: torch.Tensor, spans: list[Span]) -> dict[str, Any]:
    blocks = sum(_blocks(span.numel) for span in spans)
    codes = {name: torch.zeros_like(flat, dtype=torch.uint8) for name in ("codes1", "codes2")}
    return {"updates": 0} | codes | {name: flat.new_zeros(blocks) for name in ("scales1", "scales2")}


@functools.cache
def _code_books(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What a code means, for the first moment and for the second, which has no sign."""
    from bitsandbytes import functional

    first, second = (functional.create_dynamic_map(signed=signed) for signed in (True, False))
    return first.to(device), second.to(device)
