"""Batches read ahead by a thread while the device computes, and the time that steps still wait for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_LOOK_S = 0.2


class _Ahead(NamedTuple):
    """One call answered ahead of time: the batch, or what reading it raised, and where the data stood after it."""

    call: tuple[int, int, int]
    batch: Any
    error: BaseException | None
    position: Any


class Prefetcher:
    """Calls ``batch(step, rows)`` ahead of the loop, which asks for the same rows of one step after another.

    The first step is read as it is asked for; from then on a thread reads the following steps' rows in the same order.
    A call out of that order ends the thread and is read at once. What reading raises is raised where it is due.

    Args:
        batch: from a step and a slice of its rows to a batch.
        steps: steps to read ahead; 0 reads nothing ahead and only measures.
        last_step: the run's number of steps; nothing beyond is read.
        position: where the data stand after the batch just read; kept with it, for checkpoints.
    """

    def __init__(
        self,
        batch: Callable[[int, slice], Any],
        *,
        steps: int,
        last_step: int,
        position: Callable[[], Any] = lambda: None,
    ) -> None:
        self._batch, self._steps, self._last_step, self._position = batch, steps, last_step, position
        self.waited_s = 0.0
        """Seconds that callers waited, all calls together."""
        self.position: Any = None
        """Where the data stood after the last batch handed out."""
        self._pattern: list[tuple[int, int]] = []
        self._first_step: int | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._ready: queue.Queue[_Ahead] = queue.Queue()

    def __call__(self, step: int, rows: slice) -> Any:
        """The batch of ``rows`` of ``step``."""
        started = time.monotonic()
        try:
            return self._next((step, rows.start, rows.stop))
        finally:
            self.waited_s += time.monotonic() - started

    def close(self) -> None:
        """End the thread; what it has read ahead is dropped."""
        if self._thread is not None:
            self._stopped.set()
            while self._thread.is_alive():
                # The thread may stand before a full queue.
                self._drain()
                self._thread.join(0.01)
            self._thread = None
            self._drain()

    def _next(self, call: tuple[int, int, int]) -> Any:
        ahead = self._awaited()
        if ahead is not None:
            if ahead.error is not None:
                raise ahead.error
            if ahead.call == call:
                self.position = ahead.position
                return ahead.batch
        if self._thread is not None:
            self.close()
            self._first_step, self._pattern = None, []
        return self._read_now(call)

    def _awaited(self) -> _Ahead | None:
        """The next call that was read ahead; None without a thread, or when it has come to the end of the run."""
        while self._thread is not None:
            try:
                return self._ready.get(timeout=_LOOK_S)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    return None
        return None

    def _read_now(self, call: tuple[int, int, int]) -> Any:
        step, first, last = call
        if self._first_step is not None and step == self._first_step + 1 and self._steps:
            self._start(step)
            return self._next(call)
        if step != self._first_step:
            self._first_step, self._pattern = step, []
        self._pattern.append((first, last))
        batch = self._batch(step, slice(first, last))
        self.position = self._position()
        return batch

    def _start(self, step: int) -> None:
        self._stopped = threading.Event()
        self._ready = queue.Queue(maxsize=self._steps * len(self._pattern))
        # A daemon, so that a run that fails elsewhere does not wait for data that nobody wants.
        self._thread = threading.Thread(target=self._work, args=(step, self._stopped, self._ready), daemon=True)
        self._thread.start()

    def _work(self, step: int, stopped: threading.Event, ready: queue.Queue[_Ahead]) -> None:
        while not stopped.is_set() and step < self._last_step:
            for first, last in self._pattern:
                if stopped.is_set():
                    return
                batch = error = position = None
                try:
                    batch, position = self._batch(step, slice(first, last)), self._position()
                except BaseException as failure:
                    error = failure
                ready.put(_Ahead((step, first, last), batch, error, position))
                if error is not None:
                    return
            step += 1

    def _drain(self) -> None:
        while not self._ready.empty():
            self._ready.get()
