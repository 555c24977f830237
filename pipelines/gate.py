"""Rank 0's word to the other ranks of one launch, before any process group exists.

While rank 0 runs what a stage needs, the others wait here instead of in a collective that would time out. The word is a
small file for each of them in the stage's artifact directory; its name belongs to one launch, so that no other launch
reads it, and who has read it takes it away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.base import EXIT_FAILED, ConfigError, Fault
from stages.runtime import distributed
from stages.runtime.artifact import process_started
from stages.runtime.manifest import write_atomic

POLL_S = 0.2
STALE_S = 60.0
"""Age from which a file whose writer is gone is waited for by nobody: a waiting rank looks every ``POLL_S``."""

_HOST_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # torchrun, deepspeed, Open MPI
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
_NO_NUMBER = (
    "ranks on several hosts must share a launch's number, or one launch could take an earlier one's word for its own; "
    "got none; start with srun, or with torchrun --rdzv_id set to a new value for each launch"
)


class Gate:
    """Opens for all ranks together, or gives all the same exit code.

    Raises:
        ConfigError: when the ranks are on several hosts and nothing in the environment tells this launch from others.
    """

    def __init__(self, directory: Path) -> None:
        launch = launch_identity(os.environ)
        self._prefix = f".gate-{hashlib.sha256(launch.encode()).hexdigest()[:16]}"
        self._directory = directory
        self._opened = False

    def close(self) -> None:
        """Rank 0, first: others wait from here on, for as long as this process lives."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        for rank in self._others():
            self._write(rank, None)

    def open(self) -> None:
        """Rank 0: let the others go on to the stage."""
        for rank in self._others():
            self._write(rank, "go")
        self._opened = True

    def finish(self, code: int) -> None:
        """Rank 0, last: others that still wait end with this code; those that were let through do not look again."""
        for rank in self._others():
            if not self._opened or self._path(rank).exists():
                self._write(rank, code)

    def wait(self) -> int | None:
        """Any other rank: None when the stage is to be run, else the exit code. Waits as long as rank 0 lives.

        A request to stop does not end the wait: rank 0 gets it too, or the stage honours it on all ranks together.
        """
        path = self._path(distributed.rank())
        while True:
            orphaned = distributed.launcher_died()
            word = _read(path)
            if word is None or word["verdict"] is None:
                reason = _why_hopeless(path, word, orphaned)
                if reason is None:
                    time.sleep(POLL_S)
                    continue
                print(reason, file=sys.stderr)
            path.unlink(missing_ok=True)
            verdict = EXIT_FAILED if word is None or word["verdict"] is None else word["verdict"]
            return None if verdict == "go" else int(verdict)

    def _others(self) -> range:
        return range(1, distributed.world_size())

    def _path(self, rank: int) -> Path:
        return self._directory / f"{self._prefix}-{rank}.json"

    def _write(self, rank: int, verdict: int | str | None) -> None:
        pid = os.getpid()
        word = {"verdict": verdict, "host": socket.gethostname(), "pid": pid, "pid_started": process_started(pid)}
        write_atomic(self._path(rank), json.dumps(word).encode())

    def _sweep(self) -> None:
        """Take away what killed ranks of earlier launches left; a word of unknown fate on another host stays."""
        for path in self._directory.glob(".gate-*.json"):
            with contextlib.suppress(OSError):
                word = _read(path)
                over = word is None or word["verdict"] is not None or _writer_died(word)
                if over and time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()


def launch_identity(environment: Mapping[str, str]) -> str:
    """What the ranks of one launch have in common and no other launch has.

    On one host that is the launcher, their common parent: its process id and start time. Hosts share a scheduler's
    numbers at most: the SLURM step's, or the run id that torchrun was given.

    Raises:
        ConfigError: for several hosts without such numbers.
    """
    # torchrun starts ranks anew from one launcher: each time is a launch of its own.
    common = [environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    shared = _scheduler_numbers(environment)
    on_this_host = next((int(environment[name]) for name in _HOST_SIZES if name in environment), None)
    if on_this_host is None:
        # Ranks are counted host by host, so on the first host alone both numbers agree.
        several = bool(shared) or distributed.rank() != distributed.local_rank()
    else:
        several = on_this_host < distributed.world_size()
    if several and not shared:
        if on_this_host is None:
            # Rank 0, which alone prints faults, cannot tell here that there are other hosts.
            print(f"rank {distributed.rank()}: {_NO_NUMBER}", file=sys.stderr)
        raise ConfigError(Fault("--stage", _NO_NUMBER))
    parent = os.getppid()
    launcher = [] if several else [socket.gethostname(), str(parent), str(process_started(parent))]
    return "|".join([*common, *shared, *launcher])


def _scheduler_numbers(environment: Mapping[str, str]) -> list[str]:
    """The numbers of the launch that every host sees; empty when there are none that tell launches apart."""
    numbers: list[str] = []
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" in environment:
        numbers += [environment.get(name, "") for name in _SLURM_STEP]
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    # torchrun's default is the same for every launch.
    if run_id != "none":
        numbers.append(run_id)
    return numbers


def _read(path: Path) -> dict[str, Any] | None:
    try:
        word: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return word


def _writer_died(word: Mapping[str, Any]) -> bool:
    """Whether the rank 0 that wrote ``word`` is known to be gone; on another host nothing is known."""
    return word["host"] == socket.gethostname() and process_started(word["pid"]) != word["pid_started"]


def _why_hopeless(path: Path, word: Mapping[str, Any] | None, orphaned: bool) -> str | None:
    """Why no word will come after ``word``; None while one may."""
    here = word is not None and word["host"] == socket.gethostname()
    if word is not None and _writer_died(word):
        # It may have spoken between our look at the file and our look at the process.
        last = _read(path)
        spoke = last is not None and last["verdict"] is not None
        return None if spoke else "rank 0 died while it prepared the stage; see its last lines above"
    # On this host rank 0 loses the same launcher, and says what becomes of the stage.
    return "the launcher died while rank 0 prepared the stage" if orphaned and not here else None
