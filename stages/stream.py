"""A stream in place of shards: freeze the held-out set, and let pretraining read the rest as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from data.clean_config import DecontaminateConfig
from data.source_config import FilesSource
from data.sources import SourceError, check_source, source_revision
from data.stream_config import StreamSettings
from model.spec import ModelSpec
from stages.base import Fault, Input, SourceName, Stage, StageConfig, StageContext, StageResult, later
from stages.runtime.decontamination import SET_INPUTS, file_faults, file_revisions, open_index, set_line
from stages.runtime.sources import repeated_names, source_error, unreachable, unreadable


class StreamConfig(StreamSettings, StageConfig):
    """Sources, their order, and what is held out of them."""

    kind: Literal["stream"] = "stream"
    """This stage."""
    tokenizer: str
    """The ``tokenizer`` stage."""
    heldout_documents: int = Field(50, ge=1, le=1_000_000_000)
    """Held-out documents frozen of each source, the first that it yields; fewer where it holds fewer."""
    sample_documents: int = Field(2000, ge=1, le=1_000_000_000)
    """First documents of each source that are read to count tokens for the unigram yardstick and the specials."""
    min_special_count: int = Field(8, ge=1, le=1_000_000_000)
    """Fewest occurrences in that sample of every special but padding; fewer is refused (TRAPS T8)."""
    decontaminate: DecontaminateConfig = later(DecontaminateConfig())
    """How documents that hold evaluation items are found; of the sets below, and of its own files."""
    tasks: str | None = None
    """``tasks`` stage whose held-out questions no document may hold."""
    facts: str | None = None
    """``facts`` stage whose statements no document may hold (where they are long enough to be looked for)."""
    preferences: str | None = None
    """``preferences`` stage whose held-out prompts no document may hold."""
    messages: str | None = None
    """``messages`` stage whose held-out conversations no document may hold."""
    problems: str | None = None
    """``problems`` stage whose programs no document may hold."""


class Stream(Stage):
    """From sources and a tokenizer to a tokens artifact without training tokens."""

    kind: ClassVar[str] = "stream"
    Config: ClassVar[type[StageConfig]] = StreamConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "tokens"
    inputs: ClassVar[dict[str, Input]] = {"tokenizer": Input(produces="tokenizer"), **SET_INPUTS}

    @classmethod
    def check(cls, config: StreamConfig, model: ModelSpec | None) -> list[Fault]:
        """Repeated names, files that cannot be read, rules and passes that mean nothing here."""
        faults = repeated_names(config.sources) + unreadable(config.sources, FilesSource, check_source)
        faults += file_faults(config.decontaminate)
        return faults + [Fault(field, message) for field, message in config.faults()]

    @classmethod
    def check_reach(cls, config: StreamConfig) -> list[Fault]:
        """Data sets of the hub that cannot be streamed from here."""
        return unreachable(config.sources)

    @classmethod
    def source_revisions(cls, config: StreamConfig) -> dict[str, str]:
        """Hub commits and digests of one's own files, benchmarks among them."""
        try:
            found = {source.name: source_revision(source) for source in config.sources}
        except SourceError as error:
            raise source_error(config.sources, error) from error
        return found | file_revisions(config.decontaminate)

    @classmethod
    def source_names(cls, config: StreamConfig) -> list[SourceName]:
        """The names by which a mixture weighs the sources."""
        return [SourceName.of(source) for source in config.sources]

    @classmethod
    def plan(cls, config: StreamConfig, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Sources, lanes and passes; sizes are not known, since nothing is staged."""
        passes = {source.name: config.passes.get(source.name, 1) for source in config.sources}
        return {"sources": len(config.sources), "lanes": config.lanes, "passes": passes, "on_end": config.on_end}

    def run(self, context: StageContext) -> StageResult:
        """Freeze the held-out set and write ``tokens.json`` last.

        Raises:
            ConfigError: for a source that cannot be read.
        """
        from data.stream_freeze import freeze_stream

        config: StreamConfig = context.config
        settings = StreamSettings.model_validate(config.model_dump(include=set(StreamSettings.model_fields)))
        try:
            facts = freeze_stream(
                settings,
                context.parent_output("tokenizer"),
                context.output,
                seed=context.seed,
                heldout_documents=config.heldout_documents,
                sample_documents=config.sample_documents,
                min_special_count=config.min_special_count,
                contamination=open_index(context),
                cache=Path(context.cache) / "hub",
                say=lambda line: print(f"stream: {line}", flush=True),
            )
        except SourceError as error:
            raise source_error(config.sources, error) from error
        return StageResult(_metrics(facts), _summary(facts))


_COUNTS = ("items", "unchecked_items", "removed_documents")


def _metrics(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": facts["vocab_size"],
        "heldout_documents": sum(source["heldout"]["documents"] for source in facts["sources"]),
        "heldout_tokens": sum(source["heldout"]["tokens"] for source in facts["sources"]),
        "heldout_hash": facts["heldout_hash"],
        "read_documents": facts["read_documents"],
        "shared_documents": sum(facts["shared_documents"].values()),
        **{f"{what}_{one['name']}": one[what] for one in facts["decontamination"]["sets"] for what in _COUNTS},
    }


def _summary(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"vocabulary {facts['vocab_size']}, held-out {facts['heldout_hash'][:12]}; training text is read as it comes",
        "source            language  held-out documents  held-out tokens",
    ]
    for source in facts["sources"]:
        held = source["heldout"]
        lines.append(f"{source['name']:<16}  {source['language']:<8}  {held['documents']:>18,}  {held['tokens']:>15,}")
    lines += [
        f"source {name}: {count:,} of its documents read so far stand in an earlier source too; a stream keeps both"
        for name, count in facts["shared_documents"].items()
        if count
    ]
    read = facts["read_documents"]
    for one in facts["decontamination"]["sets"]:
        removed = f"{one['removed_documents']} of the {read:,} documents read so far left out, and every later one"
        lines.append(set_line(one["name"], one, removed))
    return lines
