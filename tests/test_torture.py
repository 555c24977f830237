"""Runs that are killed at any moment end as if they had never been (traps T6, O2)."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

MEMORY = Path("/dev/shm")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def crash_points() -> dict[str, Any]:
    # In memory where that is possible: hundreds of fsyncs on a busy disk take minutes and show nothing more.
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as root:
        return enumerated(Path(root))


def enumerated(root: Path) -> dict[str, Any]:
    run = forking("tests/crash_points.py", str(root))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def forking(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script that forks, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT / "scripts")])}
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_kill_before_any_single_file_operation_changes_nothing(crash_points):  # trap T6, trap O2
    assert crash_points["operations"] > 60
    assert crash_points["wrong"] == {}


def test_a_killed_run_leaves_nothing_behind(crash_points):
    assert crash_points["leftovers"] == {}


def test_a_resume_that_forgets_cursor_or_random_state_is_seen(crash_points):  # trap T6
    assert crash_points["cursor_forgotten"]
    assert crash_points["noise_forgotten"]


def test_saving_in_place_does_not_survive_the_same_kills(crash_points):  # trap O2
    assert crash_points["in_place_wrong"] > 0


def test_pretraining_survives_a_handful_of_kills_and_the_controls_are_told_apart():  # trap T6, trap O2
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as root:
        run = forking("scripts/torture.py", "--kills=4", "--stops=1", "--data_kills=0", f"--directory={root}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "kills: 4 in" in run.stdout
    assert run.stdout.count("control: a resume with") == 3
    assert "every run ended bit-equal" in run.stdout


def test_data_survives_a_handful_of_kills_and_the_controls_are_told_apart():  # trap T6
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as root:
        run = forking("scripts/torture_data.py", "--kills=10", f"--directory={root}")
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("shards", "tokenizer training", "loading shards", "loading whole documents", "loading a stream"):
        assert f"{name}: 2 kills in" in run.stdout
    assert "everything came out bit-equal" in run.stdout


def test_the_command_line_knows_no_other_words():
    run = forking("scripts/torture.py", "--kill=4")
    assert run.returncode == 2
    assert "unrecognized arguments: --kill=4" in run.stderr
