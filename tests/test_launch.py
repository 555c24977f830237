"""`--all`: children are watched and reaped, results come from `stage.json`, nothing outlives the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_chain import RECIPE, STAGES, write_recipe

from pipelines import launch
from pipelines.chain import build_chain
from pipelines.recipe import load_recipe
from pipelines.run import main, parse, stages_argv
from stages.base import ConfigError
from stages.runtime.artifact import process_started, read_record
from stages.runtime.lock import hold

ROOT = Path(__file__).resolve().parent.parent
FAKE_RUN = ROOT / "tests" / "fake_run.py"

# Writes its process id, then waits for the file STOP or a signal, "saves", and ends.
WORKER = """
import os, signal, sys, time
from pathlib import Path
pid_file, stop, saved = map(Path, sys.argv[1:4])
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, _: stop.write_text(signal.Signals(number).name))
pid_file.with_suffix(".tmp").write_text(str(os.getpid()))
pid_file.with_suffix(".tmp").rename(pid_file)
while not stop.exists():
    time.sleep(0.02)
saved.touch()
"""

# A launcher that starts a worker in a session of its own and goes away, as launchers do when they are killed.
DESERTER = """
import subprocess, sys
subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
"""

STUBBORN = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(sys.argv[1] + ".tmp").write_text(str(os.getpid()))
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
while True:
    time.sleep(0.02)
"""


@pytest.fixture
def chain(tmp_path):
    return build_chain(load_recipe(write_recipe(tmp_path), [], STAGES), tmp_path / "runs", STAGES)


