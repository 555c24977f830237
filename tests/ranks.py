"""Real ranks for tests: processes forked from one server that has torch and deepspeed imported already.

A start then costs milliseconds instead of the seconds that these imports take.
"""

from __future__ import annotations

import multiprocessing
import os
import queue as queues
import socket
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

PRELOAD = ["torch", "deepspeed", "transformers", "safetensors.torch"]


def context() -> Any:
    """The multiprocessing context whose children start with the heavy modules loaded."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOAD)
    return forkserver


class Ranks:
    """``world_size`` processes that run ``function(*arguments)`` under a launcher's environment."""

    def __init__(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
        forkserver = context()
        self._queue = forkserver.Queue()
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
        }
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            facts = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = forkserver.Process(target=_main, args=(self._queue, rank, facts, function, arguments))
            process.start()
            self.processes.append(process)

    def results(self, timeout_s: float = 60.0) -> list[Any]:
        """What each rank returned, or the text of its exception, in order of rank; None for one that was killed."""
        found: dict[int, Any] = {}
        while len(found) < len(self.processes):
            try:
                rank, value = self._queue.get(timeout=0.2)
                found[rank] = value
            except queues.Empty:
                timeout_s -= 0.2
                if timeout_s < 0:
                    self.kill()
                    raise TimeoutError(
                        f"ranks {sorted(set(range(len(self.processes))) - set(found))} gave no answer"
                    ) from None
                if all(process.exitcode is not None for process in self.processes) and self._queue.empty():
                    break
        for process in self.processes:
            process.join(10)
        return [found.get(rank) for rank in range(len(self.processes))]

    def kill(self) -> None:
        """End every rank at once."""
        for process in self.processes:
            process.kill()


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``function(*arguments)`` on ``world_size`` ranks and give each one's result."""
    return Ranks(world_size, function, *arguments).results()


def _main(
    queue: Any, rank: int, facts: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(facts)
    try:
        result = function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    queue.put((rank, result))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
