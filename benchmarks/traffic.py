"""What the ranks of a training step send each other: bytes counted call by call, bytes that theory asks for, and the
time in which nothing but communication ran."""

from __future__ import annotations

import collections
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

PASSES: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
}
"""Bytes that a rank of n sends on a ring for one byte of payload (Patarasu and Yuan 2009); the mean over the ranks for
``reduce`` and ``broadcast``, whose ends send nothing."""

CALLS = {
    "all_reduce": ("all_reduce", "tensor"),
    "all_reduce_coalesced": ("all_reduce", "tensors"),
    "reduce": ("reduce", "tensor"),
    "broadcast": ("broadcast", "tensor"),
    "all_gather": ("all_gather", "tensor_list"),
    "all_gather_into_tensor": ("all_gather", "output_tensor"),
    "_all_gather_base": ("all_gather", "output_tensor"),
    "reduce_scatter": ("reduce_scatter", "input_list"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "_reduce_scatter_base": ("reduce_scatter", "input"),
}
"""Torch's functions that move tensors between all ranks: the kind of each, and the argument that is its payload."""
PLACES = {"tensor_list": 0, "output_tensor": 0, "tensor": 0, "tensors": 0, "input_list": 1, "input": 1}


class Traffic:
    """Payload bytes, calls and seconds by kind, while ``counting``."""

    def __init__(self) -> None:
        self.payload_bytes: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0
        self._counting = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is called inside, from zero."""
        self.payload_bytes.clear()
        self.calls.clear()
        self.seconds, self._counting = 0.0, True
        try:
            yield
        finally:
            self._counting = False

    def wire_bytes(self, world_size: int) -> int:
        """What one rank sends on a ring for all that was counted."""
        return round(sum(PASSES[kind](world_size) * size for kind, size in self.payload_bytes.items()))

    def note(self, kind: str, payload: Any, seconds: float) -> None:
        """Count one call; ``seconds`` is what the caller waited, all of it where the backend blocks."""
        if self._counting:
            self.payload_bytes[kind] += _size_bytes(payload)
            self.calls[kind] += 1
            self.seconds += seconds


def install() -> Traffic:
    """Put a counter around torch's collectives; before DeepSpeed is imported, which keeps some of them."""
    import torch

    traffic = Traffic()
    inside = threading.local()

    def counted(function: Callable[..., Any], kind: str, argument: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "call", False):
                return function(*args, **kwargs)
            payload = kwargs[argument] if argument in kwargs else args[PLACES[argument]]
            inside.call, started = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside.call = False
                traffic.note(kind, payload, time.perf_counter() - started)

        return call

    for name, (kind, argument) in CALLS.items():
        for module in (torch.distributed, torch.distributed.distributed_c10d):
            if hasattr(module, name):
                setattr(module, name, counted(getattr(module, name), kind, argument))
    return traffic


class Volume(NamedTuple):
    """Payload bytes a step by kind."""

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0

    def wire_bytes(self, world_size: int) -> float:
        """What one rank sends on a ring."""
        return sum(PASSES[kind](world_size) * size for kind, size in self._asdict().items())


def expected(
    zero_stage: int, *, parameters: int, micro_steps: int, kept_whole: int = 0, pieces: bool = False
) -> Volume:
    """What one optimizer step must move, in fp32, as DeepSpeed 0.19 does it (Rajbhandari et al. 2020, section 7).

    Stage 0 and 1 reduce gradients once a step, stage 2 after each micro-step; the buckets of stages 1 and 2 are
    all-reduced whole, or ``pieces`` of them reduced to their owners
    (``use_multi_rank_bucket_allreduce`` false), which is a reduce-scatter. Then updated weights are gathered. Stage 3
    gathers weights in each forward and each backward pass and scatters gradients; ``kept_whole`` of its parameters are
    too small to be parted and gathered once a step.
    """
    size = 4.0 * parameters
    if zero_stage == 0:
        return Volume(all_reduce=size)
    if zero_stage == 3:
        parted = 4.0 * (parameters - kept_whole)
        gathered = 2 * micro_steps * parted + 4.0 * kept_whole
        return Volume(all_gather=gathered, reduce_scatter=micro_steps * size)
    times = micro_steps if zero_stage == 2 else 1
    reduced = {"reduce_scatter" if pieces else "all_reduce": times * size}
    return Volume(all_gather=size, **reduced)


def exposed_ms(kernels: Iterable[tuple[str, float, float]]) -> tuple[float, float]:
    """Milliseconds of communication, and of communication while nothing else ran, from (name, start, end) in us."""
    sends: list[tuple[float, float]] = []
    works: list[tuple[float, float]] = []
    for name, start, end in kernels:
        (sends if "nccl" in name.lower() else works).append((start, end))
    sends, works = merged(sends), merged(works)
    total = sum(end - start for start, end in sends)
    hidden = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in sends
        for other_start, other_end in works
        if other_start < end and start < other_end
    )
    return total / 1e3, (total - hidden) / 1e3


def merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """``spans`` in order, those that touch made one."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _size_bytes(payload: Any) -> int:
    if isinstance(payload, list | tuple):
        return sum(_size_bytes(one) for one in payload)
    return int(payload.numel() * payload.element_size())


def as_row(volume: Mapping[str, float] | Volume) -> dict[str, int]:
    """Whole bytes by kind."""
    items = volume._asdict() if isinstance(volume, Volume) else volume
    return {kind: round(size) for kind, size in items.items() if size}
