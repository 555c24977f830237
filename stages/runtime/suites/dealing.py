"""Work dealt out to the ranks, its results brought together on all of them (TRAPS M2).

What is dealt are whole batches, which the set alone decides: a batch is computed by one rank, in one way, whatever the
number of ranks, so that on devices of one kind one rank and many give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from stages.runtime import distributed

T = TypeVar("T")
R = TypeVar("R")


def dealt(batches: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """``work`` of every batch, in their order; collective: all ranks call it with the same batches.

    An exception on one rank is raised on all of them, so that none waits for it in the next collective.
    """
    size, found = distributed.world_size(), []
    error: Exception | None = None
    try:
        found = [work(batch) for batch in batches[distributed.rank() :: size]]
    except Exception as fault:
        if size == 1:
            raise
        error = fault
    shares = distributed.all_gather((found, None if error is None else (type(error), str(error))))
    if error is not None:
        raise error
    for rank, (_, failed) in enumerate(shares):
        if failed is not None:
            kind, text = failed
            raise distributed.rebuilt(rank, kind, text)
    return [shares[number % size][0][number // size] for number in range(len(batches))]
