"""What a person is told while something takes minutes and says nothing by itself."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from stages.runtime.progress import duration

EVERY_S = 30.0


@contextlib.contextmanager
def patience(say: Callable[[str], None], what: str, done: str, every_s: float = EVERY_S) -> Iterator[None]:
    """Say ``what`` at once, a line every ``every_s`` seconds meanwhile, and ``done`` with the time that it took."""
    started, over = time.monotonic(), threading.Event()

    def beat() -> None:
        while not over.wait(every_s):
            say(f"  ... {duration(time.monotonic() - started)} so far")

    say(what)
    thread = threading.Thread(target=beat, name="patience", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    say(f"{done} after {duration(time.monotonic() - started)}")
