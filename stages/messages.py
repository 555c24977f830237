"""The messages stage: conversations from files, hub, packages, corpus and tasks, checked, deduplicated and split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from data.messages_config import CorpusMessages, FilesMessages, MessagesHeldout, MessagesSource, TasksMessages
from data.sources import SourceError
from stages.base import ConfigError, Fault, Input, Stage, StageConfig, StageContext, StageResult, operational
from stages.runtime.sources import repeated_names, source_error, unreachable, unreadable


class MessagesConfig(StageConfig):
    """Which conversations, and which of them are held out."""

    kind: Literal["messages"]
    """Chat data in OpenAI's form of messages."""
    sources: list[MessagesSource] = Field(min_length=1)
    """Where the conversations come from; of equal ones that of the earlier source stays."""
    corpus: str | None = None
    """The ``clean`` stage that sources of type ``corpus`` read."""
    tasks: str | None = None
    """The ``tasks`` stage that sources of type ``tasks`` read."""
    heldout: MessagesHeldout = MessagesHeldout()
    """The held-out split."""
    shown_faults: int = operational(3, ge=0, le=1_000_000)
    """Rows a rule and source that are printed with file, line and reason; ``left_out.jsonl`` holds all."""


class Messages(Stage):
    """Reads, checks, deduplicates and splits conversations; see ``data.messages`` for what it produces."""

    kind: ClassVar[str] = "messages"
    Config: ClassVar[type[StageConfig]] = MessagesConfig
    code_version: ClassVar[int] = 3
    produces: ClassVar[str] = "messages"
    inputs: ClassVar[dict[str, Input]] = {
        "corpus": Input("corpus", optional=True),
        "tasks": Input("tasks", optional=True),
    }

    @classmethod
    def check(cls, config: Any, model: Any) -> list[Fault]:
        """Names must differ, one's own files be there, and inputs be both named and read."""
        from data.messages_sources import check_conversations

        faults = unreadable(config.sources, FilesMessages, check_conversations)
        return repeated_names(config.sources) + faults + _input_faults(config)

    @classmethod
    def check_reach(cls, config: Any) -> list[Fault]:
        """Data sets of the hub that cannot be streamed from here."""
        return unreachable(config.sources)

    @classmethod
    def check_parent_configs(cls, config: Any, parents: Mapping[str, Any]) -> list[Fault]:
        """Demonstrations of tasks of which none is held out: there would be nothing to measure (TRAPS M4)."""
        if "tasks" not in parents:
            return []
        return [
            Fault(f"sources.{index}", "must show a task with held-out questions; got none; set the task's heldout")
            for index, source in enumerate(config.sources)
            if isinstance(source, TasksMessages)
            and not any(
                one.heldout for one in parents["tasks"].tasks if source.tasks is None or one.name in source.tasks
            )
        ]

    @classmethod
    def check_sources(cls, config: Any, sources: Mapping[str, list[str]]) -> list[Fault]:
        """A source of type ``corpus`` must name one that the corpus has."""
        known = sources.get("corpus")
        return [
            Fault(f"sources.{index}.corpus_source", f"must be one of {', '.join(known)}; got {source.corpus_source!r}")
            for index, source in enumerate(config.sources)
            if known is not None and isinstance(source, CorpusMessages) and source.corpus_source not in known
        ]

    @classmethod
    def source_names(cls, config: Any) -> list[str]:
        """The names that the rows carry."""
        return [source.name for source in config.sources]

    @classmethod
    def source_revisions(cls, config: Any) -> dict[str, str]:
        """Package hashes, hub commits, digests of one's own files; parents are pinned by their own keys."""
        from data.messages_sources import messages_revision

        try:
            found = {source.name: messages_revision(source) for source in config.sources}
        except SourceError as error:
            raise source_error(config.sources, error) from error
        return {name: revision for name, revision in found.items() if revision is not None}

    @classmethod
    def plan(cls, config: Any, model: Any, world_size: int) -> dict[str, Any]:
        """How many sources; their sizes are not known before they are read."""
        return {"sources": len(config.sources)}

    def run(self, context: StageContext) -> StageResult:
        """Fill the output; raise ``ConfigError`` where a source leaves nothing to train on or to measure with."""
        from data import messages

        config = context.config
        context.output.mkdir(parents=True, exist_ok=True)
        parents = {field: context.parent_output(field) for field in context.parents}
        try:
            rows, faulty = messages.gather(config.sources, context.cache, parents, lambda line: print(line, flush=True))
        except SourceError as error:
            raise source_error(config.sources, error) from error
        known = messages.task_sides(parents["tasks"]) if "tasks" in parents else messages.NO_TASKS
        sides, overlapping = messages.split(rows, config.heldout, known)
        left_out = faulty + overlapping
        for line in _fault_lines(left_out, config.shown_faults):
            print(line, flush=True)
        info = messages.write(context.output, config.sources, sides, left_out)
        _audit(info)
        return StageResult(_metrics(info), _summary(info))


