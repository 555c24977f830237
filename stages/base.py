"""The contract between a recipe and a stage: configuration, inputs, context and result.

Importing this module costs nothing heavy, so that ``--help`` and ``--plan`` stay fast. A stage is one file that defines
a ``StageConfig`` subclass and a ``Stage`` subclass; ``stages.STAGES`` lists the stages by kind.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from model.spec import ModelSpec

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_SAVED = 85


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong with what the user gave.

    ``path`` is dotted as the user would write it for ``--set`` (``pretrain.lr``); ``message`` says what must hold, what
    was received and what to set; ``line`` is the YAML line where one is known.
    """

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.path}: {self.message}"


class ConfigError(ValueError):
    """Everything that is wrong with what the user gave, gathered; the command line prints one line a fault, exit 2."""

    def __init__(self, faults: list[Fault] | Fault | str) -> None:
        if isinstance(faults, str):
            faults = [Fault("", faults)]
        self.faults = [faults] if isinstance(faults, Fault) else list(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class SourceName(str):
    """The name of a source, with the language and domain by which a mixture may weigh it; None where unknown."""

    language: str | None = None
    domain: str | None = None

    @classmethod
    def of(cls, source: Any) -> SourceName:
        """The name of a configured source."""
        name = cls(source.name)
        name.language, name.domain = source.language, source.domain
        return name


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """Raised by a stage on every rank together, after its state was saved, because the run was asked to stop."""


def operational(default: Any = ..., **kwargs: Any) -> Any:
    """A field that cannot change the result (cadence, workers, logging) and so stays out of the stage's key."""
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


def later(default: Any, **kwargs: Any) -> Any:
    """A field that changes the result, but came when artifacts stood already: at its default it is no part of the key.

    ``default`` must compute what was computed before there was the field.
    """
    return Field(default, json_schema_extra={"later": True}, **kwargs)


class Section(BaseModel):
    """A frozen configuration section that refuses unknown keys (TRAPS T7)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)


class StageConfig(Section):
    """Fields that every stage has; a stage's own ``Config`` narrows ``kind`` to a ``Literal``."""

    kind: str
    """Which stage this is: a key of ``stages.STAGES``."""


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of a stage: the config field that names the parent, and what that parent must produce.

    ``field`` is the attribute on the config (``"data"``, ``"from_"``) holding the name of a stage of this recipe, or
    the path (with a slash) of a finished artifact directory elsewhere.
    """

    produces: str
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class StageContext:
    """All that a running stage knows of its surroundings.

    ``directory`` is the artifact, ``runs/<pipeline>/<stage>-<key8>``; ``output`` is the temporary folder to fill, which
    the lifecycle seals (manifest, fsync, rename to ``directory/"output"``) after ``run`` returned; ``work`` survives
    restarts and is removed once the stage is done; ``parents`` maps an input's field to the parent's verified artifact
    directory.
    """

    pipeline: str
    name: str
    key: str
    seed: int
    config: Any
    model: ModelSpec | None
    directory: Path
    output: Path
    work: Path
    cache: Path
    parents: Mapping[str, Path]
    tracker: Any
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def parent_output(self, field: str) -> Path:
        """The sealed output folder of the parent that the config names in ``field``."""
        return self.parents[field] / "output"

    def parent_digest(self, field: str) -> str | None:
        """Under which digest that parent's output stands in the lineage; None where the record does not say."""
        return ((self.record.get("parents") or {}).get(field) or {}).get("digest")


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a finished stage says of itself: ``metrics`` go into ``stage.json``, ``summary`` is a screen of text."""

    metrics: dict[str, Any]
    summary: list[str] = dataclasses.field(default_factory=list)


class Stage(ABC):
    """One kind of stage. Subclasses state the facts below and implement ``run``."""

    kind: ClassVar[str]
    Config: ClassVar[type[StageConfig]]
    code_version: ClassVar[int]
    """Raised by hand when the same config would give another result; part of the key."""
    produces: ClassVar[str]
    """``corpus``, ``tokenizer``, ``tokens`` or ``model``."""
    inputs: ClassVar[dict[str, Input]] = {}
    uses_model: ClassVar[bool] = False
    """Whether the recipe's ``model`` section is part of the key and handed to ``run``."""
    launched: ClassVar[bool] = False
    """Whether the stage trains under the deepspeed launcher, one process a rank. Data stages run in rank 0 alone."""

    shared: ClassVar[bool] = False
    """Whether a stage that is not ``launched`` is run by all ranks together where a launcher started several."""

    @classmethod
    def key_config(cls, config: Any) -> dict[str, Any]:
        """The part of ``config`` that decides the result: all but operational fields, inputs and ``extension``."""
        skipped = operational_fields(cls.Config) | set(cls.inputs) | set(cls.extension(config))
        return without_operational(config, skipped)

    @classmethod
    def extension(cls, config: Any) -> dict[str, Any]:
        """Fields by which a longer run extends the same artifact (``{"max_steps": 9}``); they enter children's keys."""
        return {}

    @classmethod
    def check(cls, config: Any, model: ModelSpec | None) -> list[Fault]:
        """Faults that need more than one field; paths relative to the stage (``"micro_batch_size"``).

        ``model`` is None where the recipe has none, or a faulty one, which is reported by itself.
        """
        return []

    @classmethod
    def check_parents(cls, config: Any, model: ModelSpec | None, parents: Mapping[str, Path]) -> list[Fault]:
        """Faults of finished parents that do not fit (tokenizer, chat template, vocabulary; TRAPS K10).

        ``parents`` maps an input's field to the parent's artifact directory. It is asked twice: before anything runs,
        with those parents that are finished already, and by rank 0 before ``run``, when every parent's output has been
        verified; paths are relative to the stage.
        """
        return []

    @classmethod
    def check_parent_configs(cls, config: Any, parents: Mapping[str, Any]) -> list[Fault]:
        """Faults against the configs of parents that are not finished yet, by the input's field.

        What a parent will be is known from its config as far as it computes it; ``check_parents`` sees what it became.
        """
        return []

    @classmethod
    def check_beside(cls, config: Any, parents: Mapping[str, Any]) -> list[Fault]:
        """Faults against the configs of all parents within the recipe, finished or not, by the input's field."""
        return []

    @classmethod
    def score_names(cls, config: Any, parents: Mapping[str, Any], sources: Mapping[str, list[str]]) -> list[str]:
        """Names of the scores that the stage will give; one that ends in ``*`` stands for parts not known yet.

        ``parents`` are configs and ``sources`` names of sources, by the input's field, where the recipe has them; a
        stage that measures nothing, or does not say, has none.
        """
        return []

    @classmethod
    def check_devices(cls, config: Any, world_size: int | None, has_gpu: bool | None) -> list[Fault]:
        """Faults of ``config`` on that many ranks with or without GPUs; None leaves either out of it."""
        return []

    @classmethod
    def check_reach(cls, config: Any) -> list[Fault]:
        """Faults of what ``config`` reads from other machines; may ask them, and so is called before a run alone."""
        return []

    @classmethod
    def fitted(cls, config: Any, world_size: int) -> Any:
        """``config`` as that many ranks run it: operational fields alone may differ, towards what fits."""
        return config

    @classmethod
    def source_names(cls, config: Any) -> Sequence[str] | None:
        """Names of the sources that the stage brings into the chain; None when it brings none of its own."""
        return None

    @classmethod
    def check_sources(cls, config: Any, sources: Mapping[str, list[str]]) -> list[Fault]:
        """Faults of fields that name sources; ``sources`` maps an input's field to those that reach the stage there.

        An input whose sources the recipe does not define (an artifact elsewhere) is absent.
        """
        return []

    @classmethod
    def source_revisions(cls, config: Any) -> dict[str, str]:
        """Pinned revisions of whatever the stage reads from outside the chain (package hashes, file digests)."""
        return {}

    @classmethod
    def plan(cls, config: Any, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Figures for ``--plan``, computed without a GPU and without the parents' artifacts."""
        return {}

    @abstractmethod
    def run(self, context: StageContext) -> StageResult:
        """Fill ``context.output``; raise ``StopRequested`` after saving when asked to stop."""


def operational_fields(config_type: type[BaseModel]) -> set[str]:
    """Names of the fields that were declared with ``operational``."""
    marked = set()
    for name, field in config_type.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            marked.add(name)
    return marked


def without_operational(value: Any, skipped: set[str] | None = None) -> Any:
    """``value`` as plain data, operational fields left out at every depth, and so are ``later`` ones at their default;
    ``skipped`` names at the top only.
    """
    if isinstance(value, BaseModel):
        leave = operational_fields(type(value)) | _latecomers(value) | (skipped or set())
        return {
            name: without_operational(getattr(value, name)) for name in type(value).model_fields if name not in leave
        }
    if isinstance(value, Mapping):
        return {key: without_operational(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_operational(item) for item in value]
    return value


def _latecomers(value: BaseModel) -> set[str]:
    """Names of the ``later`` fields that have their default."""
    found = set()
    for name, field in type(value).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("later") and getattr(value, name) == field.default:
            found.add(name)
    return found
