"""Names of lm-evaluation-harness's published tasks, looked up in the files that it ships. No torch for a right name."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.base import Fault
from stages.runtime.suites.names import near_ones

FIELD = "suites.harness.tasks"


def name_faults(names: Sequence[str]) -> list[Fault]:
    """Names that no task, group or tag of the installed harness has; nothing is said where it is not installed.

    Its index of thousands of files takes seconds, so it is read only for a name that no file or folder bears.
    """
    doubtful = [name for name in names if _file_names() and name not in _file_names()]
    if not doubtful:
        return []
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return unknown(doubtful, task_manager(published=True).all_tasks)


def unknown(names: Sequence[str], known: Sequence[str]) -> list[Fault]:
    """A fault for each of ``names`` that is not ``known``, with the nearest that are."""
    return [
        Fault(FIELD, f"must be tasks of the harness; got {name}; {near_ones(name, known) or 'see `lm-eval ls tasks`'}")
        for name in names
        if name not in known
    ]


@functools.cache
def task_manager(published: bool) -> Any:
    """The harness's tasks; the index of the published ones takes seconds, and our own need none of it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=published)


@functools.cache
def _file_names() -> frozenset[str]:
    """Folders and files of tasks by name; most tasks and groups are called like theirs."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        return frozenset()
    names: set[str] = set()
    for _, _, files in os.walk(Path(found.origin).parent / "tasks"):
        names.update(name.removesuffix(".yaml").removeprefix("_") for name in files if name.endswith(".yaml"))
    return frozenset(names)
