"""What stages that keep text clean of evaluation sets have in common: the sets' inputs, their files, and the index."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.clean_config import EVALUATION_SETS, DecontaminateConfig, revision
from data.errors import DataError
from stages.base import ConfigError, Fault, Input, StageContext

if TYPE_CHECKING:
    from data.clean_decontaminate import ContaminationIndex

SET_INPUTS = {name: Input(name, optional=True) for name in EVALUATION_SETS}
"""The sets as inputs of a stage, each by what it produces."""


def absent_files(config: DecontaminateConfig) -> list[Fault]:
    """A fault for each benchmark that is not there."""
    return [absent(f"decontaminate.files.{i}.path", file.path) for i, file in enumerate(config.files)
            if not Path(file.path).is_file()]  # fmt: skip


def file_faults(config: DecontaminateConfig) -> list[Fault]:
    """``absent_files``, and benchmarks whose first row is none or lacks a field."""
    from data.clean_decontaminate import file_items

    faults = absent_files(config)
    for i, file in enumerate(config.files):
        if Path(file.path).is_file():
            faults += first_fault(file_items(file, f"decontaminate.files.{i}"))
    return faults


def first_fault(rows: Iterable[Any]) -> list[Fault]:
    """What is wrong with the first of ``rows``, which says so by a ``DataError``."""
    try:
        next(iter(rows), None)
    except DataError as error:
        return [Fault(field, message) for field, message in error.faults]
    return []


def absent(field: str, path: str) -> Fault:
    """The fault of a file that is not there."""
    return Fault(field, f"must be an existing file; got {path}; set it to where the file lies")


def file_revisions(config: DecontaminateConfig) -> dict[str, str]:
    """Digests of the benchmarks' files; a name with a colon is none that a source may have.

    Raises:
        ConfigError: for files that are not there.
    """
    if faults := absent_files(config):
        raise ConfigError(faults)
    return {f"decontaminate:{file.name}": revision(file.path) for file in config.files}


def open_index(context: StageContext) -> ContaminationIndex:
    """The index of the sets that the stage's config names; a ``DataError`` for a file that holds no rows."""
    from data.clean_decontaminate import build_index, evaluation_sets

    config: DecontaminateConfig = context.config.decontaminate
    parents = {field: context.parent_output(field) for field in EVALUATION_SETS if field in context.parents}
    return build_index(config, evaluation_sets(parents, config.files))


def set_line(name: str, facts: dict[str, Any], removed: str) -> str:
    """One set for a person; ``removed`` says what became of documents that hold an item of it."""
    return f"{name}: {facts['items']} items, {facts['unchecked_items']} too short to look for; {removed}"
