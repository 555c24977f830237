"""Ranks, collectives and the request to stop.

Rank facts come from the launcher's environment, without torch. With one process no collective runs, so that data
stages, ``--status`` and tests need no process group. Control messages (flags, verdicts, sums of metrics) travel over
gloo on the host even on GPU machines: a step boundary then never waits for the device's queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

from stages.base import StopRequested
from stages.runtime import peers
from stages.runtime.signals import SIGNALS, acknowledgement, say_in_handler
from stages.runtime.signals import launcher_processes as _launcher_processes
from stages.runtime.signals import signal_on_parent_death as _signal_on_parent_death

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for the slowest rank; rank 0 may hash a large checkpoint meanwhile."""

STOP_FILE = "STOP"

_REASONS = ("", "SIGTERM", "SIGUSR1", "SIGINT", "a file STOP", "the launcher's death")

logger = logging.getLogger(__name__)
_control_groups: dict[str, Any] = {}


def _fact(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"environment variable {name} must be a number; got {text!r}; start through the launcher")
    return int(text)


def rank() -> int:
    """This process's number among all processes of the run, from ``RANK``; 0 without a launcher."""
    return _fact("RANK", 0)


def world_size() -> int:
    """Number of processes of the run, from ``WORLD_SIZE``; 1 without a launcher."""
    return _fact("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its own machine, from ``LOCAL_RANK``; 0 without a launcher."""
    return _fact("LOCAL_RANK", 0)


def settle_threads() -> None:
    """Share the machine's cores among the ranks, unless ``OMP_NUM_THREADS`` is set; before torch is imported.

    Idle threads sleep instead of spinning: on a shared machine spinning ones take the cores from those that work, which
    was seen to cost a factor of ten.
    """
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // world_size())))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def init_process_group(timeout: timedelta = TIMEOUT) -> None:
    """Start torch's and DeepSpeed's process group: nccl with a GPU, gloo without. A second call does nothing.

    A single process without a launcher gets a group of one that opens no port to the outside.
    """
    import deepspeed
    import torch

    if not _is_launched():
        # The engine reads it at each start, also of a second one in a process whose group stands already.
        os.environ.setdefault("LOCAL_RANK", "0")
    if torch.distributed.is_initialized():
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank())
    else:
        # Its just-in-time build costs the better part of a minute and gives nothing on this path.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if gpu else "gloo"
    # Without the device NCCL guesses it at the first barrier, which can hang where ranks and devices differ in order.
    bound: dict[str, Any] = {"device_id": torch.device("cuda", local_rank())} if gpu else {}
    if _is_launched():
        torch.distributed.init_process_group(backend, timeout=timeout, **bound)
    else:
        if world_size() > 1:
            raise ValueError(f"WORLD_SIZE is {world_size()} but MASTER_ADDR is not set; start through the launcher")
        # The in-memory store spares a rendezvous over TCP.
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout, **bound
        )
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    _control()
    peers.begin(all_gather(peers.me(rank())))


def close_process_group() -> None:
    """Leave the process group, if there is one: the interpreter ends without a complaint, and another can be made."""
    import torch

    peers.end()
    if torch.distributed.is_initialized():
        _control_groups.clear()
        torch.distributed.destroy_process_group()
        if "deepspeed" in sys.modules:
            # DeepSpeed keeps its own references to the groups that are gone, and would use them for a next engine.
            from deepspeed import comm
            from deepspeed.utils import groups

            comm.comm.cdb = None
            groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def _control() -> Any:
    """The group for host-side messages: the default group on gloo, a gloo sibling of it on nccl."""
    import torch

    assert torch.distributed.is_initialized(), "init_process_group() comes before any collective of several ranks"
    if torch.distributed.get_backend() == "gloo":
        return None
    if "gloo" not in _control_groups:
        _control_groups["gloo"] = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
    return _control_groups["gloo"]


