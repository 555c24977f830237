"""What the loop saves and seals: nothing operational shows in the output, and checkpoints come in the right order."""

from __future__ import annotations

import json
import math

import pytest
from tiny_run import Log, context, make_tokens, spec

from model import cost
from stages.base import StopRequested
from stages.pretrain import Pretrain
from stages.runtime import checkpoint
from stages.runtime.checkpoint import CheckpointError, CheckpointStore
from stages.runtime.engine import TrainingEngine
from stages.runtime.loop import FINAL_LOSS_STEPS, TrainState


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"))


def run(directory, tokens, **changes):
    return Pretrain().run(context(directory, tokens, **changes))


def output(directory):
    root = directory / "output.tmp"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def plain_output(tokens, tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    run(directory, tokens)
    return output(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"log_every_steps": 4},
        {"eval_every_steps": 2},
        {"checkpoint_every_steps": 1, "keep_checkpoints": 1},
        {"checkpoint_every_steps": 4},
        {"guards": {"max_skipped_in_a_row": 3}},
        {"activation_checkpointing": True},
        {"max_epochs": 70},
    ],
    ids=str,
)
def test_the_sealed_output_does_not_depend_on_operational_fields(tmp_path, tokens, plain_output, change):
    run(tmp_path, tokens, **change)
    found = output(tmp_path)
    assert found.keys() == plain_output.keys()
    assert [name for name in found if found[name] != plain_output[name]] == []


def test_a_stop_and_a_resume_do_not_show_in_the_sealed_output(tmp_path, tokens, plain_output):  # trap T6
    class Stopping(Log):
        def log(self, event, step, values):
            if (event, step) == ("train", 3):
                (tmp_path / "STOP").touch()

    with pytest.raises(StopRequested):
        run(tmp_path, tokens, tracker=Stopping(), log_every_steps=3)
    run(tmp_path, tokens, log_every_steps=5)
    assert output(tmp_path) == plain_output


def test_what_tells_of_the_course_alone_is_left_out_of_the_sealed_evaluation(plain_output):
    metrics = json.loads(plain_output["evaluation.json"])["metrics"]
    assert metrics.keys() & {"best_bpb", "best_step", "tokens_per_s"} == set()
    assert metrics["bpb"] > 0


def test_the_final_loss_is_the_mean_of_the_applied_steps(tmp_path, tokens):
    log = Log()
    result = run(tmp_path, tokens, tracker=log)
    losses = list(log.of("train", "loss_nats_per_token").values())
    assert len(losses) == 6
    assert result.metrics["final_loss_nats_per_token"] == math.fsum(losses) / 6


def test_the_final_loss_looks_back_over_a_fixed_number_of_steps():
    state = TrainState()
    assert math.isnan(state.final_loss)
    for step in range(FINAL_LOSS_STEPS + 10):
        state.apply(float(step), 3)
    # The mean of 10, 11, ..., 10 + n - 1.
    assert state.final_loss == 10 + (FINAL_LOSS_STEPS - 1) / 2
    assert state.supervised_tokens == 3 * (FINAL_LOSS_STEPS + 10)


def test_metrics_are_flushed_before_a_checkpoint_and_named_after_it(tmp_path, tokens, monkeypatch):  # trap T6
    events = []

    class Telling(Log):
        def flush(self):
            events.append("flush")

        def log_checkpoint(self, step, path):
            events.append(("named", step))

    real = CheckpointStore.save

    def save(self, step, *args, **kwargs):
        events.append(("save", step))
        return real(self, step, *args, **kwargs)

    monkeypatch.setattr(CheckpointStore, "save", save)
    run(tmp_path, tokens, tracker=Telling(), max_steps=2, checkpoint_every_steps=1)
    assert events == ["flush", ("save", 1), ("named", 1), "flush", ("save", 2), ("named", 2)]


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero3"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_begun(tmp_path, tokens, monkeypatch, engine):
    needed = cost.checkpoint_bytes(spec(), zero_stage=int(engine[-1]))
    free = iter([needed, needed - 1])
    monkeypatch.setattr(checkpoint, "_free_bytes", lambda directory: next(free))
    written, real = [], TrainingEngine.save

    def save(self, directory):
        written.append(directory.name)
        real(self, directory)

    monkeypatch.setattr(TrainingEngine, "save", save)
    with pytest.raises(
        CheckpointError, match=f"needs {needed} bytes; {needed - 1} bytes are free; nothing was written"
    ):
        run(tmp_path, tokens, deepspeed=engine, checkpoint_every_steps=2)
    assert written == ["step-00000002.tmp"]
    store = CheckpointStore(tmp_path / "checkpoints", 2)
    assert store.steps() == [2]
    assert store.newest()[0] == 2


def test_a_long_evaluation_says_how_far_it_is_and_a_short_one_nothing(capsys, monkeypatch):
    from stages.runtime import progress

    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    evaluation = progress.EvaluationProgress(200, quiet=False)
    for documents, moment in ((10, 101.0), (50, 106.0), (60, 107.0), (150, 112.0)):
        now[0] = moment
        evaluation.at(documents)
    assert capsys.readouterr().out.splitlines() == [
        "  evaluating: 50 of 200 documents, ETA 18s",  # 6 s for 50, so 18 s for 150
        "  evaluating: 150 of 200 documents, ETA 4s",
    ]
    silent = progress.EvaluationProgress(200, quiet=True)
    now[0] += 100
    silent.at(10)
    assert capsys.readouterr().out == ""


def test_the_share_of_time_spent_waiting_for_data_is_measured_and_said_when_it_matters(monkeypatch):
    from stages.runtime import progress

    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    facts = {"tokens_per_step": 10, "flops_per_token": 1.0, "world_size": 1, "peak": None, "quiet": True}
    told = progress.Progress(max_steps=9, **facts)
    for waited in (0.5, 0.0):
        told.waited(waited)
        now[0] += 2.0
        told.count(2.0)
        figures = told.figures(1)
        assert figures["data_wait_share"] == waited / 2
        assert ("25% waiting for data" in told.line(1, 1.0, 0.1, figures, 0)) is bool(waited)


def test_a_train_row_has_the_share_that_its_steps_waited(tmp_path, tokens):
    log = Log()
    run(tmp_path, tokens, tracker=log, max_steps=2)
    assert all(0 <= share < 1 for share in log.of("train", "data_wait_share").values())
    assert len(log.of("train", "data_wait_share")) == 2
