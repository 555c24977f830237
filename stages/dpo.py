"""Direct preference optimisation (Rafailov et al. 2023) and its kin on preference pairs, by TRL's DPOTrainer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from model.spec import ModelSpec
from stages.base import Fault, Input, StageConfig, StageContext, StageResult
from stages.runtime import settings
from stages.runtime.finetune_config import FinetuneConfig, FinetuneStage

SMOOTHED = ("robust", "exo_pair")
"""Losses that read ``label_smoothing``."""


class DpoConfig(FinetuneConfig):
    """Configuration of one preference run; a sequence of the shared fields is a pair here."""

    kind: Literal["dpo"]
    """Preference optimisation."""
    data: str = "preferences"
    """Stage (or artifact path) whose pairs are trained on."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "exo_pair", "apo_zero", "apo_down", "sigmoid_norm"] = "sigmoid"
    """Loss of a pair, by TRL's name: ``sigmoid`` is DPO, ``ipo`` is IPO (Azar et al. 2023) on means over tokens."""
    beta: float = Field(0.1, gt=0, le=1000)
    """Weight of staying near the parent; for ``ipo`` it is tau: the margin aimed at is 1 / (2 beta) nats a token."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a pair is labelled the wrong way round; read by ``robust`` and ``exo_pair`` alone."""
    nll_weight: float = Field(0.0, ge=0, le=1000)
    """Weight of the chosen answer's NLL, nats a token averaged over pairs; keeps its probability from sinking with the
    rejected one's (Pang et al. 2024). 0 leaves the term out."""


class Dpo(FinetuneStage):
    """Train a model to prefer the chosen answers; the artifact is a Hugging Face directory with its tokenizer."""

    kind: ClassVar[str] = "dpo"
    Config: ClassVar[type[StageConfig]] = DpoConfig
    code_version: ClassVar[int] = 1
    inputs: ClassVar[dict[str, Input]] = {"from_": Input("model"), "data": Input("preferences")}

    @classmethod
    def check(cls, config: Any, model: ModelSpec | None) -> list[Fault]:
        """Faults between fields, and between the fields and the model."""
        return super().check(config, model) + _smoothing_faults(config)

    @classmethod
    def plan(cls, config: Any, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Tokens at most, parameters, FLOPs, bytes per GPU and on disk; a pair is two sequences."""
        rows = config.model_copy(update={"micro_batch_size": 2 * config.micro_batch_size})
        tokens = 2 * config.global_batch_size * config.max_length
        return settings.plan(rows, model, world_size, length=config.max_length, tokens_per_step=tokens)

    def run(self, context: StageContext) -> StageResult:
        """Cache the parent's log-probabilities, train, measure margins, audit, and write weights with their tokenizer.

        Raises:
            ConfigError: for pairs that cannot be trained on, or a parent or devices that do not fit.
            StopRequested: after a save, on all ranks together.
            AuditError: when nothing was trained (TRAPS T4).
        """
        from stages.runtime.dpo_training import DpoTraining

        return DpoTraining(context).run()


def _smoothing_faults(config: Any) -> list[Fault]:
    if config.label_smoothing and config.loss not in SMOOTHED:
        message = f"must be 0 with loss {config.loss}, which does not read it; got {config.label_smoothing:g}"
        return [Fault("label_smoothing", f"{message}; set 0, or loss robust")]
    if config.loss in SMOOTHED and not config.label_smoothing:
        return [Fault("label_smoothing", f"must be above 0 with loss {config.loss}; got 0; set for example 0.1")]
    return []
