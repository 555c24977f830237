"""Signals that ask a run to stop: how they are answered, and the launcher that may send them or die."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What asks a run to save and end; a second SIGINT ends it at once."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def acknowledgement(name: str, then: str) -> str:
    """The line that answers the first signal, ``name``; ``then`` is what follows."""
    again = "; Ctrl-C again ends it at once" if name == "SIGINT" else ""
    return f"asked to stop by {name}: {then}{again}"


def say_in_handler(line: str) -> None:
    """Print from within a signal handler, which may have interrupted a write to this very stream."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (RuntimeError, ValueError):
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


def launcher_processes() -> list[int]:
    """Process ids above this one that belong to the launcher, nearest first.

    The parent always does. Above it the deepspeed launcher has one more, its runner, whose death leaves the parent and
    the ranks alive; what stands above other launchers is the user's shell, which may go.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        # After the command's name, which may hold spaces and brackets: state, parent (proc(5)).
        above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return [parent]
    return [parent, above] if b"deepspeed.launcher.launch" in command else [parent]


def signal_on_parent_death(number: int) -> None:
    """Ask the kernel for a signal when the parent dies (prctl(2)); only Linux knows how, others go by ``getppid``."""
    import ctypes

    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
