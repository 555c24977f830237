"""Requests to stop that reach ``--all``: acknowledged at once, and passed on by their own name."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from stages.runtime.signals import SIGNALS, acknowledgement, say_in_handler


class Interrupts:
    """SIGTERM, SIGUSR1 and SIGINT ask the running stage to save and end; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.requested = ""
        """Name of the first signal; empty while there was none."""
        self.killing = False
        """Whether a second SIGINT came."""
        self._line: int | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside."""
        old = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def passed_to(self, line: int) -> Iterator[None]:
        """Pass requests on by the file descriptor ``line``, one that came before included."""
        self._line = line
        if self.requested:
            self._say(f"stop {self.requested}\n")
        try:
            yield
        finally:
            self._line = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.requested:
            self.requested = name
            say_in_handler(acknowledgement(name, "the running stage saves and ends"))
            self._say(f"stop {name}\n")
        elif number == signal.SIGINT and not self.killing:
            self.killing = True
            say_in_handler("interrupted again: ending at once, without a save")
            self._say("kill\n")

    def _say(self, words: str) -> None:
        if self._line is not None:
            with suppress(OSError):
                os.write(self._line, words.encode())
