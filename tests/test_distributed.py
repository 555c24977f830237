"""Ranks, collectives and the request to stop, on real processes over gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import Ranks, run_ranks

from stages.runtime import distributed
from stages.runtime.distributed import StopWatch


def started() -> None:
    distributed.init_process_group()
    distributed.init_process_group()


def finished() -> None:
    distributed.barrier()
    distributed.close_process_group()


def facts_and_sums() -> tuple:
    started()
    rank = distributed.rank()
    total = distributed.all_reduce_sum(0.1 + rank)
    word = distributed.broadcast({"from": rank})
    answer = distributed.on_rank_zero(lambda: f"ran on {distributed.rank()}")
    finished()
    return rank, distributed.local_rank(), distributed.world_size(), total, word, answer


def test_two_ranks_sum_broadcast_and_run_once():
    assert run_ranks(2, facts_and_sums) == [
        (0, 0, 2, 1.2000000000000002, {"from": 0}, "ran on 0"),  # 0.1 + 1.1 in float64
        (1, 1, 2, 1.2000000000000002, {"from": 0}, "ran on 0"),
    ]


def failing_on_rank_zero() -> str:
    started()

    def fail() -> None:
        raise FileNotFoundError("no such thing")

    try:
        distributed.on_rank_zero(fail)
    except FileNotFoundError as error:
        return f"rank {distributed.rank()}: {error}"
    finally:
        finished()
    return "nothing raised"


def test_a_failure_of_rank_zero_is_raised_on_every_rank():
    assert run_ranks(2, failing_on_rank_zero) == ["rank 0: no such thing", "rank 1: no such thing"]


def steps_until_stop(directory: Path, signalled: int) -> tuple:
    """Steps that a loop makes before it agrees to stop; rank ``signalled`` gets SIGTERM in step 3, alone."""
    started()
    step = 0
    with StopWatch(directory) as watch:
        while step < 50:
            step += 1
            if step == 3 and distributed.rank() == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            if watch.agreed():
                break
        again = watch.agreed()
    finished()
    return step, watch.reason, again


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, signalled):
    assert run_ranks(2, steps_until_stop, tmp_path, signalled) == [(3, "SIGTERM", True)] * 2


def steps_until_file(directory: Path) -> tuple:
    started()
    step = 0
    with StopWatch(directory) as watch:
        while not watch.agreed():
            step += 1
            if step == 4 and distributed.rank() == 0:
                (directory / "STOP").touch()
    finished()
    return step, watch.reason, (directory / "STOP").exists()


def test_the_file_stop_stops_all_ranks_and_is_taken_away(tmp_path):
    assert run_ranks(2, steps_until_file, tmp_path) == [(4, "a file STOP", False)] * 2


def save_while_a_rank_fails(directory: Path, failing: int) -> tuple:
    from stages.runtime.checkpoint import CheckpointStore

    distributed.init_process_group()
    store = CheckpointStore(directory, keep=2)

    def write(folder: Path) -> None:
        (folder / f"shard-{distributed.rank()}").write_bytes(bytes([distributed.rank()]) * 100)

    def fail(folder: Path) -> None:
        write(folder)
        if distributed.rank() == failing:
            raise OSError(28, "No space left on device")

    store.save(1, write, {"seen": distributed.rank()})
    message = "saved"
    try:
        store.save(2, fail, {})
    except Exception as error:
        message = type(error).__name__
        # Leave as a failing rank does, so that the others see the connection close.
        distributed.close_process_group()
    found = store.newest() if distributed.rank() == 0 and message == "saved" else None
    return message, found


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_ends_the_save_on_all_and_the_older_one_stays(tmp_path, failing):
    from stages.runtime.checkpoint import CheckpointStore

    results = run_ranks(2, save_while_a_rank_fails, tmp_path, failing)
    assert results[failing] == ("CheckpointError", None)
    assert results[1 - failing][0] != "saved"
    step, folder, state = CheckpointStore(tmp_path, keep=2).newest()
    assert (step, state) == (1, {"seen": 0})
    assert [(folder / f"shard-{rank}").read_bytes() for rank in (0, 1)] == [b"\0" * 100, b"\1" * 100]


def test_without_a_launcher_there_is_one_rank_and_no_torch():
    code = (
        "import sys; from stages.runtime import checkpoint, distributed as d; d.barrier(); "
        "print(d.rank(), d.world_size(), d.local_rank(), d.all_reduce_sum(2.5), d.broadcast('x')); "
        "print('torch' in sys.modules)"
    )
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, check=True)
    assert run.stdout.split() == ["0", "1", "0", "2.5", "x", "False"]


def test_a_fact_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE must be a number; got 'two'"):
        distributed.world_size()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_signal_is_noticed_and_the_old_handlers_come_back(tmp_path, number):
    before = signal.getsignal(number)
    with StopWatch(tmp_path) as watch:
        assert not watch.agreed()
        os.kill(os.getpid(), number)
        assert watch.agreed()
        assert watch.reason == number.name
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("number", "more"),
    [(signal.SIGTERM, ""), (signal.SIGUSR1, ""), (signal.SIGINT, "; Ctrl-C again ends it at once")],
)
def test_a_first_signal_is_acknowledged_at_once_by_one_line_and_rank_0_alone(
    tmp_path, capsys, monkeypatch, caplog, number, more
):
    with StopWatch(tmp_path) as watch:
        signal.raise_signal(number)
        assert capsys.readouterr().err == f"asked to stop by {number.name}: saving after this step{more}\n"
        signal.raise_signal(signal.SIGTERM)
        assert watch.agreed()
    assert capsys.readouterr().err == "", "once is enough"
    assert caplog.messages == [], "not once more at the step boundary"
    monkeypatch.setenv("RANK", "1")
    with StopWatch(tmp_path) as watch:
        signal.raise_signal(number)
        assert watch.requested
    assert capsys.readouterr().err == ""


def test_a_signal_while_this_very_stream_is_written_to_is_acknowledged_too(tmp_path, capfd, monkeypatch):
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call")

    monkeypatch.setattr(sys, "stderr", Busy())
    with StopWatch(tmp_path):
        signal.raise_signal(signal.SIGUSR1)
    assert capfd.readouterr().err == "asked to stop by SIGUSR1: saving after this step\n"


@pytest.mark.parametrize(
    ("text", "reason"), [("SIGINT", "SIGINT"), ("SIGUSR1\n", "SIGUSR1"), ("", "a file STOP"), ("x", "a file STOP")]
)
def test_a_file_stop_that_names_a_signal_is_reported_by_that_name(tmp_path, caplog, text, reason):
    (tmp_path / "STOP").write_text(text)
    with StopWatch(tmp_path) as watch:
        assert watch.agreed()
        assert watch.reason == reason
    # Whoever was sent the signal has said so; a file that a person made is acknowledged here.
    said = [f"asked to stop by {reason}: saving after this step"] if reason == "a file STOP" else []
    assert caplog.messages == said
    assert not (tmp_path / "STOP").exists()


def test_a_second_interrupt_interrupts_at_once(tmp_path):
    with StopWatch(tmp_path) as watch:
        signal.raise_signal(signal.SIGINT)
        assert watch.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_interrupts_at_once_when_the_first_came_before_the_watch(tmp_path):
    with distributed.note_launcher():
        signal.raise_signal(signal.SIGINT)
        with StopWatch(tmp_path) as watch:
            assert watch.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


LAUNCHED = """
import os, sys, time
from pathlib import Path
from stages.runtime.distributed import StopWatch
out = Path(sys.argv[1])
with StopWatch(out) as watch:
    (out / "ready").touch()
    for _ in range(3000):
        if watch.agreed():
            (out / "reason.tmp").write_text(watch.reason)
            os.replace(out / "reason.tmp", out / "reason")
            break
        time.sleep(0.01)
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.01)


