"""What an exception means for an artifact: its state, the exit code, and the one line that a person needs."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

from data.corpus import CorpusError
from data.errors import DataError
from data.fetch import FetchError
from stages.base import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_SAVED, ConfigError, Fault, StopRequested
from stages.runtime.artifact import ArtifactError
from stages.runtime.audit import AuditError
from stages.runtime.manifest import CheckpointError
from stages.runtime.out_of_memory import OutOfMemory
from stages.runtime.scrub import environment_secrets, scrub_text

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended: ``lines`` for the console, ``error`` the one line for ``stage.json``.

    ``traceback`` is empty where it would say nothing; ``quiet`` sends it to the log alone.
    """

    state: str
    code: int
    lines: list[str]
    error: str | None
    traceback: str
    quiet: bool


DONE = Ending("done", EXIT_DONE, [], None, "", True)
"""The one good ending."""


def ending_of(error: BaseException, name: str, directory: Path) -> Ending:
    """The ending that ``error``, raised by stage ``name`` in ``directory``, amounts to; no secret is left in it.

    What the user gave is at fault in ``ConfigError`` and ``DataError`` alone: a plain ``ValueError`` may come from any
    library, and is a failure like others.
    """
    ending = _ending(error, name, directory)
    secrets = environment_secrets()
    return dataclasses.replace(
        ending,
        lines=[scrub_text(line, secrets) for line in ending.lines],
        error=None if ending.error is None else scrub_text(ending.error, secrets),
        traceback=scrub_text(ending.traceback, secrets),
    )


def is_refusal(error: BaseException) -> bool:
    """Whether what the user gave was refused."""
    return isinstance(error, ConfigError | DataError)


@contextlib.contextmanager
def faults_of(stage: str) -> Iterator[None]:
    """Give faults the dotted path that the user would write: the stage's name before the field's."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            [Fault(f"{stage}.{fault.path}".rstrip("."), fault.message, fault.line) for fault in error.faults]
        ) from error


def _ending(error: BaseException, name: str, directory: Path) -> Ending:
    if isinstance(error, StopRequested):
        reason = f" ({error})" if str(error) else ""
        line = f"{name}: saved{reason}; the same command goes on from here"
        return Ending("saved", EXIT_SAVED, [line], None, "", True)
    if isinstance(error, ConfigError):
        lines = [f"{_full_path(name, fault.path)}: {fault.message}" for fault in error.faults]
        return Ending("failed", EXIT_CONFIG, lines, "; ".join(lines), "", True)
    if isinstance(error, DataError):
        lines = [_one_line(f"{_full_path(name, field)}: {message}") for field, message in error.faults]
        return Ending("failed", EXIT_CONFIG, lines, "; ".join(lines), "", True)
    plain = _plain_text(error, directory)
    line = _one_line(plain if plain is not None else f"{type(error).__name__}: {error}")
    return Ending(
        state="failed",
        code=EXIT_FAILED,
        lines=[f"{name} failed: {line}"],
        error=line,
        traceback="".join(traceback.format_exception(error)),
        quiet=plain is not None,
    )


def _full_path(name: str, path: str) -> str:
    """A running stage may name its own fields; the user knows them with the stage's name before them."""
    own = path == name or path.startswith(f"{name}.")
    return path if own else f"{name}.{path}".rstrip(".")


_LOST_RANK = re.compile(r"gloo.*(Read error|Connection (closed|reset))|remote process exited", re.DOTALL)
"""What gloo and NCCL say on the other ranks when one dies."""


def _plain_text(error: BaseException, directory: Path) -> str | None:
    """A line for faults whose traceback helps nobody, or None."""
    if isinstance(error, AuditError | CheckpointError | ArtifactError | CorpusError | FetchError | OutOfMemory):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted from the keyboard; the same command goes on from the newest checkpoint"
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        free = shutil.disk_usage(directory).free
        return f"no space left on the disk of {directory} ({free} bytes free): {error}; make room and start again"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}; close other programs or give the stage less at a time, and start again"
    if type(error).__name__ == "DistNetworkError" and "EADDRINUSE" in str(error):
        port = os.environ.get("MASTER_PORT", "?")
        return f"the launcher's port {port} is taken by another run; give deepspeed a free one with --master_port"
    if isinstance(error, RuntimeError) and _LOST_RANK.search(str(error)):
        return "another rank is gone (its connection broke); what it said last tells why; the same command goes on"
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory: {error}; lower micro_batch_size (the result stays the same) or raise the ZeRO stage"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1000]
