"""Scoring held-out sequences on one rank or many, the same to the last bit (TRAPS M2)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from stages.runtime import distributed

Row = TypeVar("Row")


def batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """``rows`` in batches of ``size``, the last one shorter; the same whatever the number of ranks."""
    yield from (rows[start : start + size] for start in range(0, len(rows), size))


def scored(
    dealt: Iterable[Sequence[Row]],
    score: Callable[[Sequence[Row]], torch.Tensor],
    *,
    columns: int,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """(R, columns) float64 on the host: ``score`` of every batch, a row each, in order; collective.

    Batches are dealt out to the ranks in turn. Each is scored by one rank alone, so no sum depends on their number.
    Every rank scores equally often, as ZeRO-3 needs: one without a batch scores the hand's first again. ``between`` is
    called on all ranks after each hand; what it raises ends the scoring.
    """
    found: list[torch.Tensor] = []
    hands = iter(dealt)
    while hand := list(itertools.islice(hands, distributed.world_size())):
        mine = distributed.rank() if distributed.rank() < len(hand) else 0
        values = score(hand[mine]).double().cpu()
        for number, batch in enumerate(hand):
            is_mine = number == distributed.rank()
            found.append(values if is_mine else torch.zeros(len(batch), columns, dtype=torch.float64))
        between()
    sums = torch.cat(found) if found else torch.zeros(0, columns, dtype=torch.float64)
    if distributed.world_size() > 1 and len(sums):
        shared = sums.to(device)
        torch.distributed.all_reduce(shared)
        sums = shared.cpu()
    return sums
