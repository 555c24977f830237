"""Stands between ``--all`` and one launched command, so that no process outlives either of them (TRAPS O7).

Runs as a script in a session of its own: ``warden.py [--stop-file FILE] --grace-s S -- command ...``. The deepspeed
launcher leaves its ranks behind when it is killed, and may end with 0 when they were; this process adopts whatever the
command leaves behind (a child subreaper, prctl(2)), asks it to save, waits, and kills what is still there.

Its standard input is the line to its master: ``stop SIGINT`` asks the command to save and end, because the master got
that signal, ``kill`` ends it at once, and the end of the line (the master died, however) means ``stop SIGTERM``. A stop
is the file ``FILE`` where one is given, with the signal's name in it, else the signal.
Uses the standard library alone and starts in a moment.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

POLL_S = 0.1
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36


class Warden:
    """One command under watch; ``run`` returns its exit code when it and all its descendants are gone."""

    def __init__(self, command: list[str], stop_file: Path | None, grace_s: float) -> None:
        self._command = command
        self._stop_file = stop_file
        self._grace_s = grace_s
        self._deadline: float | None = None
        self._code: int | None = None
        self._killing = False
        self._line_open = True

    def run(self) -> int:
        """Start the command, watch it, and leave nothing behind."""
        for number in (*_SIGNALS, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)
        while True:
            self._reap()
            ended = self._code is not None
            overdue = self._killing or (self._deadline is not None and time.monotonic() > self._deadline)
            # A walk through /proc costs milliseconds that a run on few cores would miss: only when it matters.
            left = descendants(os.getpid()) if ended or overdue else []
            if self._code is not None and not left:
                return self._code
            if ended:
                self._stop()
            if overdue:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._listen()

    def _listen(self) -> None:
        if not self._line_open:
            time.sleep(POLL_S)
            return
        ready, _, _ = select.select([sys.stdin], [], [], POLL_S)
        if not ready:
            return
        words = os.read(sys.stdin.fileno(), 4096).decode().split()
        self._line_open = bool(words)
        self._killing = self._killing or "kill" in words
        self._stop(next((number for number in _SIGNALS if number.name in words), signal.SIGTERM))

    def _stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask the command to save and end; once."""
        if self._deadline is not None:
            return
        self._deadline = time.monotonic() + self._grace_s
        if self._stop_file is not None:
            with contextlib.suppress(OSError):
                _write_stop(self._stop_file, number.name)
        elif self._code is None:
            os.kill(self._child.pid, number)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._child.pid:
                    code = os.waitstatus_to_exitcode(status)
                    self._code = self._child.returncode = code if code >= 0 else 128 - code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop(signal.Signals(number) if number in _SIGNALS else signal.SIGTERM)


def _write_stop(file: Path, name: str) -> None:
    """The file appears with its content; its folder may not be there before the stage has begun."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f".{file.name}.{os.getpid()}")
    whole.write_text(name)
    whole.rename(file)


def descendants(root: int) -> list[int]:
    """Processes below ``root``, however deep and whatever their session; zombies left out."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # After the command's name, which may hold spaces and brackets: state, parent (proc(5)).
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _end_with_parent() -> None:
    """In the child, before exec: the warden's own death is a SIGTERM to the command."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is not None:
        prctl(option, int(value), 0, 0, 0)


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and watch over the command."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--stop-file", type=Path)
    parser.add_argument("--grace-s", type=float, required=True)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    return Warden(options.command, options.stop_file, options.grace_s).run()


if __name__ == "__main__":
    sys.exit(main())
