"""A longer run of something finished: until it is finished itself, what was there stays, is told and is read."""

import json
import subprocess
import sys

import pytest
from fake_chain import FAKE_RUN, RECIPE, STAGES, records, write_recipe

from pipelines.chain import build_chain
from pipelines.chat_choice import _artifact
from pipelines.recipe import load_recipe
from pipelines.report_read import read_stage
from stages.base import ConfigError
from stages.runtime.artifact import finished_of, read_record, write_record
from stages.runtime.manifest import verify_manifest
from stages.runtime.warm_start import parent_metrics

LONGER = ("--set", "train.max_steps=600")


def trained(tmp_path):
    return next((tmp_path / "runs" / "toy").glob("train-*"))


def checkpoint(tmp_path, step):
    folder = trained(tmp_path) / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


@pytest.fixture
def told(cli, capsys):
    """What `--status` or `--plan` say of each stage of the recipe."""

    def tell(what, *argv):
        capsys.readouterr()
        assert cli(what, "--json", *argv) == 0
        found = json.loads(capsys.readouterr().out)
        entries = found["stages"] if what == "--plan" else [entry for entry in found if entry["current"]]
        return {entry["stage"]: entry for entry in entries}

    return tell


@pytest.fixture
def failed(cli, tmp_path):
    """A run of 300 steps, finished, and one of 600 that extends it and failed after its checkpoint of step 450."""
    assert cli("--stage", "train") == 0
    checkpoint(tmp_path, 450)
    assert cli("--stage", "train", *LONGER, "--set", "train.ending=error") == 1
    return trained(tmp_path)


STORY = "finished at step 300, which stays; extension (max_steps 300 -> 600) "
WAY = "; --set train.max_steps=600 goes on with it"


def test_a_failed_extension_is_told_beside_what_is_finished(failed, told):
    note = f"{STORY}failed at step 450: RuntimeError: the sum is not finite{WAY}"
    plain = told("--status")["train"]
    assert (plain["state"], plain["step"], plain["max_steps"], plain["note"]) == ("done", 300, 300, note)
    longer = told("--status", *LONGER)["train"]
    assert (longer["state"], longer["max_steps"], longer["note"]) == ("failed", 600, note)
    assert [told("--plan", *argv)["train"]["state"] for argv in ((), LONGER)] == ["done", "failed"]
    assert told("--plan")["train"]["reasons"] == told("--plan", *LONGER)["train"]["reasons"] == [note]


def test_a_failed_extension_is_told_among_the_variants_of_another_recipe(failed, cli, capsys):
    capsys.readouterr()
    assert cli("--status", "--json", "--set", "train.lr=1e-3") == 0
    (variant,) = [entry for entry in json.loads(capsys.readouterr().out) if entry["directory"] == str(failed)]
    assert (variant["current"], variant["state"]) == (False, "failed")
    assert variant["note"].startswith(f"{STORY}failed at step 450: ")


def test_the_figures_of_what_is_finished_are_its_own_not_those_of_the_longer_run(failed, told):
    record = read_record(failed)
    finished = {**record["finished"], "metrics": {"final_loss_nats_per_token": 2.5, "bpb": 1.25, "tokens_per_s": 7.0}}
    write_record(failed, {**record, "finished": finished})
    plain, longer = told("--status")["train"], told("--status", *LONGER)["train"]
    assert (plain["loss"], plain["bpb"], plain["tokens_per_s"]) == (2.5, 1.25, 7.0)
    assert (longer["loss"], longer["step"]) == (1.5, 600)


