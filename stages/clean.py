"""The clean stage: raw text from pinned sources to a deduplicated corpus with a frozen held-out split."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data.source_config import DedupConfig, FilesSource, HeldoutConfig, PackageSource, Source
from data.sources import SourceError, matching_files, source_revision
from stages.base import ConfigError, Fault, Stage, StageConfig, StageContext, StageResult, operational


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
    workers: int = operational(1, ge=1, le=256)
    """Processes; the result does not depend on it. One needs no start-up time and is best below some 50 MB."""


class Clean(Stage):
    """Reads, cleans, deduplicates and splits; see ``data.corpus`` for what it produces."""

    kind = "clean"
    Config = CleanConfig
    code_version = 1
    produces = "corpus"

    @classmethod
    def check(cls, config: CleanConfig, model: Any) -> list[Fault]:
        """Names must differ, and one's own files must be there."""
        faults = []
        counts = Counter(source.name for source in config.sources)
        for index, source in enumerate(config.sources):
            if counts[source.name] > 1:
                message = f"must differ from the other sources' names; got {source.name!r} {counts[source.name]} times"
                faults.append(Fault(f"sources.{index}.name", message))
            if isinstance(source, FilesSource):
                try:
                    matching_files(source, Path(source.path))
                except SourceError as error:
                    faults.append(Fault(f"sources.{index}.{error.field}", str(error)))
        return faults

    @classmethod
    def source_revisions(cls, config: CleanConfig) -> dict[str, str]:
        """Package hashes, hub commits, digests of one's own files."""
        try:
            return {source.name: source_revision(source) for source in config.sources}
        except SourceError as error:
            raise _config_error(config, error) from error

    @classmethod
    def source_names(cls, config: CleanConfig) -> list[str]:
        """The names by which every later stage knows the sources."""
        return [source.name for source in config.sources]

    @classmethod
    def plan(cls, config: CleanConfig, model: Any, world_size: int) -> dict[str, Any]:
        """How many sources and packages; sizes are not known before they are read."""
        packages = {p.sha256 for source in config.sources if isinstance(source, PackageSource) for p in source.packages}
        return {"sources": len(config.sources), "packages": len(packages)}

    def run(self, context: StageContext) -> StageResult:
        """Fill the output with the corpus; raise ``ConfigError`` where the sources give no usable corpus."""
        from data.assemble import write_corpus
        from data.clean import clean_documents, read_shard

        config: CleanConfig = context.config
        started = time.monotonic()

        def say(line: str) -> None:
            print(f"[{time.monotonic() - started:5.1f} s] {line}", flush=True)

        context.work.mkdir(parents=True, exist_ok=True)
        context.output.mkdir(parents=True, exist_ok=True)
        try:
            survivors, dropped = clean_documents(
                config.sources, config.dedup, context.cache, context.work, config.workers, say
            )
        except SourceError as error:
            raise _config_error(config, error) from error
        say("held-out split and overlap with it")
        folders = (context.work / "raw", survivors, dropped)
        described = write_corpus(config.sources, config.heldout, read_shard, folders, context.output)
        _audit(config, described)
        return StageResult(_metrics(described), _summary(described))


def _config_error(config: CleanConfig, error: SourceError) -> ConfigError:
    index = next((i for i, source in enumerate(config.sources) if source.name == error.source), None)
    return ConfigError(Fault(f"sources.{index}.{error.field}", str(error)))


def _audit(config: CleanConfig, described: list[dict[str, Any]]) -> None:
    """Refuse a corpus that cannot be trained on or measured with (TRAPS T4, M4): each source needs both sides."""
    faults = []
    for index, entry in enumerate(described):
        train, heldout = entry["train"]["documents"], entry["heldout"]["documents"]
        if not train or not heldout:
            lost = ", ".join(f"{rule} {count}" for rule, count in entry["dropped"].items()) or "nothing"
            faults.append(Fault(
                f"sources.{index}",
                f"source {entry['name']} must keep at least 2 documents, one to train on and one to hold out; got "
                f"{train + heldout} (dropped: {lost}); give it more text, split: blank_line, or other rules",
            ))  # fmt: skip
    if faults:
        raise ConfigError(faults)


def _metrics(described: list[dict[str, Any]]) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        f"{side}_{unit}": sum(entry[side][unit] for entry in described)
        for side in ("train", "heldout")
        for unit in ("documents", "bytes")
    }
    metrics["dropped_documents"] = sum(count for entry in described for count in entry["dropped"].values())
    return metrics


def _summary(described: list[dict[str, Any]]) -> list[str]:
    """The funnel as a table: a line a source."""
    lines = [f"{'source':<22} {'lang':<5} {'train docs':>10} {'MB':>8} {'heldout':>8} {'MB':>7}  dropped"]
    for entry in described:
        train, heldout = entry["train"], entry["heldout"]
        lost = ", ".join(f"{rule} {count}" for rule, count in sorted(entry["dropped"].items(), key=lambda x: -x[1])[:4])
        lines.append(
            f"{entry['name']:<22} {entry['language']:<5} {train['documents']:>10} {train['bytes'] / 1e6:>8.2f} "
            f"{heldout['documents']:>8} {heldout['bytes'] / 1e6:>7.3f}  {lost or '-'}"
        )
    return lines
