"""The clean stage: raw text from pinned sources to a deduplicated corpus with a frozen held-out split."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from data.clean_config import DecontaminateConfig, Executor, FormConfig, LocalExecutor, QualityConfig
from data.errors import DataError
from data.source_config import DedupConfig, FilesSource, HeldoutConfig, PackageSource, Source
from data.sources import SourceError, check_source, source_revision
from stages.base import (
    ConfigError,
    Fault,
    Input,
    SourceName,
    Stage,
    StageConfig,
    StageContext,
    StageResult,
    operational,
)
from stages.runtime.decontamination import (
    SET_INPUTS,
    absent,
    absent_files,
    file_faults,
    file_revisions,
    first_fault,
    open_index,
    set_line,
)
from stages.runtime.sources import repeated_names, source_error, unreachable, unreadable

_NAMED_RULES = 4
"""Rules that a source's line of the summary names; all are in the corpus's description."""


class CleanConfig(StageConfig):
    """What to read and how to clean it."""

    kind: Literal["clean"]
    """Cleaning and the held-out split."""
    sources: list[Source] = Field(min_length=1)
    """Where the text comes from; of equal documents the one of the earlier source stays."""
    dedup: DedupConfig = DedupConfig()
    """Removal of exact and near duplicates."""
    heldout: HeldoutConfig = HeldoutConfig()
    """The held-out split."""
    form: FormConfig = FormConfig()
    """Edits of form: mojibake, boilerplate lines, personal data."""
    quality: QualityConfig | None = None
    """A classifier of content, trained from one's own labels; none judges content by rules alone."""
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    """How documents that hold evaluation items are found; of the sets below, and of its own files."""
    tasks: str | None = None
    """``tasks`` stage whose held-out questions no document may hold."""
    facts: str | None = None
    """``facts`` stage whose statements no document may hold (where they are long enough to be looked for)."""
    preferences: str | None = None
    """``preferences`` stage whose held-out prompts no document may hold."""
    messages: str | None = None
    """``messages`` stage, of no corpus of this recipe, whose held-out conversations no document may hold."""
    problems: str | None = None
    """``problems`` stage whose programs no document may hold."""
    executor: Executor = operational(LocalExecutor())
    """Where the work runs: ``{kind: local}``, ``{kind: slurm, partition: ...}`` or ``{kind: ray}``."""
    workers: int = operational(1, ge=1, le=256)
    """Processes, or tasks of a cluster at a time; the result does not depend on it. One needs no start-up time and is
    best below some 50 MB; with SLURM one stands for as many as the cluster gives."""


