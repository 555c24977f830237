"""Supervised fine-tuning on conversations: TRL's SFTTrainer, the assistant's tokens scored and nothing else."""

from __future__ import annotations

from typing import ClassVar, Literal

from stages.base import Input, StageConfig, StageContext, StageResult
from stages.runtime.finetune_config import FinetuneStage, SupervisedConfig


class SFTConfig(SupervisedConfig):
    """Configuration of one supervised run."""

    kind: Literal["sft"]
    """Supervised fine-tuning on conversations."""


class SFT(FinetuneStage):
    """Teach a pretrained model to answer in the chat template and to stop; the artifact is a Hugging Face directory."""

    kind: ClassVar[str] = "sft"
    Config: ClassVar[type[StageConfig]] = SFTConfig
    code_version: ClassVar[int] = 1
    inputs: ClassVar[dict[str, Input]] = {"from_": Input("model"), "data": Input("messages")}

    def run(self, context: StageContext) -> StageResult:
        """Train, measure, audit, and write weights with their tokenizer.

        Raises:
            ConfigError: for what does not fit the devices, the data or the parent (TRAPS T1, T4).
            StopRequested: after a save, on all ranks together.
            AuditError: when nothing was trained or the stop token was not learnt (TRAPS T4, T8).
        """
        from stages.runtime.sft_tuning import SupervisedTuning

        return SupervisedTuning(context).run()
