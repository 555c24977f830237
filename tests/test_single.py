"""`--stage`: requests to stop and the launcher's death, from a process's first moment to its last."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_chain import STAGES, write_recipe
from ranks import run_ranks

from pipelines.run import main
from stages.base import StopRequested
from stages.runtime import artifact, distributed, lifecycle

ROOT = Path(__file__).resolve().parent.parent

# One rank whose data stage lasts until the file `go` is there; a deaf one hears nothing from the kernel.
RANK = """
import os, sys, time
from pathlib import Path
from fake_chain import STAGES
from pipelines.gate import Gate
from pipelines.run import main
from stages.runtime import distributed
out, deaf = Path(sys.argv[1]), sys.argv[2] == "deaf"
if deaf:
    distributed._signal_on_parent_death = lambda number: None
real = STAGES["gather"].run
def slow(self, context):
    (out / "gathering").touch()
    while not (out / "go").exists():
        time.sleep(0.01)
    return real(self, context)
STAGES["gather"].run = slow
real_wait = Gate.wait
def wait(self):
    (out / "waiting").touch()
    return real_wait(self)
Gate.wait = wait
code = main(sys.argv[3:], STAGES)
name = "code-" + os.environ["RANK"]
(out / "tmp").joinpath(name).write_text(str(code))
os.replace(out / "tmp" / name, out / name)
"""

# Starts two ranks and waits for them, as a launcher does.
LAUNCHER = """
import os, subprocess, sys
ranks = [subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | {"RANK": r, "LOCAL_RANK": r}) for r in "10"]
for rank in ranks:
    rank.wait()
"""


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.01)
    return path.read_text()


def launcher_killed_while_gathering(tmp_path: Path, hearing: str) -> None:
    """Two ranks of a real launcher, which is killed while rank 0 runs the data stage."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "rank.py").write_text(RANK)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2",
    }  # fmt: skip
    argv = ["--stage", "train", "--pipeline", write_recipe(tmp_path), "--runs", tmp_path / "runs"]
    command = [sys.executable, "-c", LAUNCHER, tmp_path / "rank.py", tmp_path, hearing, *argv]
    launcher = subprocess.Popen(list(map(str, command)), env=environment)
    wait_for(tmp_path / "gathering")
    wait_for(tmp_path / "waiting")
    launcher.kill()
    launcher.wait()


@pytest.fixture
def released(tmp_path):
    """Lets the data stage end after the test, so that a failing one leaves no process behind."""
    yield
    (tmp_path / "go").touch()


def records(tmp_path: Path) -> dict:
    paths = (tmp_path / "runs" / "toy").glob("*/stage.json")
    return {record["stage"]: record for record in map(json.loads, (path.read_text() for path in paths))}


def test_a_data_stage_is_saved_at_once_when_the_launcher_dies(tmp_path, released):  # trap O7
    launcher_killed_while_gathering(tmp_path, "hearing")
    assert [wait_for(tmp_path / f"code-{rank}") for rank in (0, 1)] == ["85", "85"]
    assert {name: record["state"] for name, record in records(tmp_path).items()} == {"gather": "saved"}


