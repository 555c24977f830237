"""Ranks of one machine watch each other's processes, so that one that is killed ends the run while it can be told.

A rank that waits in NCCL for one that is gone sleeps in the driver: no exception comes, no signal handler runs, and the
launcher's SIGKILL half a minute later would leave ``stage.json`` at "running" for ever. A thread sees it instead.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

POLL_S = 0.5
GRACE_S = 10.0
"""How long the main thread may take to fail by itself, which tells more; launchers kill after 30 s."""


class Peer(NamedTuple):
    """A rank's process: ``born`` tells it from a later one of the same number (proc(5), starttime)."""

    rank: int
    host: str
    pid: int
    born: str


class _Watch:
    """The ranks that are seen from here, the thread that looks at them, and what it does."""

    def __init__(self) -> None:
        self.peers: Sequence[Peer] = ()
        self.on_loss: Callable[[list[Peer]], None] | None = None
        self.stopped = threading.Event()

    def gone(self) -> list[Peer]:
        return [peer for peer in self.peers if born(peer.pid) != peer.born]

    def look(self) -> None:
        while not self.stopped.wait(POLL_S):
            gone = self.gone()
            if gone and not self.stopped.wait(GRACE_S) and self.on_loss is not None:
                self.on_loss(gone)
            if gone:
                return


_watch = _Watch()


def me(rank: int) -> Peer:
    """This process, as others are to look for it."""
    return Peer(rank, socket.gethostname(), os.getpid(), born(os.getpid()))


def begin(everyone: Sequence[Peer]) -> None:
    """Watch those of ``everyone`` that run on this machine and are visible from here, until ``end``."""
    end()
    _watch.stopped = threading.Event()
    here = [peer for peer in everyone if peer.pid != os.getpid() and peer.host == socket.gethostname()]
    _watch.peers = [peer for peer in here if peer.born and born(peer.pid) == peer.born]
    if _watch.peers:
        threading.Thread(target=_watch.look, name="peers", daemon=True).start()


def end() -> None:
    """Stop watching: from now on the others may leave."""
    _watch.stopped.set()
    _watch.peers = ()


def gone() -> list[Peer]:
    """The ranks of this machine that have died while they were watched."""
    return _watch.gone()


def lowest_left(rank: int) -> bool:
    """Whether no rank below ``rank`` is left on this machine, as far as it is seen from here."""
    lost = {peer.rank for peer in gone()}
    return all(peer.rank > rank or peer.rank in lost for peer in _watch.peers)


@contextmanager
def on_loss(act: Callable[[list[Peer]], None]) -> Iterator[None]:
    """Inside, call ``act`` with the dead ranks, in another thread, when the main one has not ended soon after."""
    _watch.on_loss = act
    try:
        yield
    finally:
        _watch.on_loss = None


def named(lost: Sequence[Peer]) -> str:
    """``lost`` in words."""
    return " and ".join(f"rank {peer.rank} (process {peer.pid})" for peer in lost)


def born(pid: int) -> str:
    """When process ``pid`` began, in clock ticks; empty where there is none, or only its zombie."""
    try:
        # After the command's name, which may hold spaces and brackets: state is the first, starttime the twentieth.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
