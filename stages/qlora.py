"""QLoRA: adapters trained on a four-bit base; the artifact is the merged model, with the adapters beside it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from model.spec import ModelSpec
from stages.base import Fault, Input, StageConfig, StageContext, StageResult
from stages.runtime import qlora_config
from stages.runtime.finetune_config import FinetuneStage, SupervisedConfig
from stages.runtime.qlora_config import AdapterConfig, QuantisationConfig


class QLoRAConfig(SupervisedConfig):
    """Configuration of one QLoRA run."""

    kind: Literal["qlora"]
    """Adapters on a four-bit base (Dettmers et al. 2023, arXiv:2305.14314)."""
    adapter: AdapterConfig = AdapterConfig()
    """What is trained."""
    quantisation: QuantisationConfig = QuantisationConfig()
    """How the frozen base is stored."""
    merge_conversations: int = Field(128, ge=1, le=1_000_000_000)
    """Held-out conversations, at most, over which the two ways of merging are compared."""


class QLoRA(FinetuneStage):
    """Teach a model something narrow by adapters on its quantised weights; ``output/adapter`` is in PEFT's format."""

    kind: ClassVar[str] = "qlora"
    Config: ClassVar[type[StageConfig]] = QLoRAConfig
    code_version: ClassVar[int] = 1
    inputs: ClassVar[dict[str, Input]] = {"from_": Input("model"), "data": Input("messages")}

    @classmethod
    def check(cls, config: Any, model: ModelSpec | None) -> list[Fault]:
        """Faults between fields, targets that the model does not have, and ZeRO-3, which cannot cut NF4 weights."""
        faults = super().check(config, model) + qlora_config.engine_faults(config.deepspeed)
        faults += qlora_config.optimizer_faults(config.optimizer)
        return faults + ([] if model is None else qlora_config.adapter_faults(model, config.adapter))

    @classmethod
    def plan(cls, config: Any, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """What supervised fine-tuning plans, of adapters on a four-bit base."""
        from stages.runtime import qlora_plan

        assert model is not None, "check() refuses a recipe without a model"
        trained = qlora_config.adapter_parameters(model, config.adapter)
        return qlora_plan.plan(config, model, world_size) | {"adapter_parameters": trained}

    def run(self, context: StageContext) -> StageResult:
        """Quantise, prove the adapters, train them, measure, merge both ways, audit, write.

        Raises:
            ConfigError: for what does not fit the devices, the data or the parent.
            StopRequested: after a save, on all ranks together.
            AuditError: when the adapters are frozen or empty, or the merge costs more than they give (TRAPS T4, T11).
        """
        from stages.runtime.qlora_tuning import QLoRATuning

        return QLoRATuning(context).run()
