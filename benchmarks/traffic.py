"""What the ranks of a training step send each other: bytes counted call by call, bytes that theory asks for, and the
time in which nothing but communication ran."""

from __future__ import annotations

import collections
import functools
import threading
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
    """Payload bytes and calls by kind, while ``counting``; a call for many tensors counts as one a tensor."""

    def __init__(self) -> None:
        self.payload_bytes: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()
        self._counting = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is called inside, from zero."""
        self.payload_bytes.clear()
        self.calls.clear()
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def wire_bytes(self, world_size: int) -> int:
        """What one rank sends on a ring for all that was counted."""
        return round(sum(PASSES[kind](world_size) * size for kind, size in self.payload_bytes.items()))

    def note(self, kind: str, payload: Any) -> None:
        """Count one call."""
        if self._counting:
            self.payload_bytes[kind] += _size_bytes(payload)
            self.calls[kind] += 1


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
            inside.call = True
            try:
                return function(*args, **kwargs)
            finally:
                inside.call = False
                traffic.note(kind, payload)

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
    """What one optimizer step must move, in fp32 (Rajbhandari et al. 2020, section 7).

    Stage 0 and 1 reduce gradients once a step, stage 2 after each micro-step; those of stages 1 and 2 are all-reduced
    whole, or ``pieces`` of them reduced to their owners (``use_multi_rank_bucket_allreduce`` false), which sends as
    much as a reduce-scatter. Then updated weights are gathered. Stage 3
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


@contextmanager
def kernels(watch: bool) -> Iterator[list[tuple[str, float, float]]]:
    """What this process's GPU ran inside, known after it: (name, start, end) in us; nothing unless to ``watch``."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    found: list[tuple[str, float, float]] = []
    if not watch:
        yield found
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield found
        torch.cuda.synchronize()
    found += [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not is_label(event)
    ]


def is_label(event: Any) -> bool:
    """Whether the profiler gives a span that the program named, and no kernel."""
    named = event.name.startswith(("nccl:", "Optimizer.", "ProfilerStep", "##", "Torch-Compiled"))
    return bool(getattr(event, "is_user_annotation", False)) or named


class Times(NamedTuple):
    """Milliseconds in which a GPU ran kernels other than communication, communication, and nothing but that."""

    compute_ms: float
    communication_ms: float
    exposed_ms: float


def times_ms(kernels: Iterable[tuple[str, float, float]]) -> Times:
    """What (name, start, end) in us amount to."""
    sends: list[tuple[float, float]] = []
    works: list[tuple[float, float]] = []
    for name, start, end in kernels:
        (sends if "nccl" in name.lower() else works).append((start, end))
    both, sends, works = merged(sends + works), merged(sends), merged(works)
    busy, total, work = (sum(end - start for start, end in spans) / 1e3 for spans in (both, sends, works))
    return Times(work, total, busy - work)


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