@pytest.mark.parametrize(("ending", "code"), [("saved", 85), ("error", 1), ("kill", -9)])
def test_children_read_what_is_finished_until_the_longer_run_is(cli, tmp_path, told, capsys, ending, code):
    assert cli("--stage", "train") == 0
    finished = read_record(trained(tmp_path))
    # Killed for good in a process of its own.
    argv = ["--pipeline", str(write_recipe(tmp_path)), "--runs", str(tmp_path / "runs"), "--stage", "train", *LONGER]
    argv = [sys.executable, str(FAKE_RUN), *argv, "--set", f"train.ending={ending}"]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == code
    assert verify_manifest(trained(tmp_path) / "output") == finished["output_digest"]
    assert told("--plan", *LONGER)["train"]["state"] == {85: "saved", 1: "failed", -9: "interrupted"}[code]
    assert told("--plan")["train"]["reasons"][0].startswith(STORY)
    assert cli("--stage", "tuned") == 0
    child = records(tmp_path)["tuned"]
    assert child["parents"]["from_"]["digest"] == finished["output_digest"]
    attempts = read_record(trained(tmp_path))["attempts"]
    assert cli("--stage", "train") == 0
    assert read_record(trained(tmp_path))["attempts"] == attempts, "what is finished is not run again"
    capsys.readouterr()
    assert cli("--plan", *LONGER) == 0
    assert (
        f"extending train (max_steps 300 -> 600) replaces the output that {child['stage']}-" in capsys.readouterr().out
    )
    # The longer run takes the place, and only then.
    assert cli("--stage", "train", *LONGER) == 0
    record = read_record(trained(tmp_path))
    assert (record["state"], record["extension"], record["finished"]) == ("done", {"max_steps": 600}, None)
    assert (trained(tmp_path) / "output" / "weights.txt").read_text() == "hello 600"
    assert told("--plan")["train"]["state"] == "longer"


def test_a_recipe_elsewhere_and_the_chat_read_it_by_its_path(failed, cli, tmp_path):
    digest = read_record(failed)["finished"]["output_digest"]
    assert cli("--stage", "tuned", text=RECIPE.replace("from: train", f"from: {failed}")) == 0
    assert records(tmp_path)["tuned"]["parents"]["from_"]["lineage"] == digest
    # What the toy makes is no model to talk to: the state is no longer what it is refused for.
    with pytest.raises(ConfigError, match=r"without config\.json"):
        _artifact(failed)


def test_the_report_and_a_warm_start_take_the_finished_runs_figures(failed, tmp_path):
    chain = build_chain(load_recipe(write_recipe(tmp_path), [], STAGES), tmp_path / "runs", STAGES)
    longer = build_chain(load_recipe(write_recipe(tmp_path), [LONGER[1]], STAGES), tmp_path / "runs", STAGES)
    steps = [read_stage(one.nodes["train"]).record["config"]["max_steps"] for one in (chain, longer)]
    assert steps == [300, 600]
    assert parent_metrics(failed) == {"step": 300, "loss": 1.5}


def test_a_longer_run_that_failed_twice_still_keeps_what_is_finished(failed, cli):
    first = read_record(failed)["finished"]
    assert cli("--stage", "train", *LONGER, "--set", "train.ending=memory") == 1
    record = read_record(failed)
    assert (record["attempts"], record["finished"]) == (3, first)
    assert first["finished"] is None


def test_killed_between_its_output_and_its_record_the_longer_run_has_taken_the_place(failed, cli, told):
    """The moment in which the new output lies there while the record still has the old one."""
    kept = read_record(failed)["finished"]
    assert cli("--stage", "train", *LONGER) == 0
    done = read_record(failed)
    write_record(failed, {**done, "state": "running", "finished": kept, "output_digest": None, "pid_started": "1"})
    assert finished_of(read_record(failed), failed) is None
    assert told("--plan")["train"]["state"] == "longer"
    assert cli("--stage", "tuned") == 2
    assert told("--plan", *LONGER)["train"]["state"] == "interrupted"
    assert cli("--stage", "train", *LONGER) == 0
    assert read_record(failed)["output_digest"] == done["output_digest"]


def test_an_output_that_is_gone_or_changed_is_not_finished_while_a_longer_run_is_under_way(failed, cli):
    (failed / "output").rename(failed / "elsewhere")
    assert finished_of(read_record(failed), failed) is None
    (failed / "elsewhere").rename(failed / "output")
    (failed / "output" / "weights.txt").write_text("hello 301")
    assert cli("--stage", "tuned") == 1, "every byte of a parent is checked"


def test_fewer_steps_than_are_finished_are_refused_however_far_back_the_longer_run_began(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    checkpoint(tmp_path, 150)
    assert cli("--stage", "train", *LONGER, "--set", "train.ending=error") == 1
    capsys.readouterr()
    assert cli("--stage", "train", "--set", "train.max_steps=200") == 2
    assert "must be at least 300" in capsys.readouterr().err


def test_a_run_that_extends_nothing_has_nothing_beside_it(cli, tmp_path, told):
    assert cli("--stage", "train", "--set", "train.ending=error") == 1
    assert read_record(trained(tmp_path))["finished"] is None
    assert told("--plan")["train"]["reasons"] == ["failed: RuntimeError: the sum is not finite"]
