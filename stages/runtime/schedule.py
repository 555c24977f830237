"""Learning rate schedules: pure functions of the step, set by the loop before every optimizer step. No torch here."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from stages.base import Section


class CosineSchedule(Section):
    """Linear warm-up, then half a cosine from the peak down to ``min_lr_ratio`` of it at ``max_steps``."""

    kind: Literal["cosine"]
    """Half a cosine: its shape depends on ``max_steps``, so a longer run is another run."""
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000)
    """Optimizer steps of linear warm-up from lr / warmup_steps to lr."""


class WSDSchedule(Section):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): constant at the peak, then linear down at the end."""

    kind: Literal["wsd"]
    """Warm-up, stable, decay: a longer ``max_steps`` extends the run from before its decay."""
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000)
    """Optimizer steps of linear warm-up from lr / warmup_steps to lr."""
    decay_steps: int = Field(ge=1, le=1_000_000_000)
    """Last optimizer steps, over which lr falls linearly to ``min_lr_ratio`` of the peak."""


class ConstantSchedule(Section):
    """Linear warm-up, then the peak to the end."""

    kind: Literal["constant"]
    """Constant: a longer ``max_steps`` extends the run from its end."""
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000)
    """Optimizer steps of linear warm-up from lr / warmup_steps to lr."""


Schedule = Annotated[CosineSchedule | WSDSchedule | ConstantSchedule, Field(discriminator="kind")]


def lr_at(step: int, schedule: Schedule, *, lr: float, max_steps: int, min_lr_ratio: float) -> float:
    """Learning rate of the optimizer step with index ``step`` (0 the first, ``max_steps - 1`` the last).

    Warm-up: ``lr * (step + 1) / warmup_steps``. Decays reach exactly ``lr * min_lr_ratio`` on the last step.
    """
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    start = decay_start(schedule, max_steps)
    if start is None or step < start:
        return lr
    length = max_steps - start
    progress = min(1.0, (step - start + 1) / length)
    falling = 1 - progress if schedule.kind == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * falling)


def decay_start(schedule: Schedule, max_steps: int) -> int | None:
    """First step whose learning rate depends on ``max_steps``; none for a schedule where no step's does."""
    if schedule.kind == "cosine":
        return schedule.warmup_steps
    if schedule.kind == "wsd":
        return max(schedule.warmup_steps, max_steps - schedule.decay_steps)
    return None


def extends(schedule: Schedule) -> bool:
    """Whether a longer ``max_steps`` continues the same run."""
    return schedule.kind != "cosine"


def same_path(step: int, schedule: Schedule, *, max_steps: int, other_max_steps: int) -> bool:
    """Whether the first ``step`` steps have the same rates under both lengths, so that their state serves both."""
    if max_steps == other_max_steps:
        return True
    starts = [decay_start(schedule, length) for length in (max_steps, other_max_steps)]
    return step <= min(max_steps, other_max_steps) and all(start is None or step <= start for start in starts)
