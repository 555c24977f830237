"""A file STOP stops the run that it was written for, and no later one."""

import os
import time

import pytest
from fake_chain import STAGES, records

from pipelines.chain import build_chain
from pipelines.recipe import load_recipe
from stages.base import StopRequested
from stages.runtime import distributed, stop_file


def left_behind(directory, seconds_ago):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "STOP").touch()
    then = time.time() - seconds_ago
    os.utime(directory / "STOP", (then, then))


def directory_of(tmp_path, stage):
    chain = build_chain(load_recipe(tmp_path / "toy.yaml", [], STAGES), tmp_path / "runs", STAGES)
    return chain.nodes[stage].job.directory


def test_a_stop_of_an_earlier_run_is_removed_and_named_and_the_stage_runs(cli, tmp_path, capsys):
    assert cli("--stage", "gather") == 0
    directory = directory_of(tmp_path, "train")
    left_behind(directory, 10**6)
    assert cli("--stage", "train") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "STOP" in line]
    assert line.startswith("train: removed the file STOP that an earlier run left behind 11d13h before this start; ")
    assert line.endswith(f"touch {directory / 'STOP'}")
    assert not (directory / "STOP").exists()
    assert records(tmp_path)["train"]["state"] == "done"


def test_a_stop_that_is_written_while_the_stage_starts_counts(cli, tmp_path, capsys):
    assert cli("--stage", "gather") == 0
    left_behind(directory_of(tmp_path, "train"), 0)
    assert cli("--stage", "train") == 85
    assert records(tmp_path)["train"]["state"] == "saved"
    assert "earlier run" not in capsys.readouterr().out


def test_a_stop_that_comes_in_the_moment_of_looking_is_not_lost(tmp_path, monkeypatch):
    left_behind(tmp_path, 10**6)
    real = stop_file._age_s

    def meanwhile(file):
        (tmp_path / "STOP").touch()
        return real(file)

    monkeypatch.setattr(stop_file, "_age_s", meanwhile)
    assert stop_file.clear_old("train", tmp_path) is not None
    assert (tmp_path / "STOP").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["STOP"]
    with pytest.raises(StopRequested, match="a file STOP"), distributed.note_launcher():
        distributed.stop_if_asked(tmp_path)


@pytest.mark.parametrize(("seconds_ago", "removed"), [(59, False), (61, True)])
def test_the_start_is_that_of_the_launcher(tmp_path, monkeypatch, seconds_ago, removed):
    ages = {os.getpid(): 1.0, 11: 10.0, 12: 60.0}
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(stop_file, "launcher_processes", lambda: [11, 12])
    monkeypatch.setattr(stop_file, "_process_age_s", ages.__getitem__)
    monkeypatch.setattr(stop_file, "_IMPORTED", time.monotonic())
    left_behind(tmp_path, seconds_ago)
    assert (stop_file.clear_old("train", tmp_path) is not None) is removed
    assert (tmp_path / "STOP").exists() is not removed


def test_a_process_knows_its_own_age():
    import psutil

    assert stop_file._process_age_s(os.getpid()) == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.1)
    assert stop_file._process_age_s(2**30) == 0.0


def test_no_stop_is_no_line(tmp_path):
    assert stop_file.clear_old("train", tmp_path) is None
    assert stop_file.clear_old("train", tmp_path / "nowhere") is None
