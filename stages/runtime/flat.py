"""What lies where in a flat tensor that stands for several parameters, as ZeRO-1 and ZeRO-2 give to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed


class Piece(NamedTuple):
    """One parameter's share of this rank's flat tensor: ``flat[at:at + numel]`` is its ``[start:start + numel]``.

    ``shape`` is the whole parameter's. ``is_cut``: it lies on several ranks, of which this one may have nothing.
    """

    shape: tuple[int, ...]
    at: int
    start: int
    numel: int
    is_cut: bool


class Layout(NamedTuple):
    """The pieces of a flat tensor in the order of the parameters, the same parameters on every rank of ``group``."""

    pieces: tuple[Piece, ...]
    group: Any = None

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Every piece's elements of ``flat``, 1-D views."""
        return [flat[piece.at : piece.at + piece.numel] for piece in self.pieces]

    def full(self, piece: Piece, mine: torch.Tensor) -> torch.Tensor | None:
        """The whole parameter's tensor from ``mine``, ``piece``'s elements here, and what other ranks hold of it; None
        where this rank holds nothing.

        Collective for a piece that is cut: every rank of the group must ask for the same ones in the same order. Zeros
        stand in for what other ranks hold, so the sum is exact.
        """
        if not piece.is_cut:
            return mine.view(piece.shape) if piece.numel else None
        size = int(torch.Size(piece.shape).numel())
        joined = mine.new_zeros(size)
        joined[piece.start : piece.start + piece.numel] = mine
        distributed.all_reduce(joined, group=self.group)
        return joined.view(piece.shape) if piece.numel else None


def whole(parameter: torch.Tensor) -> Layout:
    """The layout of a parameter that stands for itself."""
    return Layout((Piece(tuple(parameter.shape), 0, 0, parameter.numel(), False),))


def partition(
    shapes: Sequence[tuple[int, ...]], offsets: Sequence[int], size: int, rank: int, group: Any = None
) -> Layout:
    """The layout of partition ``rank``, ``size`` elements, of parameters that begin at ``offsets`` of a flat whole."""
    begin = rank * size
    pieces = []
    for shape, offset in zip(shapes, offsets, strict=True):
        numel = int(torch.Size(shape).numel())
        first, last = max(offset, begin), min(offset + numel, begin + size)
        is_cut = offset // size != (offset + numel - 1) // size
        held = max(0, last - first)
        pieces.append(Piece(tuple(shape), first - begin if held else 0, first - offset if held else 0, held, is_cut))
    return Layout(tuple(pieces), group)
