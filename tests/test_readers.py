"""Whoever reads the output of a run may go (`| head`): the run goes on, and its log holds everything."""

import subprocess
import sys

import pytest
from fake_chain import FAKE_RUN, records, write_recipe


@pytest.mark.parametrize("argv", [["--stage", "gather", "--stage", "gather"], ["--stage", "train"]])
def test_a_run_outlives_its_reader(tmp_path, argv):
    command = [sys.executable, str(FAKE_RUN), *argv, "--pipeline", str(write_recipe(tmp_path))]
    process = subprocess.Popen(
        [*command, "--runs", str(tmp_path / "runs")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert said == ""
    assert {record["state"] for record in records(tmp_path).values()} == {"done"}
    (log,) = (tmp_path / "runs").rglob("gather-*/log.txt")
    assert "gather: done in" in log.read_text()


def test_a_plan_may_lose_its_reader_too(tmp_path):
    command = [sys.executable, str(FAKE_RUN), "--plan", "--pipeline", str(write_recipe(tmp_path))]
    process = subprocess.Popen([*command, "--runs", str(tmp_path / "runs")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
