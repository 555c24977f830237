"""A stream read by processes beside the one that trains, each with lanes of its own: the same rows, the same places.

Lanes know nothing of each other (``data.stream``), so that whoever reads one reads the same rows. A process reads its
lanes a few steps ahead and sends each step's rows with the places that follow them; only the places of rows that were
handed out are told, so that nothing read ahead is lost or read twice by a resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.fetch import FetchError
from data.loader import Batch, check_rows, make_batch
from data.stream import StreamLoader

_IMPORTED_ONCE = ["data.stream", "datasets", "transformers.models.auto.tokenization_auto"]
"""What every process needs and takes seconds to import."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """One step of one process's lanes, or what ended its reading."""

    step: int
    rows: dict[int, np.ndarray]
    """Of each lane its rows of the step (rows a lane, T)."""
    position: dict[str, Any]
    report: dict[str, dict[str, int]]
    said: list[str]
    error: tuple[str, Any] | None = None


class ParallelStream(StreamLoader):
    """A ``StreamLoader`` whose lanes are read by ``workers`` processes; it must be closed.

    Args:
        tokens_dir: output folder of the ``stream`` stage.
        lanes: those that are read here, all of them in every step.
        workers: processes; no more than there are lanes.
        steps_ahead: steps that each reads ahead.
        say: receives what the processes say, with the step that it belongs to.
        arguments: those of ``StreamLoader``.
    """

    def __init__(
        self,
        tokens_dir: Path | str,
        *,
        lanes: Sequence[int],
        workers: int,
        steps_ahead: int,
        say: Callable[[str], None] = lambda line: None,
        **arguments: Any,
    ) -> None:
        super().__init__(tokens_dir, say=say, **arguments)
        self._job, self._ahead = (tokens_dir, arguments), max(1, steps_ahead)
        self._shares = [list(lanes[number::workers]) for number in range(min(workers, len(lanes)))]
        self._processes: list[tuple[Any, Connection]] = []
        self._parts: list[_Part] = []
        self._next_step = 0
        self._given: dict[int, int] = {}
        self._places: dict[str, Any] = {}
        self._end: Callable[[], Any] = lambda: None

    def batch(self, step: int, rows: slice) -> Batch:
        """As ``StreamLoader.batch``, in the order of the rows, of the lanes that are read here.

        Raises:
            RuntimeError: if a process ended, or failed by no fault of the user's.
        """
        first, last = check_rows(step, rows, self.global_batch_size)
        if not self._processes:
            self._start(step)
        found = []
        for number in range(first, last):
            lane, turn = divmod(number, self._rows_a_lane)
            if not self._parts or self._parts[0].step != step:
                self._collect(step)
            if self._given.get(lane) != turn:
                raise ValueError(
                    f"rows must be read in order, and be of lanes read here; got step {step}, row {number}"
                )
            part = next(part for part in self._parts if lane in part.rows)
            found.append(part.rows[lane][turn])
            self._given[lane] += 1
            if self._given[lane] == self._rows_a_lane:
                self._places[str(lane)] = part.position[str(lane)]
        return make_batch(np.stack(found).astype(np.int64), self.info.eos_id, None)

    def position(self) -> dict[str, Any]:
        """Where every lane stands of which whole steps were handed out here; plain JSON data."""
        return dict(self._places) if self._places else dict(self._restored)

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go on from the positions of all lanes, whoever read them."""
        self.close()
        super().restore(position)
        self._parts, self._places, self._given = [], {}, {}

    def report(self) -> dict[str, dict[str, int]]:
        """As ``StreamLoader.report``, up to the last step of which rows were handed out."""
        found: dict[str, Counter[str]] = {name: Counter() for name in self._names}
        for part in self._parts:
            for name, counts in part.report.items():
                found[name].update(counts)
        return {name: dict(counts) for name, counts in found.items()}

    def close(self) -> None:
        """End the processes; what they have read ahead is dropped."""
        self._end()
        self._processes = []

    def _start(self, step: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED_ONCE)
        for lanes in self._shares:
            ours, theirs = context.Pipe()
            task = (theirs, self._job, lanes, self._restored, step, self._ahead)
            process = context.Process(target=_serve, args=task, daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))
        # Before the daemons are asked to end, which they do not hear, and when this object goes.
        self._end = util.Finalize(self, _end_all, args=(list(self._processes),), exitpriority=10)
        self._next_step = step

    def _collect(self, step: int) -> None:
        """Take over the next step of every process."""
        open_lanes = [lane for lane, given in self._given.items() if given < self._rows_a_lane]
        if step != self._next_step or open_lanes:
            raise ValueError(f"rows must be read in order: step {self._next_step} comes next; got step {step}")
        parts = [_received(process, connection) for process, connection in self._processes]
        for part in parts:
            for line in part.said:
                self._say(line)
        for part in parts:
            _raise(part.error)
        self._parts, self._next_step = parts, step + 1
        self._given = {lane: 0 for part in parts for lane in part.rows}


def _received(process: Any, connection: Connection) -> _Part:
    try:
        part: _Part = connection.recv()
    except (EOFError, ConnectionError) as error:
        process.join(1)
        message = f"a process that reads the stream ended with {process.exitcode}: out of memory, or killed"
        raise RuntimeError(f"{message}; start again, with fewer data_workers or shuffle_documents") from error
    return part


def _raise(error: tuple[str, Any] | None) -> None:
    if error is not None:
        kind, said = error
        raise {"data": DataError, "fetch": FetchError}.get(kind, RuntimeError)(said)


def _told(error: BaseException) -> tuple[str, Any]:
    """What of ``error`` crosses to another process."""
    if isinstance(error, DataError):
        return "data", error.faults
    if isinstance(error, FetchError):
        return "fetch", str(error)
    return "other", "".join(traceback.format_exception(error))


def _end_all(processes: Sequence[tuple[Any, Connection]]) -> None:
    for process, connection in processes:
        connection.close()
        process.kill()
    for process, _ in processes:
        process.join()


def _serve(
    connection: Connection,
    job: tuple[Path | str, dict[str, Any]],
    lanes: Sequence[int],
    position: Mapping[str, Any],
    step: int,
    ahead: int,
) -> None:
    """Send the parts of ``lanes`` from ``step`` on, until nobody takes them."""
    # A request to stop is the training's to answer: it may want the rows of the step that it is at.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    parts: queue.Queue[_Part] = queue.Queue(ahead)
    threading.Thread(target=_read, args=(job, lanes, position, step, parts), daemon=True).start()
    with contextlib.suppress(ConnectionError, EOFError):
        while True:
            part = parts.get()
            connection.send(part)
            if part.error is not None:
                return


def _read(
    job: tuple[Path | str, dict[str, Any]],
    lanes: Sequence[int],
    position: Mapping[str, Any],
    step: int,
    parts: queue.Queue[_Part],
) -> None:
    said: list[str] = []
    try:
        loader = StreamLoader(job[0], say=said.append, **job[1])
        loader.restore(position)
        while True:
            rows = {lane: loader.lane_ids(step, lane) for lane in lanes}
            heard, said[:] = list(said), []
            parts.put(_Part(step, rows, loader.position(), loader.report(), heard))
            step += 1
    except BaseException as error:
        parts.put(_Part(step, {}, {}, {}, list(said), _told(error)))


def _die_with_parent() -> None:
    """A killed parent takes no part any more, and closes nothing that is waited for."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a process of its own"
    with contextlib.suppress(OSError):
        wait_for([parent.sentinel])
    os._exit(1)