def barrier() -> None:
    """Wait until every rank is here; nothing with one rank."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier(group=_control())


def all_reduce_sum(value: float) -> float:
    """The sum of ``value`` over all ranks, in float64, the same on every rank."""
    return _all_reduce(value, "SUM")


def _all_reduce(value: float, operation: str) -> float:
    if world_size() == 1:
        return float(value)
    import torch

    tensor = torch.tensor([value], dtype=torch.float64)
    torch.distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, operation), group=_control())
    return float(tensor.item())


def broadcast(value: T) -> T:
    """Rank 0's ``value`` on every rank; any object that pickles, and small ones preferably."""
    if world_size() == 1:
        return value
    import torch

    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=_control(), device=torch.device("cpu"))
    return box[0]


def all_gather(value: T) -> list[T]:
    """Every rank's ``value``, in order of rank, on every rank; any object that pickles."""
    if world_size() == 1:
        return [value]
    import torch

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value, group=_control())
    return found


def on_rank_zero(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 alone and give its result to all; an exception there is raised on every rank.

    For work on shared files that must be done once and whose failure must stop all ranks together.
    """
    result: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = function()
        except Exception as fault:
            error = fault
    if world_size() > 1:
        result, text = broadcast((result, None if error is None else (type(error), str(error))))
        if text is not None and error is None:
            raise rebuilt(0, *text)
    if error is not None:
        raise error
    return result


def rebuilt(source: int, kind: type[Exception], text: str) -> Exception:
    """The exception of rank ``source`` for another one. Only its text travels: some types take no plain message."""
    try:
        return kind(text)
    except TypeError:
        return RuntimeError(f"rank {source}: {kind.__name__}: {text}")


@dataclasses.dataclass
class _Early:
    """What became of this process before a ``StopWatch`` looks: one process, one launcher, one set of handlers."""

    ancestors: list[int] | None = None
    reason: int = 0


_early = _Early()


@contextlib.contextmanager
def note_launcher() -> Iterator[None]:
    """From the first moment on, remember who launched this process and whether it was asked to stop.

    A launcher can die long before training begins, while data stages run or the engine is built; whoever adopts its
    ranks must not be taken for it (TRAPS O7). Inside, SIGTERM, SIGUSR1 and a first SIGINT are acknowledged and set a
    flag, which ``stop_if_asked`` reads and a ``StopWatch`` takes over; what runs inside may set handlers of its own.
    Use from the main thread; from another one signals stay as they are.
    """
    in_main = threading.current_thread() is threading.main_thread()
    # Before the ancestors are read, so that a death in between is seen as a change or as a signal.
    old = {number: signal.signal(number, _on_early_signal) for number in SIGNALS} if in_main else {}
    _early.ancestors, _early.reason = _watched_ancestors(), 0
    try:
        yield
    finally:
        _early.ancestors, _early.reason = None, 0
        _restore(old)


def launcher_died() -> bool:
    """Whether a process above this one is gone since ``note_launcher``, or was already; never without a launcher."""
    return _was_orphaned() or _is_gone(_early.ancestors)


def stop_if_asked(directory: Path | None = None) -> None:
    """Raise ``StopRequested`` when this rank was asked to stop, or lost its launcher, since ``note_launcher``.

    A file ``STOP`` in the artifact's ``directory`` asks too, and is taken away.
    """
    if not _early.reason and launcher_died():
        _early.reason = _REASONS.index("the launcher's death")
    if not _early.reason and directory is not None and (directory / STOP_FILE).exists():
        _early.reason = _reason_in(directory / STOP_FILE)
        (directory / STOP_FILE).unlink(missing_ok=True)
    if _early.reason:
        raise StopRequested(_REASONS[_early.reason])


def _on_early_signal(number: int, frame: FrameType | None) -> None:
    if not _early.reason:
        _early.reason = _heard(number, "ending before the stage begins")
    elif number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _heard(number: int, then: str) -> int:
    """Acknowledge a first signal at once, on rank 0 alone; its place among the reasons."""
    name = signal.Signals(number).name
    if rank() == 0:
        say_in_handler(acknowledgement(name, then))
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return _REASONS.index(name)


def _reason_in(file: Path) -> int:
    """What asked by ``file``: ``--all`` writes the name of the signal that it got, a person writes nothing."""
    try:
        text = file.read_text().strip()
    except OSError:
        text = ""
    names = [number.name for number in SIGNALS]
    return _REASONS.index(text if text in names else "a file STOP")


def _watched_ancestors() -> list[int]:
    """The launcher's processes, whose death is from now on a change that ``_is_gone`` sees, or SIGTERM."""
    ancestors = _launcher_processes() if _is_launched() else []
    if ancestors:
        # The parent may be dead by now and never signal: what was read above differs from what is read later.
        _signal_on_parent_death(signal.SIGTERM)
    return ancestors


def _was_orphaned() -> bool:
    # The deepspeed launcher starts its ranks from a child of its own, which is never the machine's first process.
    return "LOCAL_SIZE" in os.environ and _is_launched() and os.getppid() == 1


def _is_gone(ancestors: list[int] | None) -> bool:
    return bool(ancestors) and _launcher_processes()[: len(ancestors or [])] != ancestors


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None stands for a handler that was not set from Python and cannot be set again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopWatch:
    """Knows whether the run was asked to stop: SIGTERM, SIGUSR1, SIGINT, a file ``STOP``, or the launcher's death.

    Signals are acknowledged by one line and set a flag, which the loop reads at step boundaries, so that a save is
    never cut short. A second SIGINT interrupts at once, for a person at a terminal. Under a launcher the processes
    above this one are watched: the deepspeed launcher can die and leave its ranks running (TRAPS O7). Without one they
    are not, since a run started in the background should outlive its shell. What ``note_launcher`` noticed before
    counts.

    ``directory`` is the artifact in which rank 0 looks for ``STOP``. Use from the main thread; ``close`` (or ``with``)
    gives the old signal handlers back.
    """

    def __init__(self, directory: Path) -> None:
        self.then = "saving after this step"
        """What follows a stop, for the line that acknowledges a signal."""
        self._file = directory / STOP_FILE
        self._reason = 0
        self._agreed = self._told = False
        # Before the ancestors are read, so that a death in between is seen as a change or as a signal.
        self._old = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        # A request that came before our handlers was counted by the early ones.
        self._told = bool(self._reason or _early.reason)
        self._reason = self._reason or _early.reason
        if self.reason == "SIGINT":
            # Whoever acknowledged it has promised that a second one ends the run at once.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._ancestors = _watched_ancestors() if _early.ancestors is None else _early.ancestors

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop; other ranks may not have been."""
        if not self._reason:
            if rank() == 0 and self._file.exists():
                self._reason = _reason_in(self._file)
                # Whoever wrote a signal's name has acknowledged it.
                self._told = self.reason != "a file STOP"
            elif _is_gone(self._ancestors):
                self._reason = _REASONS.index("the launcher's death")
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """What asked to stop, in words; empty when nothing did. The same on all ranks once ``agreed`` was true."""
        return _REASONS[self._reason]

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; collective, called by all ranks at the same step boundary.

        Costs one all-reduce of one number. The first true answer removes the file ``STOP``, so that the next start goes
        on; later calls keep answering true without a collective.
        """
        if not self._agreed:
            asked = self._reason if self.requested else 0
            agreed = int(_all_reduce(asked, "MAX"))
            # A signal that came while this rank waited for the others stays noted, and is agreed on next time.
            self._reason = agreed or self._reason
            self._agreed = bool(agreed)
            if self._agreed and rank() == 0:
                if not self._told:
                    logger.warning("asked to stop by %s: %s", self.reason, self.then)
                self._file.unlink(missing_ok=True)
        return self._agreed

    def close(self) -> None:
        """Give the signal handlers back that were there before."""
        _restore(self._old)
        self._old = {}

    def __enter__(self) -> StopWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        if not self._reason:
            self._reason = _heard(number, self.then)
        elif number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_launched() -> bool:
    """Whether a launcher started this process: it alone sets ``MASTER_ADDR``."""
    return "MASTER_ADDR" in os.environ