def start_below_a_launcher(tmp_path: Path, launched: bool) -> subprocess.Popen:
    """A process that starts a watching one and waits for it, as a launcher does."""
    (tmp_path / "watching.py").write_text(LAUNCHED)
    above = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if launched:
        environment |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
    watching = [str(tmp_path / "watching.py"), str(tmp_path)]
    launcher = subprocess.Popen([sys.executable, "-c", above, *watching], env=environment)
    wait_for(tmp_path / "ready")
    return launcher


def test_the_launchers_death_is_a_request_to_stop(tmp_path):  # trap O7
    launcher = start_below_a_launcher(tmp_path, launched=True)
    launcher.kill()
    launcher.wait()
    wait_for(tmp_path / "reason")
    assert (tmp_path / "reason").read_text() in ("the launcher's death", "SIGTERM")


def test_a_run_without_launcher_outlives_its_shell(tmp_path):
    launcher = start_below_a_launcher(tmp_path, launched=False)
    launcher.kill()
    launcher.wait()
    (tmp_path / "STOP").touch()
    wait_for(tmp_path / "reason")
    assert (tmp_path / "reason").read_text() == "a file STOP"


def test_the_deepspeed_runner_above_the_launcher_is_watched_too(monkeypatch, tmp_path):  # trap O7
    ancestors = [[100, 90], [100, 90], [100, 1]]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(distributed, "_launcher_processes", lambda: ancestors.pop(0))
    monkeypatch.setattr(distributed, "_signal_on_parent_death", lambda number: None)
    with StopWatch(tmp_path) as watch:
        assert not watch.requested
        assert watch.requested
        assert watch.reason == "the launcher's death"


def test_a_killed_rank_is_reported_as_such():
    ranks = Ranks(1, signal.pause)
    ranks.kill()
    assert ranks.results() == [None]


@pytest.mark.parametrize(("ranks", "cores", "threads"), [(1, 2, "2"), (2, 2, "1"), (4, 2, "1"), (3, 16, "5")])
def test_ranks_share_the_cores(monkeypatch, ranks, cores, threads):
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": str(ranks)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    distributed.settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_threads_that_the_user_set_are_kept(monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "7"})
    distributed.settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_an_engine_starts_in_a_process_whose_group_another_start_made():
    code = (
        "import os; from stages.runtime import distributed as d; d.init_process_group(); del os.environ['LOCAL_RANK']; "
        "d.init_process_group(); print('found', os.environ['LOCAL_RANK']); d.close_process_group()"
    )
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    assert "found 0" in run.stdout, run.stderr
