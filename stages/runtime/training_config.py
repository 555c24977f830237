"""Fields that every training stage has, whatever it trains on. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stages.base import StageConfig, later, operational
from stages.runtime.alarms import AlarmConfig
from stages.runtime.guards import GuardConfig
from stages.runtime.optimizer_config import ADAMW, Optimizer
from stages.runtime.schedule import CosineSchedule, Schedule

Rate = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(StageConfig):
    """Batch, course of the learning rate, AdamW, engine, cadences and guards of one training run."""

    global_batch_size: int = Field(ge=1, le=2**20)
    """Sequences (rows, conversations, pairs, completions) per optimizer step, over all devices."""
    micro_batch_size: int = operational(1, ge=1, le=2**16)
    """Sequences per device per forward, at most: the largest number that divides the share of a rank is taken. Bounds
    memory, never the result."""
    max_steps: int = Field(ge=1, le=1_000_000_000)
    """Optimizer steps of the whole run; under ``wsd`` and ``constant`` a larger value extends it."""
    lr: float = Field(gt=0, le=10)
    """Peak learning rate."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Last learning rate of a decaying schedule over the peak."""
    schedule: Schedule = CosineSchedule(kind="cosine")
    """Course of the learning rate over the optimizer steps."""
    optimizer: Optimizer = later(ADAMW)
    """How gradients become updates: ``adamw``, or ``adamw_8bit`` or ``muon`` for the blocks' projections."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0, le=1)
    """AdamW's term against division by zero."""
    max_grad_norm: float = Field(1.0, gt=0, le=1e6)
    """Global L2 norm to which gradients are clipped."""
    deepspeed: str = operational("zero1")
    """Engine facts: the name of a file in ``ds_configs`` without ``.json``; shards memory, never changes the sum."""
    activation_checkpointing: bool = operational(False)
    """Recompute each block's activations in the backward pass: less memory, a third more arithmetic."""
    eval_every_steps: int = operational(0, ge=0, le=1_000_000_000)
    """Optimizer steps between measurements on held-out data; 0 measures at the end (and before a warm start) alone."""
    eval_batch_size: int = operational(8, ge=1, le=2**16)
    """Held-out sequences per device per forward."""
    checkpoint_every_steps: int = operational(0, ge=0, le=1_000_000_000)
    """Optimizer steps between saves of the whole training state; 0 saves at the end and when asked to stop."""
    keep_checkpoints: int = operational(2, ge=1, le=1_000_000)
    """Newest checkpoints kept; those that a longer run extends from are kept beside them."""
    log_every_steps: int = operational(10, ge=1, le=1_000_000_000)
    """Optimizer steps between lines of progress and records in ``metrics.jsonl``."""
    rewarm: bool = operational(False)
    """Permit a warm start whose peak lr is above the parent's final lr (TRAPS T1)."""
    guards: GuardConfig = GuardConfig()
    """Which steps are skipped, and when skipping ends the run."""
    alarms: AlarmConfig = operational(AlarmConfig())
    """When the operator is told of spikes, plateaus and held-out scores that get worse."""
