"""Rank 0's word to the other ranks of one launch, before any process group exists.

While rank 0 runs what a stage needs, the others wait here instead of in a collective that would time out. The word is a
small file in the stage's artifact directory; it counts only for processes of the same launch.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from stages.base import EXIT_FAILED
from stages.runtime.artifact import process_started
from stages.runtime.manifest import write_atomic

POLL_S = 0.2


class Gate:
    """Opens for all ranks together, or gives all the same exit code.

    On one host a launch is known by its launcher, the common parent, so a file that an earlier launch left is ignored
    and rank 0's death is noticed. Ranks on other hosts know the launch by the rendezvous address alone; there the
    launcher has to end them when rank 0 dies.
    """

    def __init__(self, directory: Path) -> None:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        self._path = directory / f".gate-{hashlib.sha256(address.encode()).hexdigest()[:8]}.json"
        self._parent = os.getppid()
        self._launcher = f"{self._parent}-{process_started(self._parent)}"

    def close(self) -> None:
        """Rank 0, first: others wait from here on, for as long as this process lives."""
        self._write(None)

    def open(self) -> None:
        """Rank 0: let the others go on to the stage."""
        self._write("go")

    def finish(self, code: int) -> None:
        """Rank 0, last: others that still wait end with this code; those that were let through do not look again."""
        self._write(code)

    def wait(self) -> int | None:
        """Any other rank: None when the stage is to be run, else the exit code. Waits as long as rank 0 lives."""
        while True:
            word = self._read()
            if word is not None and word["verdict"] == "go":
                return None
            if word is not None and word["verdict"] is not None:
                return int(word["verdict"])
            if word is not None and self._is_dead(word):
                print("rank 0 died while it prepared the stage; see its last lines above", file=sys.stderr)
                return EXIT_FAILED
            if os.getppid() != self._parent:
                print("the launcher died while rank 0 prepared the stage", file=sys.stderr)
                return EXIT_FAILED
            time.sleep(POLL_S)

    def _write(self, verdict: int | str | None) -> None:
        word = {
            "verdict": verdict,
            "host": socket.gethostname(),
            "launcher": self._launcher,
            "pid": os.getpid(),
            "pid_started": process_started(os.getpid()),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, json.dumps(word).encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            word: dict[str, Any] = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return None
        same_host = word["host"] == socket.gethostname()
        return None if same_host and word["launcher"] != self._launcher else word

    def _is_dead(self, word: dict[str, Any]) -> bool:
        if word["host"] != socket.gethostname() or process_started(word["pid"]) == word["pid_started"]:
            return False
        # It may have spoken between our look at the file and our look at the process.
        last = self._read()
        return last is not None and last["verdict"] is None