class Clean(Stage):
    """Reads, cleans, deduplicates and splits; see ``data.corpus`` for what it produces."""

    kind = "clean"
    Config = CleanConfig
    code_version = 3
    produces = "corpus"
    inputs: ClassVar[dict[str, Input]] = SET_INPUTS

    @classmethod
    def check(cls, config: CleanConfig, model: Any) -> list[Fault]:
        """Names must differ, one's own files be there, and what is named exist."""
        faults = repeated_names(config.sources) + unreadable(config.sources, FilesSource, check_source)
        faults += [*file_faults(config.decontaminate), *_label_faults(config)]
        return [*faults, *_unknown_sources(config), *_executor_faults(config)]

    @classmethod
    def check_reach(cls, config: CleanConfig) -> list[Fault]:
        """Data sets of the hub that cannot be streamed from here, and a queue that this machine does not know."""
        faults = unreachable(config.sources)
        if config.executor.kind == "slurm" and shutil.which("sbatch") is None:
            message = "must be local or ray where there is no sbatch; got slurm; start it where jobs are submitted"
            faults.append(Fault("executor.kind", message))
        return faults

    @classmethod
    def source_revisions(cls, config: CleanConfig) -> dict[str, str]:
        """Package hashes, hub commits, digests of one's own files."""
        from data.clean_config import revision

        try:
            found = {source.name: source_revision(source) for source in config.sources}
        except SourceError as error:
            raise source_error(config.sources, error) from error
        if faults := absent_files(config.decontaminate) + _absent_labels(config):
            raise ConfigError(faults)
        found |= file_revisions(config.decontaminate)
        return found | ({"quality:labels": revision(config.quality.labels)} if config.quality else {})

    @classmethod
    def source_names(cls, config: CleanConfig) -> list[SourceName]:
        """The names by which every later stage knows the sources."""
        return [SourceName.of(source) for source in config.sources]

    @classmethod
    def plan(cls, config: CleanConfig, model: Any, world_size: int) -> dict[str, Any]:
        """How many sources and packages; sizes are not known before they are read."""
        packages = {p.sha256 for source in config.sources if isinstance(source, PackageSource) for p in source.packages}
        return {"sources": len(config.sources), "packages": len(packages)}

    def run(self, context: StageContext) -> StageResult:
        """Fill the output with the corpus; raise ``ConfigError`` where the sources give no usable corpus."""
        from data.assemble import write_corpus
        from data.clean import Cleaning, clean_documents, read_shard
        from data.clean_executor import Steps
        from data.rules import Content

        config: CleanConfig = context.config
        started = time.monotonic()

        def say(line: str) -> None:
            print(f"[{time.monotonic() - started:5.1f} s] {line}", flush=True)

        work = context.work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        context.output.mkdir(parents=True, exist_ok=True)
        try:
            contamination, sets = _index(context, work)
            quality, calibration = _classifier(config, work, context.output)
            if calibration and calibration["missed"]:
                say(f"WARNING: {calibration['missed']}")
            content = Content(contamination, quality, tuple(config.quality.sources) if config.quality else ())
            cleaning = Cleaning(config.sources, config.dedup, config.form, content)
            folders = clean_documents(cleaning, context.cache, Steps(work, config.executor, config.workers), say)
            say("held-out split and overlap with it")
            facts = {"decontamination": sets, "quality": calibration}
            described = write_corpus(config.sources, config.heldout, read_shard, folders, facts, context.output)
        except SourceError as error:
            raise source_error(config.sources, error) from error
        except DataError as error:
            raise ConfigError([Fault(field, message) for field, message in error.faults]) from error
        _audit(described, context.output)
        return StageResult(_metrics(described), _summary(described, facts))


def _index(context: StageContext, work: Path) -> tuple[Path | None, dict[str, Any]]:
    """The file of the evaluation sets' runs of words, and what the report says of the sets."""
    config, index = context.config.decontaminate, open_index(context)
    facts = {"ngram": config.ngram, "min_words": config.min_words, "sets": [vars(one) for one in index.facts]}
    if not index.lengths:
        return None, facts
    index.save(work / "contamination.npz")
    return work / "contamination.npz", facts


