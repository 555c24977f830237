"""Lives of a process that ends by SIGKILL at a chosen moment, forked from one that has the heavy modules loaded.

No seam in the product: a forked child watches its own file operations through Python's audit events (PEP 578) and kills
itself before the n-th, or its parent kills it after a while.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED = -int(signal.SIGKILL)

_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def live(
    body: Callable[[], int | None],
    *,
    log: Path,
    kill_at_event: int | None = None,
    below: Path | None = None,
    count_to: Path | None = None,
    signal_when: Callable[[float], bool] | None = None,
    signal_number: int = signal.SIGKILL,
) -> int:
    """Run ``body`` in a forked child and return its exit code, ``KILLED`` when SIGKILL ended it.

    ``kill_at_event`` n kills before the n-th file operation below the folder ``below``; ``count_to`` receives how many
    such operations a whole life has. ``signal_when``, asked again and again with the seconds since the start, has
    ``signal_number`` sent once it is true. Output goes to ``log``.
    """
    child = os.fork()
    if child == 0:
        _be_the_child(body, log, kill_at_event, below, count_to)
    with contextlib.suppress(OSError):
        # As the child does: whoever comes first, the group exists before anything is killed.
        os.setpgid(child, child)
    if signal_when is not None:
        _signal_when(child, signal_when, signal_number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _wait_for_group(child)
    return code


def _wait_for_group(group: int) -> None:
    """Wait for the last of what ``child`` started: a helper that dies with it may hold files open a moment longer."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.002)
    raise TimeoutError(f"process group {group} did not end")


def _signal_when(child: int, when: Callable[[float], bool], number: int) -> None:
    """Signal ``child`` and all it started as soon as ``when`` says so, unless it ends before."""
    started = time.monotonic()
    while not when(time.monotonic() - started):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    os.killpg(child, number)


def _be_the_child(
    body: Callable[[], int | None], log: Path, kill_at_event: int | None, below: Path | None, count_to: Path | None
) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        counter = _Counter(below, kill_at_event) if below is not None else None
        code = body() or 0
        if counter is not None and count_to is not None:
            events = counter.count
            count_to.write_text(str(events))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: the parent's own exit handlers must not run in the child.
        os._exit(code)


class _Counter:
    """Counts file operations below a folder and kills this process before number ``kill_at``."""

    def __init__(self, below: Path, kill_at: int | None) -> None:
        self.count = 0
        self._below = os.path.abspath(below)
        self._kill_at = kill_at
        self._fsync = os.fsync
        os.fsync = self._counted_fsync  # type: ignore[assignment]
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and self._is_below(arguments):
            self._count()

    def _counted_fsync(self, descriptor: int) -> None:
        # fsync raises no audit event of its own.
        if self._is_below((os.readlink(f"/proc/self/fd/{descriptor}"),)):
            self._count()
        self._fsync(descriptor)

    def _is_below(self, arguments: tuple[Any, ...]) -> bool:
        paths = [os.fspath(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
        return any(os.path.abspath(os.fsdecode(path)).startswith(self._below) for path in paths)

    def _count(self) -> None:
        self.count += 1
        if self.count == self._kill_at:
            os.killpg(os.getpgid(0), signal.SIGKILL)
