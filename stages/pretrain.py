"""Pretraining: packed real text through our own loop over DeepSpeed, from scratch or continued from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from data.mixture import MixtureBy
from data.windows import Packing
from model.spec import ModelSpec
from stages.base import Fault, Input, Stage, StageConfig, StageContext, StageResult, later, operational
from stages.runtime import mixture_settings, settings
from stages.runtime.mixture_settings import MixturePhase
from stages.runtime.schedule import extends
from stages.runtime.training_config import TrainingConfig


class PretrainConfig(TrainingConfig):
    """Configuration of one pretraining run."""

    kind: Literal["pretrain"]
    """Pretraining on packed documents."""
    data: str = "tokenize"
    """Stage (or artifact path) whose token shards are trained on."""
    from_: str | None = Field(None, alias="from")
    """Training stage (or artifact path) whose weights this run starts from; none trains from scratch."""
    seq_len: int = Field(ge=8, le=2**24)
    """Tokens a packed row."""
    weight_decay: float = Field(0.1, ge=0, le=10)
    """AdamW's decoupled decay a step, times lr; norms, biases and A_log, D, dt_bias are never decayed."""
    decay_embeddings: bool = False
    """Whether the embedding (and an untied head) is decayed too."""
    precision: Literal["bf16", "fp8", "fp32"] = "bf16"
    """Arithmetic of matrix products: ``bf16`` autocasts, ``fp8`` (on a GPU) also runs the blocks' large projections and
    the gradients of the head in 8-bit floats; parameters and optimizer state stay fp32 in any."""
    residual: Literal["fp32", "bf16"] = later("fp32")
    """Dtype of the stream that blocks add to: ``bf16`` halves its traffic and rounds every sum."""
    compile: bool = operational(False)
    """Compile each block and the loss with ``torch.compile``: faster steps after a first one that takes minutes."""
    mixture: dict[str, float] | None = None
    """Weight of each word that ``mixture_by`` means, normalised to shares of tokens; none is in proportion to size."""
    mixture_by: MixtureBy = "source"
    """What ``mixture`` weighs: sources, languages, domains, or ``language/domain`` (``en/science``; ``-`` where a
    source has no domain). Sources of one word share its weight by their tokens."""
    phases: list[MixturePhase] = Field(default_factory=list)
    """Other weights from later steps on; the first phase, from step 0, has ``mixture``."""
    cap_epochs: float | None = Field(None, gt=0, le=1e6)
    """Most passes over a source, kept by lowering its share in favour of the others; none asks ``max_epochs`` alone."""
    packing: Packing = "cut"
    """``cut`` the stream of documents into rows, or keep documents ``whole`` by best fit, padding what stays open."""
    prefetch_steps: int = operational(2, ge=0, le=64)
    """Steps whose batches are read ahead by a thread; 0 reads when they are needed."""
    data_workers: int = operational(0, ge=0, le=256)
    """Processes of each rank that read and tokenize a stream, each lanes of its own, ``prefetch_steps`` ahead; the rows
    are the same. 0 reads in the rank's own process; shards need none."""
    passes: dict[str, Annotated[int, Field(ge=1, le=1_000_000)]] = operational({})
    """How often sources of a stream may be read, by name, over what its stage says (``on_end: fail`` alone). No row
    before an end depends on it, so that a run that came to one goes on when it is raised."""
    max_epochs: float = operational(4.0, gt=0, le=1e6)
    """Passes over any source that the plan may ask for; more is refused before the first step, never cut short
    (``cap_epochs`` takes its place)."""


class Pretrain(Stage):
    """Train a hybrid model on token shards; the artifact is a Hugging Face directory with its tokenizer."""

    kind: ClassVar[str] = "pretrain"
    Config: ClassVar[type[StageConfig]] = PretrainConfig
    code_version: ClassVar[int] = 2
    produces: ClassVar[str] = "model"
    inputs: ClassVar[dict[str, Input]] = {"data": Input("tokens"), "from_": Input("model", optional=True)}
    uses_model: ClassVar[bool] = True
    launched: ClassVar[bool] = True

    @classmethod
    def extension(cls, config: Any) -> dict[str, Any]:
        """``max_steps`` where no earlier step depends on it: neither its learning rate nor its mixture."""
        independent = extends(config.schedule) and config.cap_epochs is None
        return {"max_steps": config.max_steps} if independent else {}

    @classmethod
    def check(cls, config: Any, model: ModelSpec | None) -> list[Fault]:
        """Faults between fields, and between the fields and the model."""
        return settings.faults(config, model)

    @classmethod
    def check_parents(cls, config: Any, model: ModelSpec | None, parents: Mapping[str, Path]) -> list[Fault]:
        """A vocabulary beyond the embedding (K10), a warm start from other shapes, tokenizer or a lower rate (T1), and
        what the mixture asks of shards that do not have it (T5).
        """
        from stages.runtime.warm_start import parent_faults

        assert model is not None, "check() refuses a recipe without a model"
        faults = parent_faults(config, model, parents)
        return faults + (mixture_settings.shard_faults(config, parents["data"] / "output") if "data" in parents else [])

    @classmethod
    def check_parent_configs(cls, config: Any, parents: Mapping[str, Any]) -> list[Fault]:
        """A peak above the last learning rate that the parent's schedule will come to (TRAPS T1); data that cannot be
        read as asked.
        """
        from stages.runtime.warm_start import planned_rate_faults

        faults = planned_rate_faults(config, parents["from_"]) if "from_" in parents else []
        return faults + (mixture_settings.data_faults(config, parents["data"]) if "data" in parents else [])

    @classmethod
    def check_devices(cls, config: Any, world_size: int | None, has_gpu: bool | None) -> list[Fault]:
        """Rows that do not divide over the ranks, and off-loading without a GPU."""
        return settings.device_faults(config, world_size, has_gpu)

    @classmethod
    def fitted(cls, config: Any, world_size: int) -> Any:
        """``config`` with a micro-batch that divides the rows of a rank."""
        return settings.fitted(config, world_size)

    @classmethod
    def check_sources(cls, config: Any, sources: Mapping[str, list[str]]) -> list[Fault]:
        """A ``mixture`` or phase that names what the data do not have, or leaves out what they have."""
        return mixture_settings.source_faults(config, sources["data"]) if "data" in sources else []

    @classmethod
    def plan(cls, config: Any, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Tokens, parameters, FLOPs, bytes per GPU and on disk of the run."""
        return settings.plan(config, model, world_size, length=config.seq_len)

    def run(self, context: StageContext) -> StageResult:
        """Train, evaluate, audit, and write weights with their tokenizer.

        Raises:
            ConfigError: for what does not fit the devices, the data or the parent (TRAPS T1, K10).
            StopRequested: after a save, on all ranks together.
            AuditError: when nothing was trained (TRAPS T4).
        """
        from stages.runtime.pretraining import Pretraining

        return Pretraining(context).run()