def _classifier(config: CleanConfig, work: Path, output: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The trained classifier's file, kept beside the corpus too, and its calibration."""
    if config.quality is None:
        return None, None
    from data.clean_quality import train_quality

    model, facts = train_quality(config.quality)
    model.save(work / "quality.npz")
    model.save(output / "quality.npz")
    return work / "quality.npz", facts


def _absent_labels(config: CleanConfig) -> list[Fault]:
    quality = config.quality
    return [absent("quality.labels", quality.labels)] if quality and not Path(quality.labels).is_file() else []


def _label_faults(config: CleanConfig) -> list[Fault]:
    """Labels that are not there, or whose first row is none."""
    from data.clean_quality import read_labels

    faults = _absent_labels(config)
    return faults or (first_fault(read_labels(config.quality)) if config.quality else [])


def _unknown_sources(config: CleanConfig) -> list[Fault]:
    known = [source.name for source in config.sources]
    return [
        Fault(f"quality.sources.{index}", f"must be one of {', '.join(known)}; got {name!r}; mend the name")
        for index, name in enumerate(config.quality.sources if config.quality else [])
        if name not in known
    ]


def _executor_faults(config: CleanConfig) -> list[Fault]:
    if config.executor.kind == "ray" and importlib.util.find_spec("ray") is None:
        message = "must be local or slurm where the package ray is not installed; got ray; pip install ray"
        return [Fault("executor.kind", message)]
    return []


def _audit(described: list[dict[str, Any]], output: Path) -> None:
    """Refuse a corpus that cannot be trained on or measured with (TRAPS T4, M4): each source needs both sides."""
    faults = []
    for index, entry in enumerate(described):
        train, heldout = entry["train"]["documents"], entry["heldout"]["documents"]
        if not train or not heldout:
            lost = ", ".join(f"{rule} {count}" for rule, count in entry["dropped"].items()) or "nothing"
            faults.append(Fault(
                f"sources.{index}",
                f"source {entry['name']} must keep at least 2 documents, one to train on and one to hold out; got "
                f"{train + heldout} (dropped: {lost}){_such_as(output, entry)}; give it more text, split: blank_line, "
                "or other rules",
            ))  # fmt: skip
    if faults:
        raise ConfigError(faults)


def _such_as(output: Path, entry: dict[str, Any]) -> str:
    """One document that the rule which dropped most left out, with the reason, where the report's samples say it."""
    rule = max(entry["dropped"], key=lambda name: entry["dropped"][name], default=None)
    samples = json.loads((output / "report.json").read_text(encoding="utf-8"))["samples"]
    found = (one for one in samples if (one["source"], one["rule"]) == (entry["name"], rule) and "detail" in one)
    return next((f", such as {one['origin']}: {one['detail']}" for one in found), "")


def _metrics(described: list[dict[str, Any]]) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        f"{side}_{unit}": sum(entry[side][unit] for entry in described)
        for side in ("train", "heldout")
        for unit in ("documents", "bytes")
    }
    metrics["dropped_documents"] = sum(count for entry in described for count in entry["dropped"].values())
    return metrics


def _summary(described: list[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    """The funnel as a table: a line a source; and what the corpus was kept clean of."""
    lines = [f"{'source':<22} {'lang':<5} {'train docs':>10} {'MB':>8} {'heldout':>8} {'MB':>7}  dropped"]
    for entry in described:
        train, heldout = entry["train"], entry["heldout"]
        lost = _most(entry["dropped"])
        lines.append(
            f"{entry['name']:<22} {entry['language']:<5} {train['documents']:>10} {train['bytes'] / 1e6:>8.2f} "
            f"{heldout['documents']:>8} {heldout['bytes'] / 1e6:>7.3f}  {lost or '-'}"
        )
    return [*lines, *_content_lines(described, facts)]


def _most(dropped: dict[str, int]) -> str:
    """The rules that dropped most, and how many more there are."""
    rules = [f"{rule} {count}" for rule, count in sorted(dropped.items(), key=lambda item: -item[1])]
    more = len(rules) - _NAMED_RULES
    ending = f" and {more} more rule{'s' * (more > 1)}" if more > 0 else ""
    return ", ".join(rules[:_NAMED_RULES]) + ending


def _content_lines(described: list[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    lines = []
    for one in facts["decontamination"]["sets"]:
        dropped = sum(entry["dropped"].get(f"contaminated_{one['name']}", 0) for entry in described)
        lines.append(set_line(one["name"], one, f"{dropped} documents removed"))
    if quality := facts["quality"]:
        test, threshold = quality["test"], quality["threshold"]
        lines.append(
            f"classifier: on {test['n']} labels that chose nothing it keeps {test['kept']}, precision "
            f"{test['precision']} {test['precision_interval']}, recall {test['recall']}, threshold {threshold}"
        )
        lines += [f"WARNING: {quality['missed']}"] if quality["missed"] else []
    return lines
