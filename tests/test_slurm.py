"""The batch script passes Slurm's warning on to the run, waits for its save, and queues itself again on 85 alone."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "slurm.sbatch"

# Says that it listens, saves for a moment when asked to, and ends as asked to: a shell that stands in for the run.
RUN = """#!/usr/bin/env bash
asked=
trap 'asked=yes' USR1
echo "started $*" >&2
echo up > {ready}
[ {code} = 85 ] || exit {code}
until [ -n "$asked" ]; do read -r -t 0.05 < /dev/zero; done
echo saved >&2
exit 85
"""


@pytest.fixture
def batch(tmp_path):
    """Start the script with stand-ins for python and scontrol and wait for the run; returns process, scontrol's log."""

    def start(code, *arguments):
        tools, ready, queue = tmp_path / ".venv" / "bin", tmp_path / "ready", tmp_path / "queue"
        tools.mkdir(parents=True)
        os.mkfifo(ready)
        stand_ins = {
            "python": RUN.format(ready=shlex.quote(str(ready)), code=code),
            "scontrol": f'#!/bin/sh\necho "$*" >> {shlex.quote(str(queue))}\n',
        }
        for name, text in stand_ins.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        env = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "4711"}
        process = subprocess.Popen(["bash", SCRIPT, *arguments], env=env, stderr=subprocess.PIPE, text=True)
        ready.read_text()
        return process, queue

    return start


def test_a_warning_reaches_the_run_whose_save_is_awaited_and_the_job_is_queued_again(batch):
    process, queue = batch(85, "--pipeline", "my recipe.yaml")
    process.send_signal(signal.SIGUSR1)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 85
    assert log.splitlines() == ["started pipelines/run.py --all --pipeline my recipe.yaml", "saved"]
    assert queue.read_text() == "requeue 4711\n"


def test_a_cancelled_job_saves_and_does_not_come_back(batch):
    process, queue = batch(85)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 85
    assert "saved" in log
    assert not queue.exists()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_job_that_is_done_or_failed_is_not_queued_again(batch, code):
    process, queue = batch(code)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert not queue.exists()


def test_the_warning_comes_early_enough_for_a_save_and_goes_to_the_script_alone():
    lines = SCRIPT.read_text().splitlines()
    (warning,) = [line for line in lines if line.startswith("#SBATCH --signal=")]
    target, seconds = warning.removeprefix("#SBATCH --signal=").split("@")
    from pipelines.launch import GRACE_S

    assert target == "B:USR1"
    assert int(seconds) > GRACE_S
    assert "#SBATCH --requeue" in lines
    assert "#SBATCH --open-mode=append" in lines