def _input_faults(config: Any) -> list[Fault]:
    """An input that is needed and not named, or named and not read (TRAPS T7)."""
    faults = []
    for field, kind in (("corpus", CorpusMessages), ("tasks", TasksMessages)):
        named = getattr(config, field)
        readers = [index for index, source in enumerate(config.sources) if isinstance(source, kind)]
        if readers and named is None:
            message = f"must name a stage, since sources.{readers[0]} reads it; got none; set {field}"
            faults.append(Fault(field, message))
        if not readers and named is not None:
            message = f"must be left out where no source reads it; got {named!r}; add a source of type {field}"
            faults.append(Fault(field, message))
    return faults


def _fault_lines(left_out: list[Any], shown: int) -> list[str]:
    """A line a source and rule with its count, and the first few rows under it."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for one in left_out:
        groups.setdefault((one.source, one.fault.rule), []).append(one)
    lines = []
    for (source, rule), members in groups.items():
        lines.append(f"{source}: left out {len(members)} by {rule}")
        # What a limit left out is no fault to look at.
        examples = [] if rule.startswith("beyond_") else members[:shown]
        lines += [f"  {one.origin}: {one.fault}" for one in examples]
    return lines


def _audit(info: dict[str, Any]) -> None:
    """Each source must give at least a row to train on and one to hold out (TRAPS T4, M4)."""
    faults = []
    for index, entry in enumerate(info["sources"]):
        if not entry["train"]["rows"] or not entry["heldout"]["rows"]:
            lost = ", ".join(f"{rule} {count}" for rule, count in entry["left_out"].items()) or "nothing"
            faults.append(Fault(
                f"sources.{index}",
                f"source {entry['name']} must keep a conversation to train on and one to hold out; got "
                f"{entry['train']['rows']} and {entry['heldout']['rows']} (left out: {lost}); mend its rows (each with "
                "file and line is listed above) or drop the source",
            ))  # fmt: skip
    if faults:
        raise ConfigError(faults)


def _metrics(info: dict[str, Any]) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        f"{side}_{unit}": sum(entry[side][unit] for entry in info["sources"])
        for side in ("train", "heldout")
        for unit in ("rows", "assistant_bytes")
    }
    left_out = sum(sum(entry["left_out"].values()) for entry in info["sources"])
    return {**metrics, "left_out_rows": left_out, "heldout_hash": info["heldout_hash"]}


def _summary(info: dict[str, Any]) -> list[str]:
    lines = [f"{'source':<22} {'lang':<5} {'train':>7} {'kB':>8} {'heldout':>8} {'kB':>7}  left out"]
    for entry in info["sources"]:
        train, heldout = entry["train"], entry["heldout"]
        lost = ", ".join(f"{rule} {n}" for rule, n in sorted(entry["left_out"].items(), key=lambda x: -x[1])[:3])
        lines.append(
            f"{entry['name']:<22} {entry['language']:<5} {train['rows']:>7} {train['assistant_bytes'] / 1e3:>8.1f} "
            f"{heldout['rows']:>8} {heldout['assistant_bytes'] / 1e3:>7.1f}  {lost or '-'}"
        )
    return [*lines, f"held-out {info['heldout_hash'][:12]}"]
