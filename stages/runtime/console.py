"""The console of rank 0, copied to the artifact's ``log.txt``."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from stages.runtime.scrub import environment_secrets, scrub_text

ROOMS = ("pipelines", "stages", "model", "data")


class _Tee:
    """A text stream that also writes to a file, and outlives it: libraries keep the stream they saw first.

    Neither gets to see a secret of the environment (TRAPS O6).
    """

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream = stream
        self._file = file
        self._secrets = environment_secrets()

    def write(self, text: str) -> int:
        said = scrub_text(text, self._secrets)
        if not self._file.closed:
            # A full disk must not kill the run through its console; stage.json and metrics.jsonl report it.
            with contextlib.suppress(OSError):
                self._file.write(said)
                self._file.flush()
        with outliving(self._stream):
            self._stream.write(said)
        return len(text)

    def flush(self) -> None:
        with outliving(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Unheard:
    """A text stream whose reader may go (``| head``, a pager): what is being run goes on without it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``, or nothing where nobody reads any more."""
        with outliving(self._stream):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush likewise."""
        with outliving(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outliving(stream: TextIO) -> Iterator[None]:
    """When the reader of ``stream`` is gone, everything that is written to it from then on goes nowhere."""
    try:
        yield
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def without_readers() -> Iterator[None]:
    """Inside, standard output and error may lose their readers."""
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unheard(old[0]), Unheard(old[1])
    try:
        yield
    finally:
        # Or the interpreter's end would find that nobody reads.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = old


@contextlib.contextmanager
def copied_to(path: Path) -> Iterator[TextIO]:
    """Append all that is printed or logged by our packages to ``path`` too; yields the file for what it alone gets."""
    old = sys.stdout, sys.stderr
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        sys.stdout, sys.stderr = _Tee(old[0], file), _Tee(old[1], file)
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        loggers = [logging.getLogger(room) for room in ROOMS]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            yield file
        finally:
            sys.stdout, sys.stderr = old
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)