@pytest.fixture
def script(tmp_path):
    def write(text, name="worker.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def fake_argv(tmp_path, *extra):
    """What `stages_argv` would be if the launcher were the fake command line."""
    recipe, runs = write_recipe(tmp_path), tmp_path / "runs"
    return lambda nodes: [
        sys.executable, str(FAKE_RUN), *(word for node in nodes for word in ("--stage", node.name)),
        "--pipeline", str(recipe), "--runs", str(runs), *extra,
    ]  # fmt: skip


def shown(node):
    return f"python run.py --stage {node.name}"


def appears(path: Path) -> str:
    """The content of a file that another process is about to write."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
    return path.read_text()


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while process_started(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    return process_started(pid) is None


def warden(*argv, grace_s=30.0, stop_file=None):
    stop = [] if stop_file is None else ["--stop-file", str(stop_file)]
    return subprocess.Popen(
        [sys.executable, str(launch.WARDEN), *stop, "--grace-s", str(grace_s), "--", sys.executable, *map(str, argv)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def test_all_runs_every_stage_in_order_and_a_second_time_finds_them_done(chain, tmp_path, capfd):
    assert launch.run_all(chain, list(chain), fake_argv(tmp_path), shown) == 0
    assert {node.name: read_record(node.job.directory)["state"] for node in chain} == {
        "gather": "done", "train": "done", "tuned": "done"
    }  # fmt: skip
    capfd.readouterr()
    assert launch.run_all(chain, list(chain), fake_argv(tmp_path), shown) == 0
    out = capfd.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines() if "already done" in line] == ["gather", "train", "tuned"]


@pytest.mark.parametrize(("ending", "code"), [("saved", 85), ("fault", 2), ("kill", 1)])
def test_the_first_stage_that_does_not_finish_ends_all_with_its_code(chain, tmp_path, ending, code):  # trap O1
    argv = fake_argv(tmp_path, "--set", f"train.ending={ending}")
    assert launch.run_all(chain, list(chain), argv, shown) == code
    assert read_record(chain.nodes["tuned"].job.directory) is None
    # It goes on where it stopped.
    assert launch.run_all(chain, chain.selection(None, "train"), fake_argv(tmp_path), shown) == 0
    assert read_record(chain.nodes["gather"].job.directory)["attempts"] == 1


@pytest.mark.parametrize(("ending", "words"), [("error", "train failed: "), ("fault", "train.lr: must be lower")])
def test_what_a_stage_said_of_its_end_is_said_again_in_the_last_line_alone(chain, tmp_path, capfd, ending, words):
    argv = fake_argv(tmp_path, "--set", f"train.ending={ending}")
    assert launch.run_all(chain, chain.selection(None, "train"), argv, shown) == (1 if ending == "error" else 2)
    said = capfd.readouterr()
    lines = said.err.splitlines()
    assert [number for number, line in enumerate(lines, 1) if words in line] == [1, len(lines)]


def test_an_artifact_that_another_run_holds_is_told_once_and_no_child_is_started(chain, tmp_path, capfd):
    def never(nodes):
        raise AssertionError("a child was started")

    with hold(chain.nodes["gather"].job.directory):
        assert launch.run_all(chain, list(chain), never, shown) == 1
    said = capfd.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("gather: ")
    assert f"is being worked on by process {os.getpid()} on " in line


@pytest.mark.parametrize("ending", ["done", "saved", "error"])
def test_what_comes_last_comes_however_the_stages_ended(chain, tmp_path, ending):
    argv, last = fake_argv(tmp_path, "--set", f"gather.ending={ending}"), []
    code = launch.run_all(chain, chain.selection(None, "gather"), argv, shown, finish=lambda: last.append("report"))
    assert code == {"done": 0, "saved": 85, "error": 1}[ending]
    assert last == ["report"]


def test_a_launcher_that_lies_about_success_is_not_believed(chain, tmp_path, capfd):  # trap O1
    assert launch.run_all(chain, list(chain), lambda nodes: [sys.executable, "-c", ""], shown) == 1
    assert "ended with code 0 before it began" in capfd.readouterr().err


def test_a_launcher_that_lies_about_failure_is_not_believed_either(chain, tmp_path):  # trap O1
    argv = fake_argv(tmp_path)
    liar = "import subprocess, sys; subprocess.run(sys.argv[1:]); sys.exit(1)"
    chosen = chain.selection(None, "gather")
    assert launch.run_all(chain, chosen, lambda nodes: [sys.executable, "-c", liar, *argv(nodes)], shown) == 0


def test_an_earlier_saved_state_is_not_taken_for_this_attempts(chain, tmp_path):  # trap O1
    assert launch.run_all(chain, list(chain), fake_argv(tmp_path, "--set", "gather.ending=saved"), shown) == 85
    assert launch.run_all(chain, list(chain), lambda nodes: [sys.executable, "-c", "raise SystemExit(3)"], shown) == 1


def test_a_gap_before_from_is_refused_before_anything_runs(chain, tmp_path):
    with pytest.raises(ConfigError, match=r"tuned\.from: must be a finished stage; got train, stale \(never run\)"):
        launch.run_all(chain, chain.selection("tuned", None), fake_argv(tmp_path), shown)
    assert not (tmp_path / "runs").exists()


def test_until_stops_after_a_stage(chain, tmp_path):
    assert launch.run_all(chain, chain.selection(None, "train"), fake_argv(tmp_path), shown) == 0
    assert read_record(chain.nodes["tuned"].job.directory) is None


def test_stop_by_file_lets_the_worker_save(script, tmp_path):  # trap O7
    stop, saved, pid = tmp_path / "STOP", tmp_path / "saved", tmp_path / "pid"
    process = warden(script(WORKER), pid, stop, saved, stop_file=stop)
    worker = int(appears(pid))
    process.communicate(b"stop\n", timeout=30)
    assert saved.exists()
    assert ends(worker)
    assert process.returncode == 0


def test_the_file_stop_holds_the_signals_name_and_needs_no_folder(script, tmp_path):
    stop, saved, pid = tmp_path / "not" / "yet" / "STOP", tmp_path / "saved", tmp_path / "pid"
    process = warden(script(WORKER), pid, stop, saved, stop_file=stop)
    appears(pid)
    process.communicate(b"stop SIGUSR1\n", timeout=30)
    assert saved.exists()
    assert stop.read_text() == "SIGUSR1"


def test_stop_by_signal_lets_a_data_stage_save(script, tmp_path):
    stop, saved, pid = tmp_path / "asked", tmp_path / "saved", tmp_path / "pid"
    process = warden(script(WORKER), pid, stop, saved)
    appears(pid)
    process.communicate(b"stop\n", timeout=30)
    assert saved.exists()


def test_a_worker_that_its_launcher_deserted_is_asked_to_save_and_waited_for(script, tmp_path):  # trap O7
    stop, saved, pid = tmp_path / "STOP", tmp_path / "saved", tmp_path / "pid"
    deserter = script(DESERTER, "deserter.py")
    process = warden(deserter, script(WORKER), pid, stop, saved, stop_file=stop)
    process.wait(timeout=30)
    process.stdin.close()
    assert saved.exists()
    assert ends(int(pid.read_text()))


@pytest.mark.parametrize("deserted", [False, True])
def test_a_worker_that_will_not_stop_is_killed_after_the_grace(script, tmp_path, deserted):  # trap O7
    pid = tmp_path / "pid"
    way = [script(DESERTER, "deserter.py")] if deserted else []
    process = warden(*way, script(STUBBORN, "stubborn.py"), pid, stop_file=tmp_path / "STOP", grace_s=0.5)
    worker = int(appears(pid))
    process.communicate(b"stop\n", timeout=30)
    assert ends(worker)
    assert process.returncode == (0 if deserted else 128 + signal.SIGKILL)


def test_kill_ends_everything_at_once(script, tmp_path):
    pid = tmp_path / "pid"
    process = warden(script(STUBBORN), pid, stop_file=tmp_path / "STOP", grace_s=1000)
    worker = int(appears(pid))
    process.communicate(b"kill\n", timeout=30)
    assert ends(worker)


def test_when_the_master_is_killed_the_worker_saves_and_ends(script, tmp_path):  # trap O7
    stop, saved, pid = tmp_path / "STOP", tmp_path / "saved", tmp_path / "pid"
    master = (
        "import subprocess, sys\n"
        f"warden = [sys.executable, {str(launch.WARDEN)!r}, '--stop-file', {str(stop)!r}, '--grace-s', '30', '--']\n"
        "argv = [*warden, sys.executable, *sys.argv[1:]]\n"
        "subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True).wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", master, script(WORKER), pid, stop, saved])
    worker = int(appears(pid))
    process.kill()
    process.wait()
    appears(saved)
    assert ends(worker)


def test_when_the_warden_itself_is_killed_its_command_gets_sigterm(script, tmp_path):  # trap O7
    stop, saved, pid = tmp_path / "asked", tmp_path / "saved", tmp_path / "pid"
    process = warden(script(WORKER), pid, stop, saved)
    worker = int(appears(pid))
    process.kill()
    process.communicate(timeout=30)
    appears(saved)
    assert ends(worker)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_all_stops_the_child_and_starts_no_other(chain, script, tmp_path, number, capfd):
    node = chain.nodes["gather"]
    pid, saved = tmp_path / "pid", tmp_path / "saved"
    # The signal arrives while the child runs: the child sends it, then waits to be asked.
    body = WORKER.replace("while", f"os.kill({os.getpid()}, {int(number)})\nwhile", 1)
    argv = [sys.executable, str(script(body)), str(pid), str(tmp_path / "asked"), str(saved)]
    assert launch.run_all(chain, list(chain), lambda _: argv, shown) == 85
    assert saved.exists()
    said = capfd.readouterr()
    again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
    assert said.err == f"asked to stop by {number.name}: the running stage saves and ends{again}\n"
    assert "gather: stopped before it began" in said.out
    assert (tmp_path / "asked").read_text() == number.name, "the child is asked by the very signal"
    assert ends(int(pid.read_text()))
    assert read_record(node.job.directory) is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_request_between_stages_starts_no_other_and_exits_85(chain, tmp_path, monkeypatch, capfd):
    def finished(nodes, argv, interrupts, grace_s):
        interrupts.requested = "SIGTERM"
        return 0

    monkeypatch.setattr(launch, "run_child", finished)
    assert launch.run_all(chain, list(chain), fake_argv(tmp_path), shown) == 85
    assert "train: not started, asked to stop" in capfd.readouterr().out


def test_a_stop_that_nobody_honoured_does_not_stop_the_next_run(chain, tmp_path):
    node = chain.nodes["train"]
    node.job.directory.mkdir(parents=True)
    (node.job.directory / "STOP").touch()
    assert launch.run_all(chain, chain.selection(None, "train"), fake_argv(tmp_path), shown) == 0
    assert not (node.job.directory / "STOP").exists()


def test_training_goes_through_the_launcher_and_data_does_not(chain, tmp_path):
    options = parse(["--all", "--num_gpus", "2", "--set", "train.lr=1e-3", "--runs", str(tmp_path / "runs")])
    data, training = (stages_argv([chain.nodes[name]], options) for name in ("gather", "train"))
    assert data[:4] == [sys.executable, str(ROOT / "pipelines" / "run.py"), "--stage", "gather"]
    assert training[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert training[training.index("--num_gpus") + 1] == "2"
    assert training[training.index("--stage") + 1] == "train"
    assert training[-4:] == ["--set", "train.lr=1e-3", "--runs", str(tmp_path / "runs")]
    assert "--master_port" in training


def test_without_a_gpu_the_launcher_is_told_so(monkeypatch):
    monkeypatch.setattr(launch, "has_gpu", lambda: False)
    assert launch.environment({}, launched=True) == {"DS_ACCELERATOR": "cpu"}
    assert launch.environment({"DS_ACCELERATOR": "xpu"}, launched=True)["DS_ACCELERATOR"] == "xpu"
    assert launch.environment({"A": "b"}, launched=False) == {"A": "b"}
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    assert launch.environment({}, launched=True) == {}


def test_all_from_the_command_line_refuses_a_broken_recipe_before_any_child(tmp_path, capsys):
    path = write_recipe(tmp_path, RECIPE.replace("lr: 2e-4", "lr: x"))
    assert main(["--all", "--pipeline", str(path), "--runs", str(tmp_path / "runs")], STAGES) == 2
    assert not (tmp_path / "runs").exists()
