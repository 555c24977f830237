"""What every fine-tuning stage has: fields, what they must satisfy before launch, what a run costs. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from model.spec import ModelSpec
from stages.base import Fault, Stage, operational
from stages.runtime import settings
from stages.runtime.schedule import extends
from stages.runtime.training_config import TrainingConfig
from stages.runtime.warm_start import (
    learning_rate_faults,
    model_faults,
    parent_metrics,
    planned_rate_faults,
    spec_of,
)


class FinetuneConfig(TrainingConfig):
    """What supervised, preference and reinforcement stages share; a stage adds its own fields."""

    from_: str = Field(alias="from")
    """Training stage (or artifact path) whose weights and tokenizer this run starts from."""
    max_length: int = Field(ge=8, le=2**24)
    """Longest sequence that is trained on, tokens."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of matrix products: ``bf16`` autocasts, parameters and optimizer state stay fp32 in either."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """AdamW's decoupled decay a step, times lr; embeddings, norms, biases and A_log, D, dt_bias are never decayed."""


class SupervisedConfig(FinetuneConfig):
    """What stages that learn answers from conversations add; their ``data`` is a ``messages`` artifact."""

    data: str = "messages"
    """Stage (or artifact path) whose conversations are trained on and held out."""
    over_length: Literal["drop", "truncate"] = "drop"
    """What becomes of conversations longer than ``max_length``: left out, or cut at their end; both are counted."""
    min_stop_probability: float = operational(0.1, ge=0, le=1)
    """Least mean probability of ``<|im_end|>`` where held-out answers end; below it the run is not done."""


class FinetuneStage(Stage):
    """A stage that trains a finished model further; a subclass adds ``kind``, ``Config``, ``inputs`` and ``run``."""

    produces: ClassVar[str] = "model"
    uses_model: ClassVar[bool] = True
    launched: ClassVar[bool] = True

    @classmethod
    def extension(cls, config: Any) -> dict[str, Any]:
        """``max_steps`` under schedules whose earlier steps do not depend on it."""
        return {"max_steps": config.max_steps} if extends(config.schedule) else {}

    @classmethod
    def check(cls, config: Any, model: ModelSpec | None) -> list[Fault]:
        """Faults between fields, and between the fields and the model."""
        return settings.training_faults(config, model, "max_length")

    @classmethod
    def check_parents(cls, config: Any, model: ModelSpec | None, parents: Mapping[str, Path]) -> list[Fault]:
        """A parent of other shapes than the recipe's, or whose last learning rate is below this peak (TRAPS T1)."""
        if "from_" not in parents:
            return []
        parent = parents["from_"]
        faults = learning_rate_faults(config, parent_metrics(parent).get("final_lr"))
        return faults + ([] if model is None else model_faults(model, spec_of(parent / "output")))

    @classmethod
    def check_parent_configs(cls, config: Any, parents: Mapping[str, Any]) -> list[Fault]:
        """A peak above the last learning rate that the parent's schedule will come to (TRAPS T1)."""
        return planned_rate_faults(config, parents["from_"]) if "from_" in parents else []

    @classmethod
    def check_devices(cls, config: Any, world_size: int | None, has_gpu: bool | None) -> list[Fault]:
        """Sequences that do not divide over the ranks, and off-loading without a GPU."""
        return settings.device_faults(config, world_size, has_gpu)

    @classmethod
    def fitted(cls, config: Any, world_size: int) -> Any:
        """``config`` with a micro-batch that divides the rows of a rank."""
        return settings.fitted(config, world_size)

    @classmethod
    def plan(cls, config: Any, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Tokens (at most: sequences may be shorter), parameters, FLOPs, bytes per GPU and on disk."""
        return settings.plan(config, model, world_size, length=config.max_length)
