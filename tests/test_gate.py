"""Rank 0's word to the other ranks: it counts for one launch alone, and nothing of it is left behind."""

import json
import os
import socket
import subprocess
import sys

import pytest

from pipelines import gate
from pipelines.gate import Gate, launch_identity
from stages.base import ConfigError
from stages.runtime import distributed

ONE_HOST = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


class WaitsStillError(Exception):
    """Raised where a rank would go on waiting."""


@pytest.fixture
def at(monkeypatch):
    """Makes this process a rank of a launch: its number, its host, and what the environment says of the launch."""
    names = [*gate._HOST_SIZES, *gate._SLURM_STEP, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]

    def become(rank, host="node0", local=None, **environment):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        local = rank if local is None else local
        for name, value in {**ONE_HOST, "RANK": str(rank), "LOCAL_RANK": str(local), **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(socket, "gethostname", lambda: host)

    def still(seconds):
        raise WaitsStillError

    monkeypatch.setattr(gate.time, "sleep", still)
    return become


def left(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("word", "verdict"), [("go", None), (0, 0), (85, 85)])
def test_a_rank_waits_for_the_word_and_takes_it_away(tmp_path, at, word, verdict):
    at(0)
    first = Gate(tmp_path)
    first.close()
    at(1)
    with pytest.raises(WaitsStillError):
        Gate(tmp_path).wait()
    if word == "go":
        first.open()
    else:
        first.finish(word)
    assert Gate(tmp_path).wait() == verdict
    assert left(tmp_path) == []


def test_nothing_is_written_for_ranks_that_were_let_through(tmp_path, at):
    at(0)
    first = Gate(tmp_path)
    first.close()
    first.open()
    at(1)
    Gate(tmp_path).wait()
    at(0)
    first.finish(85)
    assert left(tmp_path) == []


def test_a_rank_that_comes_late_still_hears_the_end(tmp_path, at):
    at(0)
    first = Gate(tmp_path)
    first.close()
    first.open()
    first.finish(1)
    at(1)
    assert Gate(tmp_path).wait() == 1


TWO_HOSTS = {"LOCAL_SIZE": "1"}


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ({"host": "node0"}, {"host": "node1"}),
        (TWO_HOSTS | STEP, TWO_HOSTS | STEP | {"SLURM_JOB_ID": "8"}),
        (TWO_HOSTS | STEP, TWO_HOSTS | STEP | {"SLURM_STEP_ID": "1"}),
        (TWO_HOSTS | STEP, TWO_HOSTS | STEP | {"SLURM_RESTART_COUNT": "1"}),
        (TWO_HOSTS | {"TORCHELASTIC_RUN_ID": "a"}, TWO_HOSTS | {"TORCHELASTIC_RUN_ID": "b"}),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, {"TORCHELASTIC_RESTART_COUNT": "1"}),
    ],
)
def test_the_word_of_an_earlier_launch_at_the_same_address_is_not_heard(tmp_path, at, earlier, later):
    at(0, **earlier)
    first = Gate(tmp_path)
    first.close()
    first.finish(0)
    at(1, **({"host": "node1", "local": 0} | later if "LOCAL_SIZE" in later else later))
    with pytest.raises(WaitsStillError):
        Gate(tmp_path).wait()


def test_the_word_of_an_earlier_launcher_on_this_host_is_not_heard(tmp_path, at, monkeypatch):
    at(0)
    Gate(tmp_path).finish(0)
    at(1)
    monkeypatch.setattr(gate, "process_started", lambda pid: "later")
    with pytest.raises(WaitsStillError):
        Gate(tmp_path).wait()


@pytest.mark.parametrize("shared", [STEP, {"TORCHELASTIC_RUN_ID": "night-3"}])
def test_ranks_on_two_hosts_hear_rank_0_by_the_launchs_number(tmp_path, at, shared):
    at(0, "node0", **TWO_HOSTS, **shared)
    first = Gate(tmp_path)
    first.close()
    first.open()
    at(1, "node1", local=0, **TWO_HOSTS, **shared)
    assert Gate(tmp_path).wait() is None


@pytest.mark.parametrize("shared", [{}, {"TORCHELASTIC_RUN_ID": "none"}, {"SLURM_JOB_ID": "7"}])
@pytest.mark.parametrize("rank", [0, 1])
def test_several_hosts_without_a_number_of_their_launch_are_refused(tmp_path, at, rank, shared):
    at(rank, f"node{rank}", local=0, **TWO_HOSTS, **shared)
    with pytest.raises(ConfigError, match=r"--stage: ranks on several hosts must share .*; start with srun"):
        Gate(tmp_path)


def test_a_rank_on_another_host_is_known_by_its_local_number(at, monkeypatch, capsys):
    at(1, "node1", local=0)
    monkeypatch.delenv("LOCAL_SIZE")
    with pytest.raises(ConfigError):
        launch_identity(os.environ)
    assert "rank 1: ranks on several hosts must share" in capsys.readouterr().err


def test_a_rank_whose_launcher_died_waits_for_rank_0_on_its_own_host_only(tmp_path, at, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "launcher_died", lambda: True)
    at(0)
    Gate(tmp_path).close()
    at(1)
    with pytest.raises(WaitsStillError):
        Gate(tmp_path).wait()
    at(0, "node0", **TWO_HOSTS, **STEP)
    Gate(tmp_path).close()
    at(1, "node1", local=0, **TWO_HOSTS, **STEP)
    assert Gate(tmp_path).wait() == 1
    assert "the launcher died" in capsys.readouterr().err


def test_what_killed_launches_left_is_swept_and_what_may_be_waited_for_is_not(tmp_path, at):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = {"verdict": None, "host": "node0", "pid": gone.pid, "pid_started": "1"}
    words = {"dead": dead, "spoken": dead | {"verdict": 85, "host": "node1"}, "elsewhere": dead | {"host": "node1"}}
    for name, word in {**words, "young": dead}.items():
        (tmp_path / f".gate-{name}-1.json").write_text(json.dumps(word))
        if name != "young":
            os.utime(tmp_path / f".gate-{name}-1.json", (1, 1))
    at(0)
    first = Gate(tmp_path)
    first.close()
    assert {name.split("-")[1] for name in left(tmp_path)} - {first._prefix.split("-")[1]} == {"elsewhere", "young"}
