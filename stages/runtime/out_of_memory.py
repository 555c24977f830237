"""Out of memory, in one line: what the plan foresaw, what was measured, and the micro-batch that would fit."""

from __future__ import annotations

import sys
from typing import Any

from stages.base import Stage

HEADROOM = 0.92
"""Share of a device that a plan may fill; context, the allocator's slack and what plans leave out take the rest."""
GIB = 2**30


class OutOfMemory(RuntimeError):  # noqa: N818 - named as torch names it
    """A stage ran out of memory; the message is for a person."""


def explained(error: BaseException, stage: Stage, config: Any, model: Any, world_size: int) -> BaseException:
    """``error``, or in place of a training stage's lack of memory an ``OutOfMemory`` that says what would fit."""
    if not is_out_of_memory(error) or not hasattr(config, "micro_batch_size"):
        return error
    config = stage.fitted(config, world_size)
    measured, total = _measured()
    planned = _planned(stage, config, model, world_size)
    foreseen = "" if planned is None else f"; the plan foresaw {_gib(planned)}"
    way_out = _way_out(stage, config, model, world_size, HEADROOM * total, planned)
    found = OutOfMemory(
        f"out of memory at micro_batch_size {config.micro_batch_size}{foreseen}; measured: {measured}; {way_out}"
    )
    found.__cause__ = error
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no more: torch's allocator on the host raises a plain ``RuntimeError``."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def fitting_micro_batch(stage: Stage, config: Any, model: Any, world_size: int, limit: float) -> int | None:
    """The largest micro-batch below the present one, of those that divide a rank's rows, whose plan fits ``limit``."""
    rows = max(1, config.global_batch_size // world_size)
    for size in range(config.micro_batch_size - 1, 0, -1):
        if rows % size == 0:
            planned = _planned(stage, config.model_copy(update={"micro_batch_size": size}), model, world_size)
            if planned is not None and planned <= limit:
                return size
    return None


def _way_out(stage: Stage, config: Any, model: Any, world_size: int, limit: float, planned: int | None) -> str:
    others = "set activation_checkpointing, or another deepspeed config"
    if config.micro_batch_size == 1:
        return f"micro_batch_size is 1 already: {others}"
    if planned is None:
        return f"lower micro_batch_size (the result stays the same), or {others}"
    size = fitting_micro_batch(stage, config, model, world_size, limit)
    if size is None:
        return f"by the plan no micro_batch_size fits: {others}"
    return f"set micro_batch_size to {size}, which would fit (the result stays the same), or {others}"


def _planned(stage: Stage, config: Any, model: Any, world_size: int) -> int | None:
    return stage.plan(config, model, world_size).get("memory_per_gpu_bytes")


def _measured() -> tuple[str, int]:
    """What was in use, in words, and the bytes of the whole device: the GPU's, or the host's where there is none."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return f"{_gib(peak)} allocated at most, {_gib(reserved)} reserved, of {_gib(total)} on the device", total
    import psutil

    total = psutil.virtual_memory().total
    return f"{_gib(psutil.Process().memory_info().rss)} in use, of {_gib(total)} on the host", total


def _gib(count_bytes: float) -> str:
    return f"{count_bytes / GIB:.1f} GiB"
