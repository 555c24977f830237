"""Files of questions for the harness: looked at when a recipe is read, read whole before anything is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.questions import read_questions
from stages.base import Fault
from stages.runtime.suites.config import HarnessConfig, LocalTaskBase

FIRST_ROWS = 100
"""Rows of one's own file that are looked at whenever a recipe is read."""


def task_questions(task: LocalTaskBase, path: Path, first: int | None = None) -> list[dict[str, Any]]:
    """The rows of a task's file, or the ``first`` of them.

    Raises:
        DataError: for a file that holds no questions.
    """
    return read_questions(
        path, kind=task.kind, question=task.question, choices=task.choices, answer=task.answer,
        id_field=task.id_field, first=first,
    )  # fmt: skip


def first_rows_faults(config: HarnessConfig) -> Iterator[Fault]:
    """Files that are not there, or whose first rows are no questions; a package's are not fetched for that."""
    for number, task in enumerate(config.files):
        if task.type != "file":
            continue
        if not Path(task.path).is_file():
            message = f"must be a file; got {task.path}, which is none; set its path"
            yield Fault(f"suites.harness.files[{number}].path", message)
        else:
            yield from _faults(number, task, Path(task.path), FIRST_ROWS)


def file_faults(config: HarnessConfig, paths: Mapping[str, Path]) -> Iterator[Fault]:
    """What is wrong with any row of the files, which lie at ``paths`` by the task's name."""
    for number, task in enumerate(config.files):
        yield from _faults(number, task, paths[task.name], None)


def _faults(number: int, task: LocalTaskBase, path: Path, first: int | None) -> Iterator[Fault]:
    try:
        task_questions(task, path, first)
    except DataError as error:
        for field, message in error.faults:
            yield Fault(f"suites.harness.files[{number}].{field}", message)
