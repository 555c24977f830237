"""What is written into ``stage.json`` when a rank was killed, by the ranks that are left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from stages.base import EXIT_FAILED
from stages.runtime import artifact, distributed, peers
from stages.runtime.artifact import Job


def end_without(lost: Sequence[peers.Peer], job: Job, record: Mapping[str, Any]) -> None:
    """End this process, which waits for ranks that are gone; the lowest one left writes what became of the run."""
    if peers.lowest_left(distributed.rank()):
        _write_lost(lost, job, record)
    os._exit(EXIT_FAILED)


def _write_lost(lost: Sequence[peers.Peer], job: Job, record: Mapping[str, Any]) -> None:
    """``failed`` into ``stage.json``, unless the attempt of ``record`` has ended otherwise."""
    now = artifact.read_record(job.directory)
    if now is None or now["state"] != "running" or now["attempts"] != record.get("attempts"):
        return
    text = f"{peers.named(lost)} was killed; the same command goes on from the newest checkpoint"
    step, at = artifact.reached_step(job.directory, now), artifact.now()
    ended = {"state": "failed", "exit_code": EXIT_FAILED, "error": text, "step": step, "finished_at": at}
    artifact.write_record(job.directory, now | ended)
    print(f"{job.name} failed: {text}", file=sys.stderr, flush=True)


def tell_for_rank_zero(job: Job, record: Mapping[str, Any]) -> None:
    """Where rank 0 was killed, write in its place; its sockets close a moment before its process is gone."""
    for _ in range(20):
        lost = peers.gone()
        if any(peer.rank == 0 for peer in lost):
            if peers.lowest_left(distributed.rank()):
                _write_lost(lost, job, record)
            return
        time.sleep(0.1)
