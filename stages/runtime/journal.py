"""``metrics.jsonl``: the flushed truth about a stage, one JSON object a line, written by rank 0 alone (TRAPS O5).

A row is ``{"event": str, "step": int, "time": ISO-8601 UTC, **values}``. JSON has no NaN and no infinities: such a
value stands as ``null`` and its spelling under ``"nonfinite"`` (``{"loss": null, "nonfinite": {"loss": "nan"}}``), so
that any JSON reader takes the file and ``read_metrics`` gives the very float back.

A row is one ``write`` to the operating system, so a killed process loses none; it reaches the disk at the latest
``FSYNC_EVERY_S`` later, with the next row, or at once by ``sync``, which a checkpoint calls before it is sealed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
FSYNC_EVERY_S = 5.0
RESUME = "resume"
ALERT = "alert"
HISTORY = frozenset({RESUME, ALERT})
"""Events that tell what happened to the run, not what it measured: never superseded."""
RESERVED = frozenset({"event", "step", "time", "nonfinite"})
"""Names of a row's own fields, which no value may take."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the file: ``number`` counts from 1; ``values`` holds ``event``, ``step``, ``time`` and the values."""

    number: int
    values: dict[str, Any]


class Journal:
    """Appends rows to ``directory/metrics.jsonl``; ``rows`` is the number of lines in it.

    A last line torn by a kill or a power cut is cut off on opening; ``repaired`` says so in words, else it is empty.
    Raises ``OSError`` when a row cannot be written, after taking the torn part back.
    """

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.repaired = repair(self.path)
        self.rows = count_lines(self.path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._fsynced_at = time.monotonic()

    def append(self, event: str, step: int, values: Mapping[str, Any]) -> int:
        """Write one row and return its line number."""
        line = (encode(event, step, values) + "\n").encode()
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(f"{self.path}: the disk took only a part of a row")
        except OSError:
            os.ftruncate(self._file, end)
            raise
        self.rows += 1
        if time.monotonic() - self._fsynced_at >= FSYNC_EVERY_S:
            self.sync()
        return self.rows

    def sync(self) -> None:
        """Force every row onto the disk."""
        os.fsync(self._file)
        self._fsynced_at = time.monotonic()

    def close(self) -> None:
        """Sync and close; a second call does nothing."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1


def encode(event: str, step: int, values: Mapping[str, Any]) -> str:
    """One row as a line of strict JSON, without the newline."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    row: dict[str, Any] = {"event": event, "step": int(step), "time": now}
    nonfinite = {}
    for name, value in values.items():
        if name in RESERVED:
            raise ValueError(f"metric {name!r} of event {event!r} must not be one of {sorted(RESERVED)}; rename it")
        scalar: float | int | str | None = as_scalar(name, value)
        if isinstance(scalar, float) and not math.isfinite(scalar):
            nonfinite[name] = str(scalar)
            scalar = None
        row[name] = scalar
    if nonfinite:
        row["nonfinite"] = nonfinite
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def as_scalar(name: str, value: Any) -> float | int | str:
    """``value`` as a plain Python scalar; anything with ``item()`` (a 0-d tensor, a NumPy number) is unwrapped."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float | int | str):
        return value
    raise ValueError(f"metric {name!r} must be a number or a string; got {type(value).__name__}; log one scalar a name")


def repair(path: Path) -> str:
    """Cut a torn end off the file, and say what was cut; an empty string when the file is whole or absent.

    Torn is a last line without its newline, and before it lines that are no JSON object (blocks that a power cut left
    empty). Damage further up is not repaired: ``read_rows`` names it.
    """
    if not path.exists():
        return ""
    content = path.read_bytes()
    lines = content.split(b"\n")
    keep = len(content) - len(lines.pop())
    while lines and parsed(lines[-1]) is None:
        keep -= len(lines.pop()) + 1
    if keep == len(content):
        return ""
    with path.open("r+b") as file:
        file.truncate(keep)
        os.fsync(file.fileno())
    return f"{path.name}: cut off {len(content) - keep} bytes of a torn end after line {len(lines)}"


def parsed(line: bytes) -> dict[str, Any] | None:
    """The row in a line, its non-finite values restored; none where the line is not a row."""
    try:
        row = json.loads(line)
        if not (isinstance(row["event"], str) and isinstance(row["step"], int)):
            return None
        for name, spelling in row.pop("nonfinite", {}).items():
            row[name] = float(spelling)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(row)


def broken_lines(directory: Path) -> list[int]:
    """Numbers of the lines that are no row though rows follow; what a kill leaves at the end is not among them."""
    path = Path(directory) / METRICS_FILE
    found: list[int] = []
    doubtful: list[int] = []
    if not path.is_file():
        return []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if parsed(line) is None:
                doubtful.append(number)
            elif doubtful:
                found += doubtful
                doubtful = []
    return found


def count_lines(path: Path) -> int:
    """Number of lines in the file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_rows(directory: Path) -> Iterator[Row]:
    """Every row as it was written, lost futures included; a torn last line is passed over.

    Raises ``ValueError`` naming the line when anything but the last line is damaged.
    """
    path = Path(directory) / METRICS_FILE
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    lines.pop()
    for number, line in enumerate(lines, start=1):
        row = parsed(line)
        if row is not None:
            yield Row(number, row)
        elif number < len(lines):
            raise ValueError(f"{path}: line {number} must be a JSON row; got {line[:40]!r}; restore the file or cut it")


def current_rows(directory: Path) -> list[Row]:
    """The rows that still hold, in the order of the file.

    A ``resume`` row at step s says that the run went on from the state after step s: what was measured at later steps
    before it belongs to a lost future and is left out. Of several rows of one event and step the last holds. Rows of
    ``HISTORY`` all stay.
    """
    history: list[Row] = []
    current: dict[tuple[str, int], Row] = {}
    for row in read_rows(directory):
        event, step = row.values["event"], row.values["step"]
        if event == RESUME:
            current = {place: kept for place, kept in current.items() if place[1] <= step}
        if event in HISTORY:
            history.append(row)
        else:
            current[event, step] = row
    return sorted([*history, *current.values()], key=lambda row: row.number)


def read_metrics(directory: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The rows that still hold (see ``current_rows``) as dictionaries, of one ``event`` or of all."""
    rows = [row.values for row in current_rows(directory)]
    return [row for row in rows if event is None or row["event"] == event]