def test_nothing_trains_after_a_data_stage_that_outlived_the_launcher(tmp_path):  # trap O7
    launcher_killed_while_gathering(tmp_path, "deaf")
    (tmp_path / "go").touch()
    assert [wait_for(tmp_path / f"code-{rank}") for rank in (0, 1)] == ["85", "85"]
    states = {name: record["state"] for name, record in records(tmp_path).items()}
    assert states == {"gather": "done", "train": "saved"}
    assert not list(tmp_path.glob("runs/toy/*/output*/weights.txt"))
    assert not list(tmp_path.glob("runs/toy/*/.gate*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("stage", ["gather", "train"])
def test_a_request_between_started_and_the_stages_own_handlers_is_honoured(tmp_path, monkeypatch, number, stage):
    verified, heard = lifecycle.verified_parents, []

    def verify(kind, job, previous):
        if job.name == stage:
            os.kill(os.getpid(), number)
        return verified(kind, job, previous)

    def heard_outside(number, frame):
        heard.append(number)

    monkeypatch.setattr(lifecycle, "verified_parents", verify)
    old = signal.signal(number, heard_outside)
    try:
        argv = ["--stage", "train", "--pipeline", str(write_recipe(tmp_path)), "--runs", str(tmp_path / "runs")]
        assert main(argv, STAGES) == 85
        assert signal.getsignal(number) is heard_outside
    finally:
        signal.signal(number, old)
    assert not heard
    assert records(tmp_path)[stage]["state"] == "saved"
    assert not list(tmp_path.glob("runs/toy/*/output*/weights.txt"))


def test_a_launcher_that_died_before_our_first_line_is_missed(monkeypatch):  # trap O7
    # Whom the machine's first process adopted has no launcher any more.
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(distributed, "_signal_on_parent_death", lambda number: None)
    with distributed.note_launcher():
        distributed.stop_if_asked()
        monkeypatch.setenv("LOCAL_SIZE", "2")
        with pytest.raises(StopRequested, match="the launcher's death"):
            distributed.stop_if_asked()


def test_a_stop_watch_takes_over_what_was_asked_before_it(tmp_path):
    with distributed.note_launcher():
        os.kill(os.getpid(), signal.SIGUSR1)
        with distributed.StopWatch(tmp_path) as watch:
            assert watch.agreed()
            assert watch.reason == "SIGUSR1"
    with distributed.StopWatch(tmp_path) as watch:
        assert not watch.agreed()


def test_a_launcher_that_died_before_the_watch_is_missed(tmp_path, monkeypatch):  # trap O7
    ancestors = [100, 90]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(distributed, "_launcher_processes", lambda: ancestors)
    monkeypatch.setattr(distributed, "_signal_on_parent_death", lambda number: None)
    with distributed.note_launcher():
        distributed.stop_if_asked()
        ancestors = [1]
        with distributed.StopWatch(tmp_path) as watch:
            assert watch.agreed()
            assert watch.reason == "the launcher's death"
        with pytest.raises(StopRequested, match="the launcher's death"):
            distributed.stop_if_asked()


def saved_by_a_slow_rank_0(directory: Path) -> tuple:
    """Exit code and what ``stage.json`` said when this rank was ready to leave."""
    write = artifact.write_record

    def write_slowly(folder, record):
        if record["state"] == "saved":
            time.sleep(0.5)
        write(folder, record)

    def run(self, context):
        distributed.init_process_group()
        raise StopRequested("SIGTERM")

    artifact.write_record = write_slowly
    STAGES["train"].run = run
    recipe = str(directory / "toy.yaml")
    code = main(["--stage", "train", "--pipeline", recipe, "--runs", str(directory / "runs")], STAGES)
    return code, records(directory)["train"]["state"]


def test_no_rank_leaves_before_rank_0_has_written_that_it_saved(tmp_path):  # trap O1
    # The launcher ends all ranks as soon as one has ended with a code other than 0.
    write_recipe(tmp_path)
    assert run_ranks(2, saved_by_a_slow_rank_0, tmp_path) == [(85, "saved")] * 2


def pretrain_asked_to_stop_while_it_opens_the_data(root: Path) -> tuple[str, int, list[str]]:
    """What the stage raised, how many signals went past it, and what it logged; in a process of its own."""
    from tiny_run import Log, context, make_tokens

    from stages.pretrain import Pretrain
    from stages.runtime.pretraining import Pretraining

    opened, heard, log = Pretraining._open_data, [], Log()

    def open_data(self):
        os.kill(os.getpid(), signal.SIGTERM)
        opened(self)

    Pretraining._open_data = open_data
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        Pretrain().run(context(root / "run", make_tokens(root / "tokens"), tracker=log))
    except StopRequested as request:
        return str(request), len(heard), [row["event"] for row in log.rows]
    return "ran on", len(heard), []


def test_a_request_while_the_data_is_opened_stops_before_the_first_step(tmp_path):
    ((said, heard, events),) = run_ranks(1, pretrain_asked_to_stop_while_it_opens_the_data, tmp_path)
    assert "before the first step of this attempt, asked to stop by SIGTERM" in said
    assert heard == 0
    assert "train" not in events
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def two_runs_with_a_closed_group_between(root: Path) -> list[int]:
    """Steps of two pretraining runs in one process, each with a process group of its own."""
    from tiny_run import context, make_tokens

    from stages.pretrain import Pretrain

    tokens, steps = make_tokens(root / "tokens"), []
    for name in ("first", "second"):
        steps.append(Pretrain().run(context(root / name, tokens, max_steps=2)).metrics["steps"])
        distributed.close_process_group()
    return steps


def test_a_closed_process_group_leaves_nothing_to_the_next_one(tmp_path, monkeypatch):
    assert run_ranks(1, two_runs_with_a_closed_group_between, tmp_path) == [[2, 2]]
