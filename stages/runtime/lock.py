"""One run an artifact at a time: an advisory lock that dies with its process, and says who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stages.runtime.artifact import now, shown

LOCK = ".lock"


class ArtifactBusyError(RuntimeError):
    """Another process is working on the same artifact."""


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold the artifact's lock; the kernel releases it when this process ends, however it ends.

    Raises:
        ArtifactBusyError: at once when another run holds it, naming process, host and since when.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Never unlinked: a file deleted under a waiting opener would let two runs hold two different locks.
    with open(directory / LOCK, "a+", encoding="utf-8") as file:
        if not _taken(file):
            raise ArtifactBusyError(_busy(directory, file))
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now()}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def busy(directory: Path) -> str | None:
    """Why ``hold`` would refuse now, or None; nothing is held, and nothing made."""
    try:
        with open(directory / LOCK, "r+", encoding="utf-8") as file:
            return None if _taken(file) else _busy(directory, file)
    except OSError:
        return None


def _busy(directory: Path, file: IO[str]) -> str:
    file.seek(0)
    return f"{shown(directory)} is being worked on by {_holder(file.read())}; wait for it, or stop it"


def _taken(file: IO[str]) -> bool:
    # A killed run's children, which inherited the lock, may take a moment to go.
    for wait_s in (0.1, 0.3, 0.6, 0.0):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(wait_s)
    return False


def _holder(text: str) -> str:
    try:
        who = json.loads(text)
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
