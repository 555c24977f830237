"""Preference pairs for DPO: harmful prompts to refuse, look-alikes to help with, split by template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from data.errors import DataError
from data.fetch import FetchError
from data.preferences import gather, source_revision, write
from data.preferences_config import FilePreferences, PreferenceSource
from data.preferences_rows import files_of
from model.spec import ModelSpec
from stages.base import ConfigError, Fault, Stage, StageConfig, StageContext, StageResult
from stages.runtime.sources import repeated_names, unreachable


class PreferencesConfig(StageConfig):
    """Which pairs, and how many are held out."""

    kind: Literal["preferences"]
    """This stage."""
    sources: list[PreferenceSource] = Field(min_length=1)
    """Where the pairs come from; of equal pairs the one of the earlier source stays."""
    heldout_share: float = Field(0.25, gt=0, lt=0.5)
    """Share of templates (of prompts, where rows are one's own) that is held out, chosen by the hash of their name."""


class Preferences(Stage):
    """From templates, files, packages or a hub to disjoint sets of pairs."""

    kind: ClassVar[str] = "preferences"
    Config: ClassVar[type[StageConfig]] = PreferencesConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "preferences"

    @classmethod
    def check_reach(cls, config: Any) -> list[Fault]:
        """Data sets of the hub that cannot be streamed from here."""
        return unreachable(config.sources)

    @classmethod
    def check(cls, config: Any, model: ModelSpec | None) -> list[Fault]:
        """Names must differ, and one's own files must be there."""
        faults = repeated_names(config.sources)
        for index, source in enumerate(config.sources):
            if isinstance(source, FilePreferences):
                try:
                    files_of(source)
                except FileNotFoundError as error:
                    faults.append(Fault(f"sources.{index}.path", str(error)))
        return faults

    @classmethod
    def source_revisions(cls, config: Any) -> dict[str, str]:
        """Digests of templates and files, package hashes, hub commits."""
        try:
            return {source.name: source_revision(source) for source in config.sources}
        except FileNotFoundError as error:
            raise ConfigError(Fault("sources", str(error))) from error

    @classmethod
    def plan(cls, config: Any, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """How many sources."""
        return {"sources": len(config.sources)}

    def run(self, context: StageContext) -> StageResult:
        """Write both sides; raise ``ConfigError`` with every faulty row's file and line."""
        config = context.config
        try:
            gathered = gather(config.sources, Path(context.cache), print)
            facts = write(context.output, gathered, config.sources, config.heldout_share)
        except DataError as error:
            raise ConfigError([Fault(field or "sources", message) for field, message in error.faults]) from error
        except (FileNotFoundError, FetchError) as error:
            raise ConfigError(Fault("sources", str(error))) from error
        return StageResult(_metrics(facts), _summary(facts))


def _metrics(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_pairs": facts["train"]["pairs"],
        "heldout_pairs": facts["heldout"]["pairs"],
        "train_templates": len(facts["train"]["templates"]),
        "heldout_templates": len(facts["heldout"]["templates"]),
        "dropped_pairs": sum(count for source in facts["sources"] for count in source["dropped"].values()),
        "heldout_hash": facts["heldout_hash"],
    }


def _summary(facts: dict[str, Any]) -> list[str]:
    lines = [f"{'source':<14} {'category/language':<20} {'train':>6} {'heldout':>8}  dropped"]
    for source in facts["sources"]:
        lost = ", ".join(f"{rule} {count}" for rule, count in source["dropped"].items()) or "-"
        for group in sorted((source["train"].keys() | source["heldout"].keys()) - {"pairs"}):
            train, heldout = source["train"].get(group, 0), source["heldout"].get(group, 0)
            lines.append(f"{source['name']:<14} {group:<20} {train:>6} {heldout:>8}  {lost}")
    return lines
