"""Requests to stop outside the training steps: in evaluations, at the start, in data stages, on other ranks."""

import json
import os
import signal
from pathlib import Path

import pytest
from fake_chain import STAGES, records
from ranks import run_ranks

from pipelines.chain import build_chain
from pipelines.recipe import load_recipe
from stages.base import StopRequested
from stages.runtime.artifact import Job
from stages.runtime.lifecycle import Surroundings, follow


def pretrain_asked_to_stop_in_evaluation(root: Path, which: int, eval_every_steps: int) -> list[tuple]:
    """A run that gets SIGTERM in evaluation number ``which``, after its second hand, then goes on; one that never did.

    Of each life: what it said when it stopped, else its metrics; hands of batches it scored; its evaluations by step.
    """
    from tiny_run import Log, context, make_tokens

    from stages.pretrain import Pretrain
    from stages.runtime import distributed, evaluation, pretraining

    tokens, score = make_tokens(root / "tokens"), evaluation._score
    count = {"evaluations": 0, "hands": 0}

    def scored(forward, batch):
        count["hands"] += 1
        if count["evaluations"] == which and count["hands"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(forward, batch)

    real = pretraining.evaluate

    def counted(*args, **kwargs):
        count["evaluations"] += 1
        count["hands"] = 0
        return real(*args, **kwargs)

    evaluation._score, pretraining.evaluate = scored, counted
    lives = []
    for name in ("asked", "asked", "never"):
        count["evaluations"] = 0 if not lives else 100
        log = Log()
        try:
            changes = {"max_steps": 3, "eval_every_steps": eval_every_steps, "eval_batch_size": 2}
            result = Pretrain().run(context(root / name, tokens, tracker=log, **changes))
            metrics = {key: value for key, value in result.metrics.items() if "per_s" not in key}
            lives.append((metrics, count["hands"], log.of("eval", "bpb")))
        except StopRequested as request:
            lives.append((str(request), count["hands"], log.of("eval", "bpb")))
        distributed.close_process_group()
    return lives


@pytest.fixture(scope="module")
def stopped_in_the_last(tmp_path_factory):
    ((*lives,),) = run_ranks(1, pretrain_asked_to_stop_in_evaluation, tmp_path_factory.mktemp("last"), 1, 0)
    return lives


def test_a_stop_is_honoured_between_two_windows_of_the_final_evaluation(stopped_in_the_last):
    (said, hands, evaluations), _, (_, all_hands, _) = stopped_in_the_last
    assert said == "in an evaluation, asked to stop by SIGTERM"
    assert hands == 2 < all_hands
    assert evaluations == {}


def test_what_was_stopped_in_its_final_evaluation_ends_as_if_it_never_was(stopped_in_the_last):  # trap T6
    _, (again, _, evaluations), (never, _, expected) = stopped_in_the_last
    assert again == never
    assert evaluations == expected


def test_an_evaluation_between_steps_is_broken_off_saved_and_made_up_for(tmp_path):  # trap T6
    ((*lives,),) = run_ranks(1, pretrain_asked_to_stop_in_evaluation, tmp_path, 1, 2)
    (said, hands, none), (again, _, evaluations), (never, _, expected) = lives
    assert (said, hands, none) == ("saved at step 2, asked to stop by SIGTERM", 2, {})
    assert again == never
    assert evaluations == expected
    assert list(expected) == [2, 3]


def asked_before_a_stage_is_imported(root: Path) -> str:
    """A file STOP that lay there before the engine was built; torch is there, no model was made."""
    from tiny_run import context, make_tokens

    from stages.pretrain import Pretrain
    from stages.runtime.pretraining import Pretraining

    Pretraining._open_data = lambda self: pytest.fail("the data was opened")
    (root / "run").mkdir()
    (root / "run" / "STOP").write_text("SIGINT")
    try:
        Pretrain().run(context(root / "run", make_tokens(root / "tokens")))
    except StopRequested as request:
        return str(request)
    return "ran on"


def test_a_stop_during_start_up_is_honoured_on_all_ranks_before_the_data_is_opened(tmp_path):
    (tmp_path / "one").mkdir()
    said = run_ranks(1, asked_before_a_stage_is_imported, tmp_path / "one")
    assert said == ["before the first step of this attempt, asked to stop by SIGINT"]


def test_a_file_stop_before_the_stage_begins_is_honoured_without_importing_it(cli, tmp_path, monkeypatch, capsys):
    real = STAGES["gather"].run

    def asked(self, context):
        train = next(iter((tmp_path / "runs" / "toy").glob("train-*")), None) or directory
        train.mkdir(exist_ok=True)
        (train / "STOP").write_text("SIGUSR1")
        return real(self, context)

    recipe = tmp_path / "toy.yaml"
    assert cli("--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    directory = Path(next(stage["directory"] for stage in plan["stages"] if stage["stage"] == "train"))
    assert recipe.is_file()
    monkeypatch.setattr(STAGES["gather"], "run", asked)
    monkeypatch.setattr(STAGES["train"], "run", lambda *_: pytest.fail("the stage ran"))
    assert cli("--stage", "train") == 85
    assert "train: saved (SIGUSR1)" in capsys.readouterr().out
    assert records(tmp_path)["train"]["state"] == "saved"
    assert not (directory / "STOP").exists()


def test_ctrl_c_saves_a_data_stage(cli, tmp_path, monkeypatch, capsys):
    real = STAGES["gather"].run

    def interrupted(self, context):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, context)

    monkeypatch.setattr(STAGES["gather"], "run", interrupted)
    assert cli("--stage", "gather") == 85
    assert "gather: saved (SIGINT)" in capsys.readouterr().out
    assert records(tmp_path)["gather"]["state"] == "saved"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_rank_that_is_interrupted_prints_no_traceback(cli, tmp_path, monkeypatch, capsys):
    def interrupted(self, context):
        raise KeyboardInterrupt

    assert cli("--stage", "gather") == 0
    recipe = load_recipe(tmp_path / "toy.yaml", [], STAGES)
    job: Job = build_chain(recipe, tmp_path / "runs", STAGES).nodes["train"].job
    job.directory.mkdir()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(STAGES["train"], "run", interrupted)
    capsys.readouterr()
    assert follow(STAGES["train"](), job, Surroundings(tmp_path)) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "interrupted from the keyboard" in err
