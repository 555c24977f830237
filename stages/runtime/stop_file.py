"""A file ``STOP`` that was left behind is no request to a run that began after it."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from stages.runtime.artifact import shown
from stages.runtime.distributed import STOP_FILE
from stages.runtime.progress import duration
from stages.runtime.signals import launcher_processes

_IMPORTED = time.monotonic()
_SLACK_S = 0.1
"""What the clocks may differ by; within it a file counts as written after the start: better one stop too many."""


def clear_old(name: str, directory: Path, started_s: float | None = None) -> str | None:
    """Remove a ``STOP`` in ``directory`` that is older than this start, and return the line that says so.

    None where there is none, or where it was written since: then it is a request to stop this run, and stays. The start
    is that of the launcher's first process, ``started_s`` seconds ago where it is given. For the one process that holds
    the artifact's lock; whoever writes the file meanwhile is heard, since it is set aside before its age is asked for.
    """
    file, aside = directory / STOP_FILE, directory / f".{STOP_FILE}.{os.getpid()}"
    try:
        file.rename(aside)
    except OSError:
        return None
    before_start = _age_s(aside) - (started_ago_s() if started_s is None else started_s)
    if before_start <= _SLACK_S:
        # One that came in between says the same.
        aside.replace(file)
        return None
    aside.unlink()
    return (
        f"{name}: removed the file {STOP_FILE} that an earlier run left behind {duration(before_start)} before this "
        f"start; to stop this run: touch {shown(file)}"
    )


def started_ago_s() -> float:
    """Seconds since this process began, or the launcher that it belongs to."""
    launched = launcher_processes() if "MASTER_ADDR" in os.environ else []
    return max([time.monotonic() - _IMPORTED, *(_process_age_s(process) for process in (os.getpid(), *launched))])


def _age_s(file: Path) -> float:
    """By the clock of the file system, which may be another machine's."""
    with tempfile.TemporaryFile(dir=file.parent) as probe:
        probe.write(b".")
        probe.flush()
        return os.fstat(probe.fileno()).st_mtime - file.stat().st_mtime


def _process_age_s(process: int) -> float:
    """From Linux's /proc (proc(5): field 22, in clock ticks since the machine began); 0 where there is none."""
    try:
        ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
