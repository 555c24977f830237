"""Small stages that stand in for the real ones, so that recipe, chain and command line are tested on their own."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from data.errors import DataError
from data.fetch import FetchError
from stages.base import ConfigError, Fault, Input, Section, Stage, StageConfig, StageResult, StopRequested, operational
from stages.runtime.artifact import read_record
from stages.runtime.distributed import rank

Ending = Literal[
    "done", "saved", "error", "fault", "value", "memory", "disk", "kill", "sigterm", "busy", "data", "fetch", "secret"
]


class Rules(Section):
    """Nested, with an operational field of its own."""

    min_words: int = Field(default=5, ge=0)
    """Shortest document."""
    verbose: bool = operational(False)
    """Talk."""


class TextSource(Section):
    type: Literal["text"]
    """Text."""
    text: str
    """The text itself."""


class FileSource(Section):
    type: Literal["file"]
    """File."""
    path: Path
    """Where it lies."""


class GatherConfig(StageConfig):
    kind: Literal["gather"]
    """This stage."""
    sources: list[Annotated[TextSource | FileSource, Field(discriminator="type")]] = Field(min_length=1, max_length=9)
    """What to read."""
    rules: Rules = Rules()
    """How to judge."""
    workers: int = operational(1, ge=1, le=64)
    """Processes."""
    ending: Ending = operational("done")
    """What becomes of the run."""


class TrainConfig(StageConfig):
    kind: Literal["train"]
    """This stage."""
    data: str
    """Stage that gathers."""
    from_: str | None = Field(default=None, alias="from")
    """Stage that trained before."""
    max_steps: int = Field(ge=1, le=10**9)
    """Steps."""
    lr: float = Field(gt=0, le=1)
    """Peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Rates."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of lr."""
    micro_batch_size: int = operational(1, ge=1)
    """Sequences per device."""
    ending: Ending = operational("done")
    """What becomes of the run."""


class Gather(Stage):
    kind: ClassVar[str] = "gather"
    Config: ClassVar[type[StageConfig]] = GatherConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "corpus"

    @classmethod
    def source_revisions(cls, config: Any) -> dict[str, str]:
        return {f"s{index}": "0" * 8 for index, _ in enumerate(config.sources)}

    def run(self, context: Any) -> StageResult:
        end(context)
        (context.output / "text.txt").write_text("".join(getattr(s, "text", "") for s in context.config.sources))
        return StageResult({"documents": len(context.config.sources)}, ["gathered"])


class Train(Stage):
    kind: ClassVar[str] = "train"
    Config: ClassVar[type[StageConfig]] = TrainConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "model"
    inputs: ClassVar[dict[str, Input]] = {"data": Input("corpus"), "from_": Input("model", optional=True)}
    uses_model: ClassVar[bool] = True
    launched: ClassVar[bool] = True

    @classmethod
    def extension(cls, config: Any) -> dict[str, Any]:
        return {"max_steps": config.max_steps} if config.schedule == "constant" else {}

    @classmethod
    def check(cls, config: Any, model: Any) -> list[Fault]:
        if config.micro_batch_size > 4:
            return [Fault("micro_batch_size", f"must be at most 4; got {config.micro_batch_size}; set 4")]
        return []

    @classmethod
    def check_parents(cls, config: Any, model: Any, parents: Any) -> list[Fault]:
        if "data" not in parents:
            return []
        text = (parents["data"] / "output" / "text.txt").read_text()
        return [Fault("data", "must hold no poison; got some")] if "poison" in text else []

    @classmethod
    def plan(cls, config: Any, model: Any, world_size: int) -> dict[str, Any]:
        return {"tokens": config.max_steps * 100, "disk_bytes": 2048}

    def run(self, context: Any) -> StageResult:
        context.tracker.log("train", context.config.max_steps, {"loss_nats_per_token": 1.5, "tokens_per_s": 1000.0})
        end(context)
        data = (context.parent_output("data") / "text.txt").read_text()
        if rank() == 0:
            (context.output / "weights.txt").write_text(f"{data} {context.config.max_steps}")
        return StageResult({"step": context.config.max_steps, "loss": 1.5}, ["trained"])


def end(context: Any) -> None:
    """Become what the config's ``ending`` says."""
    match context.config.ending:
        case "saved":
            raise StopRequested("SIGTERM")
        case "error":
            raise RuntimeError("the sum is not\nfinite")
        case "fault":
            raise ConfigError(Fault("lr", "must be lower; got more; set less"))
        case "value":
            raise ValueError("lr must be lower")
        case "data":
            raise DataError([("lr", "must fit the text; got more; set less")])
        case "fetch":
            raise FetchError("package a==1 could not be downloaded; check the network")
        case "secret":
            tell_secrets(context)
        case "memory":
            raise MemoryError
        case "disk":
            raise OSError(28, "No space left on device")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)


def tell_secrets(context: Any) -> None:
    """Give a secret away in every way that a library might: printed, logged, raised."""
    told = f"401 for token={os.environ['HF_TOKEN']} at https://bob:pw1234@mirror.example/simple"
    print(told)
    print(told, file=sys.stderr)
    logging.getLogger("data.fetch").warning("%s", told)
    raise RuntimeError(told)


STAGES: dict[str, type[Stage]] = {"gather": Gather, "train": Train}

MODEL = """
model:
  d_model: 64
  d_ff: 128
  vocab_size: 256
  max_seq_len: 128
  layers: "2*m"
  mixers:
    m: {mixer: attention, n_heads: 4, n_kv_heads: 2, head_dim: 16}
"""

RECIPE = f"""name: toy
seed: 17
{MODEL}
tracking: {{wandb: disabled}}
stages:
  gather:
    kind: gather
    sources:
      - {{type: text, text: hello}}
  train:
    kind: train
    data: gather
    max_steps: 300
    lr: 2e-4
  tuned:
    kind: train
    data: gather
    from: train
    max_steps: 10
    lr: 1e-4
"""


def write_recipe(directory: Path, text: str = RECIPE) -> Path:
    path = directory / "toy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


FAKE_RUN = Path(__file__).resolve().parent / "fake_run.py"


def records(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The `stage.json` of each stage below `runs`, by the stage's name."""
    found = [read_record(path.parent) for path in (tmp_path / "runs").rglob("stage.json")]
    return {record["stage"]: record for record in found if record is not None}
