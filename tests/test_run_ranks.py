"""`--stage` on several ranks: rank 0 alone writes and speaks, all end with the same code."""

import os
import subprocess
import sys
import time

import pytest
from fake_chain import FAKE_RUN, STAGES, records, write_recipe

from pipelines.chain import build_chain
from pipelines.recipe import load_recipe
from stages.runtime.artifact import read_record, write_record
from stages.runtime.lifecycle import Surroundings, follow


def ranks(tmp_path, *argv, world_size=2):
    """Start fake_run once a rank, as a launcher would: one parent, the ranks in the environment."""
    recipe = write_recipe(tmp_path)
    command = [sys.executable, str(FAKE_RUN), *argv, "--pipeline", str(recipe), "--runs", str(tmp_path / "runs")]
    base = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    started = [
        subprocess.Popen(
            [*command, f"--local_rank={rank}"],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in reversed(range(world_size))
    ]
    return [(process.communicate(timeout=60), process.returncode) for process in reversed(started)]


def test_all_ranks_run_the_stage_and_rank_0_alone_writes_and_speaks(tmp_path):
    (first, code), (second, other) = ranks(tmp_path, "--stage", "train")
    assert (code, other) == (0, 0), second[1]
    assert "gathered" in first[0]
    assert second == ("", "")
    assert records(tmp_path)["train"]["world_size"] == 2
    assert len(next((tmp_path / "runs" / "toy").glob("train-*/metrics.jsonl")).read_text().splitlines()) == 1
    assert [code for _, code in ranks(tmp_path, "--stage", "train")] == [0, 0]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--stage", "gather"], 0),
        (["--stage", "train", "--set", "train.ending=saved"], 85),
        (["--stage", "train", "--set", "gather.ending=error"], 1),
        (["--stage", "tuned"], 2),
        (["--all"], 2),
    ],
)
def test_every_rank_ends_with_the_same_code(tmp_path, argv, code):
    (_, (second, _)), codes = zip(*(ended for ended in ranks(tmp_path, *argv)), strict=True)
    assert codes == (code, code)
    assert second == ""


def test_a_refusal_is_told_once_on_each_machine(cli, tmp_path, capsys, monkeypatch):
    assert cli("--stage", "train", "--set", "train.ending=fault") == 2
    assert capsys.readouterr().err.count("train.lr: must be lower") == 1
    recipe = load_recipe(tmp_path / "toy.yaml", ["train.ending=fault"], STAGES)
    node = build_chain(recipe, tmp_path / "runs", STAGES).nodes["train"]
    monkeypatch.setenv("RANK", "1")
    assert follow(node.stage(), node.job, Surroundings(tmp_path)) == 2
    assert capsys.readouterr().err == ""
    write_record(node.job.directory, {**read_record(node.job.directory), "host": "elsewhere"})
    assert follow(node.stage(), node.job, Surroundings(tmp_path)) == 2
    assert capsys.readouterr().err == "rank 1: train.lr: must be lower; got more; set less\n"


def test_other_ranks_notice_that_rank_0_was_killed_while_it_prepared(tmp_path):  # trap O7
    (_, first), (said, second) = ranks(tmp_path, "--stage", "train", "--set", "gather.ending=kill")
    assert first == -9
    assert second == 1
    assert "rank 0 died while it prepared the stage" in said[1]


def test_a_file_stop_that_came_before_the_stage_began_stops_all_ranks_before_it(cli, tmp_path):
    assert cli("--stage", "gather") == 0
    recipe = load_recipe(tmp_path / "toy.yaml", [], STAGES)
    directory = build_chain(recipe, tmp_path / "runs", STAGES).nodes["train"].job.directory
    directory.mkdir()
    (directory / "STOP").write_text("SIGINT")
    later = time.time() + 60
    os.utime(directory / "STOP", (later, later))
    (first, code), (_, other) = ranks(tmp_path, "--stage", "train")
    assert (code, other) == (85, 85)
    assert "train: saved (SIGINT)" in first[0]
    assert records(tmp_path)["train"]["state"] == "saved"
    assert not (directory / "STOP").exists()
    assert [code for _, code in ranks(tmp_path, "--stage", "train")] == [0, 0]
