"""A rank that is killed ends the run, and `stage.json` says so, even where the others sleep and hear nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_chain import STAGES, Train, records, write_recipe
from ranks import Ranks

from stages.runtime import peers


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    with process:
        yield process
        process.kill()
    peers.end()


def peer(process, rank=1, **changes):
    me = peers.me(rank)
    return me._replace(pid=process.pid, born=peers.born(process.pid), **changes)


def test_a_dead_process_is_told_after_the_grace(sleeper, monkeypatch):
    monkeypatch.setattr(peers, "POLL_S", 0.01)
    monkeypatch.setattr(peers, "GRACE_S", 0.0)
    told: list[Any] = []
    heard = threading.Event()
    watched = peer(sleeper)
    with peers.on_loss(lambda lost: (told.extend(lost), heard.set())):
        peers.begin([peers.me(0), watched])
        assert peers.gone() == []
        sleeper.kill()
        assert heard.wait(30)
    assert told == [watched] == peers.gone()
    assert peers.named(told) == f"rank 1 (process {sleeper.pid})"


def test_who_has_left_in_peace_is_not_missed(sleeper):
    peers.begin([peers.me(0), peer(sleeper)])
    peers.end()
    sleeper.kill()
    sleeper.wait()
    assert peers.gone() == []


def test_other_machines_and_what_is_not_seen_from_here_are_not_watched(sleeper):
    peers.begin([peer(sleeper, host="elsewhere"), peer(sleeper)._replace(born="1"), peer(sleeper)._replace(born="")])
    sleeper.kill()
    sleeper.wait()
    assert peers.gone() == []


def test_the_lowest_rank_left_speaks(sleeper):
    peers.begin([peer(sleeper, rank=0), peers.me(1)])
    assert not peers.lowest_left(1)
    sleeper.kill()
    sleeper.wait()
    assert peers.lowest_left(1)


def node(directory: Path) -> Any:
    from pipelines.chain import build_chain
    from pipelines.recipe import load_recipe

    return build_chain(load_recipe(write_recipe(directory), [], STAGES), directory / "runs", STAGES).nodes["train"]


class Deaf(Train):
    """A rank kills itself; the others sleep as in a driver's call, or wait for it on gloo."""

    victim, sleeps = 0, False

    def run(self, context: Any) -> Any:
        import torch

        from stages.runtime import distributed, engine

        engine.prepare_environment()
        distributed.init_process_group()
        distributed.barrier()
        if distributed.rank() == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.sleeps:
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        torch.distributed.barrier()


def deaf(directory: Path, victim: int, sleeps: bool) -> int:
    """One rank's life; others than rank 0 begin when it has, as under ``--stage``."""
    from stages.runtime import distributed
    from stages.runtime.artifact import read_record
    from stages.runtime.lifecycle import Surroundings, execute, follow

    job = node(directory).job
    while distributed.rank() and (read_record(job.directory) or {}).get("state") != "running":
        time.sleep(0.01)
    peers.POLL_S, peers.GRACE_S = 0.05, 0.2
    Deaf.victim, Deaf.sleeps = victim, sleeps
    act = execute if distributed.rank() == 0 else follow
    return act(Deaf(), job, Surroundings(directory))


@pytest.mark.parametrize(("world_size", "victim", "sleeps"), [(2, 1, True), (4, 0, True), (2, 0, False)])
def test_a_killed_rank_fails_the_run_on_record(cli, tmp_path, world_size, victim, sleeps):  # trap O7
    assert cli("--stage", "gather") == 0
    ranks = Ranks(world_size, deaf, tmp_path, victim, sleeps)
    ranks.results(timeout_s=60)
    codes = [process.exitcode for process in ranks.processes]
    assert codes[victim] == -signal.SIGKILL
    record = records(tmp_path)["train"]
    assert record["state"] == "failed"
    assert record["exit_code"] == 1
    if sleeps:
        assert [code for rank, code in enumerate(codes) if rank != victim] == [1] * (world_size - 1)
        assert f"rank {victim} (process {ranks.processes[victim].pid}) was killed" in record["error"]
