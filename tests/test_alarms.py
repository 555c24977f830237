"""Alarms speak on consecutive evidence, once, and touch nothing; sequences and limits are worked out by hand."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from pydantic import ValidationError
from tiny_run import Log, context, make_tokens

from stages.base import StopRequested
from stages.pretrain import Pretrain
from stages.runtime import pretraining
from stages.runtime.alarms import AlarmConfig, Alarms, spike_limit, standard_error, tell


def alarms(score="bpb", better="lower", loss_falls=True, **changes):
    return Alarms(AlarmConfig.model_validate(changes), score=score, better=better, loss_falls=loss_falls)


def told(watching, losses, start=1):
    """(step, kind, raised) of everything that the losses gave reason to say."""
    return [
        (step, alarm.kind, alarm.raised)
        for step, loss in enumerate(losses, start=start)
        for alarm in watching.after_step(step, loss)
    ]


def chained(windows):
    return list(itertools.chain.from_iterable(windows))


def evaluated(watching, *values, **more):
    found = []
    for step, value in enumerate(values):
        row = value if isinstance(value, dict) else {watching.score: value}
        found += [(step, alarm.metric, alarm.raised) for alarm in watching.after_evaluation(step, row)]
    return found


SPIKES = {"spike_window_steps": 8, "spike_steps": 3, "plateau_windows": None}
LINE = [2.0, 2.2, 1.8, 2.1, 1.9, 2.3, 1.7, 2.0]
"""Median 2; deviations 0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, so their median is 0.15; the limit is 3.33434."""


def test_the_limit_of_a_spike_is_the_median_and_six_robust_deviations():
    assert spike_limit(LINE, 6.0) == pytest.approx(2 + 6 * 1.4826 * 0.15)
    assert spike_limit([3.0] * 8, 6.0) == pytest.approx(3.003), "equal losses leave a thousandth"


def test_a_spike_is_called_at_the_third_step_in_a_row_and_cleared_once():
    assert told(alarms(**SPIKES), [*LINE, 3.4, 3.4, 3.4, 3.4, 2.0, 2.0]) == [(11, "spike", True), (13, "spike", False)]


@pytest.mark.parametrize("losses", [[3.4, 3.4, 2.0, 3.4, 3.4], [3.33] * 20, [9.0]])
def test_steps_that_are_not_in_a_row_or_within_the_limit_are_no_spike(losses):
    assert told(alarms(**SPIKES), [*LINE, *losses]) == []


def test_no_spike_is_called_before_half_a_window_was_seen():
    assert told(alarms(**SPIKES), [2.0, 50.0, 50.0, 50.0]) == []


def test_what_is_out_of_line_does_not_become_the_line_until_it_lasted_a_window():
    watching = alarms(**SPIKES)
    said = told(watching, [*LINE, *[4.0] * 8, *[4.0] * 20])
    assert said == [(11, "spike", True), (16, "spike", False)]
    assert told(watching, [4.0] * 10, start=50) == []


def test_a_noisy_falling_loss_raises_nothing():
    drawn = random.Random(7)
    losses = [2 + 6 * 0.999**step + drawn.gauss(0, 0.1) for step in range(3000)]
    assert told(alarms(plateau_window_steps=100, plateau_windows=None), losses) == []


FLAT = {"plateau_window_steps": 4, "plateau_windows": 2, "plateau_min_improvement": 0.01, "spike_deviations": None}


def test_a_plateau_is_called_after_windows_in_a_row_and_cleared_by_an_improvement():
    # Means 4, 3, 2.99 (no hundredth better), 3, then 2.5; equal losses within a window have no noise.
    windows = [[mean] * 4 for mean in (4.0, 3.0, 2.99, 3.0, 2.5)]
    assert told(alarms(**FLAT), chained(windows)) == [(16, "plateau", True), (20, "plateau", False)]


def test_an_improvement_within_the_noise_of_both_windows_is_none():  # trap M6
    # Means 3 and 2.8; standard errors 0.5774 and 0.5774, so 1.96 times their root sum of squares is 1.6.
    assert standard_error([2.0, 4.0, 2.0, 4.0]) == pytest.approx(1 / 3**0.5)
    noisy = [[mean - 1, mean + 1] * 2 for mean in (3.0, 2.8, 2.8)]
    assert told(alarms(**FLAT), chained(noisy)) == [(12, "plateau", True)]


def test_slow_improvement_adds_up_against_the_best_window():
    # Each window is 0.6% better than the one before: every second one is a hundredth below the best.
    losses = chained([3.0 * 0.994**number] * 4 for number in range(20))
    assert told(alarms(**FLAT), losses) == []


@pytest.mark.parametrize(
    "off", [{"spike_deviations": None}, {"plateau_windows": None}, {"regression_evaluations": None}], ids=str
)
def test_an_alarm_that_is_switched_off_stays_silent(off):
    watching = alarms(**{**FLAT, "spike_deviations": 6.0, "spike_window_steps": 8} | off)
    kinds = {kind for _, kind, _ in told(watching, [*LINE, *[9.0] * 60])}
    assert kinds == {"spike", "plateau"} - {"spike" for name in off if "spike" in name} - {
        "plateau" for name in off if "plateau" in name
    }
    assert bool(evaluated(watching, 1.0, 2.0, 2.0, 2.0, 2.0)) is ("regression_evaluations" not in off)


def test_the_loss_of_a_policy_gradient_is_not_watched():
    watching = alarms(loss_falls=False, **FLAT)
    assert told(watching, [*LINE, *[9.0] * 60]) == []


def test_a_regression_needs_three_evaluations_in_a_row_and_is_held_against_the_best():
    assert evaluated(alarms(), 1.5, 1.4, 1.42, 1.43, 1.44, 1.45, 1.41) == [(4, "bpb", True), (6, "bpb", False)]
    assert evaluated(alarms(), 1.5, 1.4, 1.42, 1.43, 1.41, 1.42, 1.43, 1.4) == []


def test_what_starts_worse_than_its_parent_is_a_regression_too():
    assert evaluated(alarms(), 1.0, 1.1, 1.09, 1.08) == [(3, "bpb", True)]


def test_a_slow_slide_is_seen_because_the_best_stays_what_it_was():
    # Never half a hundredth from one to the next, but always further from the best.
    assert evaluated(alarms(), *[1.0 * 1.004**number for number in range(7)]) == [(5, "bpb", True)]


def test_a_group_that_gets_worse_is_named_while_the_whole_improves():  # trap M8
    rows = [{"bpb": 1.5 - 0.1 * n, "bpb/de": 1.0 + 0.05 * n, "bpb/en": 1.0, "bpb_xz/de": 1.0 + n} for n in range(4)]
    assert evaluated(alarms(), *rows) == [(3, "bpb/de", True)]


def test_a_score_is_worse_only_where_its_interval_leaves_no_doubt():  # trap M6
    def row(value, width):
        return {
            "accuracy": value,
            "accuracy_low": value - width,
            "accuracy_high": value + width,
            "accuracy/sums": value,
        }

    wide, narrow = [row(0.8, 0.05), *[row(0.76, 0.05)] * 5], [row(0.8, 0.01), *[row(0.76, 0.01)] * 5]
    assert evaluated(alarms("accuracy", "higher"), *wide) == []
    # The group has no interval of its own and is left out.
    assert evaluated(alarms("accuracy", "higher"), *narrow) == [(3, "accuracy", True)]


def test_a_score_that_is_not_finite_is_worse_than_any():
    assert evaluated(alarms(), 1.0, *[float("nan")] * 3) == [(3, "bpb", True)]


def test_what_is_remembered_survives_a_checkpoint_at_any_moment():  # trap T6
    drawn = random.Random(3)
    losses = [3 + drawn.gauss(0, 0.1) + (5 if 40 < step < 60 else 0) for step in range(100)]
    changes = {**SPIKES, "plateau_windows": 2, "plateau_window_steps": 10}
    whole = told(alarms(**changes), losses)
    assert {kind for _, kind, _ in whole} == {"spike", "plateau"}
    for stop in range(1, 100, 7):
        first, second = alarms(**changes), alarms(**changes)
        said = told(first, losses[:stop])
        second.restore(json.loads(json.dumps(first.state())))
        assert said + told(second, losses[stop:], start=stop + 1) == whole
        assert second.raised == sum(raised for *_, raised in whole)
    untouched = alarms(**changes)
    untouched.restore({})
    assert untouched.state() == alarms(**changes).state()


def test_alarms_of_one_moment_are_one_row_and_only_a_raised_one_notifies():
    class Watched(Log):
        def notify(self, text):
            self.log("notified", 0, {"text": text})

        def say(self, text):
            self.log("said", 0, {"text": text})

    log, watching = Watched(), alarms(regression_evaluations=1)
    evaluated(watching, {"bpb": 1.0, "bpb/de": 1.0})
    for step, de in ((1, 2.0), (2, 1.0)):
        found = watching.after_evaluation(step, {"bpb": 1.0, "bpb/de": de})
        tell(found, watching, event="alarm_heldout", step=step, tracker=log, progress=log)
    rows = [row for row in log.rows if row["event"] == "alarm_heldout"]
    assert [(row["step"], row["raised"], row["cleared"], row["standing"]) for row in rows] == [
        (1, "regression bpb/de", "", "regression bpb/de"),
        (2, "", "regression bpb/de", ""),
    ]
    assert [row["text"].split()[0] for row in log.rows if row["event"] == "said"] == ["ALARM", "alarm"]
    assert len([row for row in log.rows if row["event"] == "notified"]) == 1


@pytest.mark.parametrize("wrong", [{"spike_steps": 0}, {"spike_window_steps": 7}, {"regression_tolerance": -1.0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        alarms(**wrong)


def test_the_status_shows_what_stands_and_not_what_is_over(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    (metrics,) = tmp_path.glob("runs/toy/train-*/metrics.jsonl")
    rows = [
        {"event": "alarm_heldout", "step": 2, "time": "2026-01-01T00:00:02", "standing": "regression bpb/de"},
        {"event": "alarm_loss", "step": 3, "time": "2026-01-01T00:00:03", "standing": "spike loss, regression bpb/de"},
    ]
    for standing in ("spike loss, regression bpb/de", ""):
        with metrics.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        capsys.readouterr()
        assert cli("--status") == 0
        shown = capsys.readouterr().out
        assert ("ALARM: spike loss, regression bpb/de" in shown) is bool(standing)
        rows = [{"event": "alarm_heldout", "step": 4, "time": "2026-01-01T00:00:04", "standing": ""}]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"))


WORSE = {
    "eval_every_steps": 1,
    "alarms": {"regression_evaluations": 2, "plateau_windows": 1, "plateau_window_steps": 4},
    "max_steps": 8,
}


@pytest.fixture
def worsening(monkeypatch):
    """Held-out scores that rise from the third evaluation on, without touching the model."""
    real, count = pretraining.evaluate, [0]

    def evaluate(*args, **kwargs):
        result = real(*args, **kwargs)
        count[0] += 1
        nats = {name: value * (1 + max(0, count[0] - 2)) for name, value in result.nats.items()}
        return type(result)(**{**vars(result), "nats": nats})

    monkeypatch.setattr(pretraining, "evaluate", evaluate)
    return count


def test_a_run_tells_of_a_regression_and_its_record_counts_it(tmp_path, tokens, worsening):
    log = Log()
    result = Pretrain().run(context(tmp_path, tokens, tracker=log, lr=1e-9, **WORSE))
    found = log.of("alarm_heldout", "raised")
    assert found == {4: "regression bpb, regression bpb/de, regression bpb/en"}
    assert log.of("alarm_loss", "raised") == {8: "plateau loss"}, "nothing is learnt at this rate"
    assert result.metrics["alarms"] == 4
    assert "alarms" not in json.loads((tmp_path / "output.tmp" / "evaluation.json").read_text())["metrics"]


def test_a_stopped_run_tells_after_its_resume_what_the_uninterrupted_one_does(tmp_path, tokens, worsening):  # trap T6
    whole, parts = Log(), []
    Pretrain().run(context(tmp_path / "whole", tokens, tracker=whole, lr=1e-9, **WORSE))
    worsening[0] = 0

    class Stopping(Log):
        def log(self, event, step, values):
            super().log(event, step, values)
            if (event, step) == ("train", 3) and not parts:
                (tmp_path / "parts" / "STOP").touch()

    stopped, resumed = Stopping(), Log()
    with pytest.raises(StopRequested):
        Pretrain().run(context(tmp_path / "parts", tokens, tracker=stopped, lr=1e-9, **WORSE))
    parts.append(stopped)
    Pretrain().run(context(tmp_path / "parts", tokens, tracker=resumed, lr=1e-9, **WORSE))
    for event in ("alarm_loss", "alarm_heldout"):
        assert stopped.of(event, "text") | resumed.of(event, "text") == whole.of(event, "text") != {}


def test_alarms_and_evaluations_leave_the_weights_bit_for_bit_alone(tmp_path, tokens, worsening):
    without = {"regression_evaluations": None, "plateau_windows": None, "spike_deviations": None}
    Pretrain().run(context(tmp_path / "with", tokens, **WORSE))
    Pretrain().run(context(tmp_path / "without", tokens, max_steps=8, alarms=without))
    one, other = ((tmp_path / name / "output.tmp" / "model.safetensors").read_bytes() for name in ("with", "without"))
    assert one == other


def make_finished(directory, tokens, **changes):
    """A finished pretrain artifact, as the lifecycle leaves it."""
    from stages.runtime.artifact import write_record
    from stages.runtime.checkpoint import seal

    at = context(directory, tokens, **changes)
    result = Pretrain().run(at)
    seal(directory / "output.tmp", directory / "output")
    config = at.config.model_dump(mode="json", by_alias=True)
    write_record(directory, {"format": 1, "state": "done", "metrics": result.metrics, "config": config})
    return directory


def test_a_warm_start_is_held_against_what_its_parent_measured(tmp_path, tokens):
    parent, trusted, doubted = make_finished(tmp_path / "parent", tokens), Log(), Log()
    warm = {"parent": parent, "lr": 1e-5, "max_steps": 2}
    Pretrain().run(context(tmp_path / "child", tokens, tracker=trusted, **warm))
    record = json.loads((parent / "stage.json").read_text())
    assert trusted.of("eval", "bpb")[0] == pytest.approx(record["metrics"]["bpb"], rel=1e-6), "the step-0 baseline"
    assert trusted.of("alert", "text") == {}
    record["metrics"]["bpb"] *= 1.01
    (parent / "stage.json").write_text(json.dumps(record))
    Pretrain().run(context(tmp_path / "other", tokens, tracker=doubted, **warm))
    assert "on the same held-out set" in doubted.of("alert", "text")[0]
    # Windows of another length give every token another context: nothing can be said.
    silent = Log()
    Pretrain().run(context(tmp_path / "short", tokens, tracker=silent, seq_len=16, **warm))
    assert silent.of("alert", "text") == {}
