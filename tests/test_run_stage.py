"""`--stage`: exit codes, output, what is left in `stage.json`, two runs at once."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fake_chain import FAKE_RUN, STAGES, records, write_recipe

from stages.runtime.artifact import canonical_digest
from stages.runtime.lock import hold
from stages.runtime.manifest import verify_manifest


def test_a_stage_runs_after_the_data_stages_that_it_needs_and_a_second_time_says_done(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    assert {name: record["state"] for name, record in records(tmp_path).items()} == {"gather": "done", "train": "done"}
    assert "trained" in capsys.readouterr().out
    assert cli("--stage", "train") == 0
    assert "already done" in capsys.readouterr().out
    assert records(tmp_path)["train"]["attempts"] == 1


def test_the_record_holds_what_the_contract_promises(cli, tmp_path):
    assert cli("--stage", "train") == 0
    found = records(tmp_path)
    train, gather = found["train"], found["gather"]
    assert canonical_digest(train["identity"]) == train["key"]
    assert train["parents"]["data"]["digest"] == gather["output_digest"]
    directory = next((tmp_path / "runs" / "toy").glob("train-*"))
    assert verify_manifest(directory / "output") == train["output_digest"]
    assert train["extension"] == {"max_steps": 300}
    assert train["config"]["lr"] == 2e-4
    assert train["config"]["from"] is None
    assert train["model"]["d_model"] == 64
    assert (train["seed"], train["step"], train["world_size"], train["attempts"]) == (17, 300, 1, 1)
    assert train["metrics"] == {"step": 300, "loss": 1.5}
    assert train["started_at"].endswith("+00:00")
    assert train["pid"] == os.getpid()
    assert {"commit", "dirty"} <= train["git"].keys()
    assert "torch" in train["versions"]
    assert train["hardware"]["memory_bytes"] > 1 << 28
    assert "trained" in (directory / "log.txt").read_text()
    assert not list(directory.glob("*.tmp"))


@pytest.mark.parametrize(
    ("ending", "code", "state", "words", "traceback"),
    [
        ("saved", 85, "saved", "saved (SIGTERM)", False),
        ("error", 1, "failed", "RuntimeError: the sum is not finite", True),
        ("fault", 2, "failed", "train.lr: must be lower", False),
        # What a library raises is no fault of the user's: by its class alone it could be either.
        ("value", 1, "failed", "ValueError: lr must be lower", True),
        ("data", 2, "failed", "train.lr: must fit the text; got more; set less", False),
        ("fetch", 1, "failed", "train failed: package a==1 could not be downloaded; check the network", False),
        ("memory", 1, "failed", "out of memory", False),
        ("disk", 1, "failed", "no space left on the disk", False),
    ],
)
def test_each_ending_has_its_exit_code_state_and_line(cli, tmp_path, capsys, ending, code, state, words, traceback):
    assert cli("--stage", "train", "--set", f"train.ending={ending}") == code
    captured = capsys.readouterr()
    assert words in captured.out + captured.err
    assert ("Traceback" in captured.err) == traceback
    record = records(tmp_path)["train"]
    assert record["state"] == state
    assert record["error"] is None or "\n" not in record["error"]
    log = next((tmp_path / "runs" / "toy").glob("train-*/log.txt")).read_text()
    assert ("Traceback" in log) == (ending not in ("saved", "fault", "data"))
    # The ending is operational, so the same artifact goes on and ends well.
    assert cli("--stage", "train") == 0
    assert records(tmp_path)["train"]["attempts"] == 2
    assert records(tmp_path)["train"]["error"] is None


@pytest.mark.parametrize("refusal", ["fault", "data"])
def test_a_refused_restart_leaves_what_was_saved_as_it_was(cli, tmp_path, capsys, refusal):
    assert cli("--stage", "train", "--set", "train.ending=saved") == 85
    train = next((tmp_path / "runs" / "toy").glob("train-*"))
    (train / "checkpoints" / "step-00000007").mkdir(parents=True)
    (train / "checkpoints" / "step-00000007" / "manifest.json").touch()
    assert cli("--stage", "train", "--set", "train.ending=saved") == 85
    before = records(tmp_path)["train"]
    assert cli("--stage", "train", "--set", f"train.ending={refusal}") == 2
    assert "train.lr: must" in capsys.readouterr().err
    after = records(tmp_path)["train"]
    assert (after["state"], after["step"], after["error"]) == ("saved", 7, None)
    assert {**after, "updated_at": None} == {**before, "updated_at": None}
    assert cli("--plan") == 0
    assert "saved at step 7" in capsys.readouterr().out


def test_a_start_names_the_newest_checkpoint_and_promises_nothing_of_it(cli, tmp_path, capsys):
    assert cli("--stage", "train", "--set", "train.ending=saved") == 85
    assert "checkpoint" not in capsys.readouterr().out
    train = next((tmp_path / "runs" / "toy").glob("train-*"))
    (train / "checkpoints" / "step-00000011").mkdir(parents=True)
    (train / "checkpoints" / "step-00000011" / "manifest.json").touch()
    assert cli("--stage", "train", "--set", "train.ending=saved") == 85
    assert "(attempt 2, newest checkpoint: step 11)" in capsys.readouterr().out


def test_a_refused_extension_leaves_the_finished_run_done(cli, tmp_path):
    assert cli("--stage", "train") == 0
    assert cli("--stage", "train", "--set", "train.max_steps=400", "--set", "train.ending=fault") == 2
    assert records(tmp_path)["train"]["state"] == "done"
    assert cli("--stage", "train") == 0
    assert records(tmp_path)["train"]["attempts"] == 1


def test_a_secret_that_a_stage_tells_is_nowhere_in_its_artifact_nor_on_the_console(
    cli, tmp_path, capsys, monkeypatch
):  # trap O6
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-of-the-hub")
    assert cli("--stage", "train", "--set", "train.ending=secret") == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    written = {path: path.read_text() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert {path.name for path, text in written.items() if "401 for token=" in text} >= {"stage.json", "log.txt"}
    for text in (captured.out, captured.err, *written.values()):
        assert "s3cr3t" not in text
        assert "pw1234" not in text


def test_a_data_stage_takes_sigterm_as_a_request_to_stop(cli, tmp_path):
    assert cli("--stage", "gather", "--set", "gather.ending=sigterm") == 85
    assert records(tmp_path)["gather"]["state"] == "saved"
    assert cli("--stage", "gather") == 0


def test_a_failing_data_stage_ends_the_stage_that_needs_it(cli, tmp_path):
    assert cli("--stage", "train", "--set", "gather.ending=error") == 1
    assert set(records(tmp_path)) == {"gather"}


def test_a_training_ancestor_is_never_trained_on_the_side(cli, tmp_path, capsys):
    assert cli("--stage", "tuned", "--set", "train.lr=1e-3") == 2
    line = capsys.readouterr().err
    assert "tuned.from: must be a finished stage; got train, stale (never run); run: deepspeed " in line
    assert "--stage train" in line
    assert "--set train.lr=1e-3" in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert cli("--stage", "train") == 0
    assert cli("--stage", "tuned", "--set", "train.lr=1e-3") == 2
    assert "train.lr 2e-4 -> 1e-3" in capsys.readouterr().err
    assert cli("--stage", "tuned") == 0


def test_a_parent_that_does_not_fit_is_refused_before_the_run(cli, tmp_path, capsys):  # trap K10
    assert cli("--stage", "train", "--set", "gather.sources.0.text=poison") == 2
    assert "train.data: must hold no poison" in capsys.readouterr().err
    assert records(tmp_path)["train"]["state"] == "failed"


def test_a_parent_whose_bytes_changed_is_refused(cli, tmp_path, capsys):  # trap O2
    assert cli("--stage", "gather") == 0
    next((tmp_path / "runs" / "toy").glob("gather-*/output/text.txt")).write_text("HELLO")
    assert cli("--stage", "train") == 1
    assert "text.txt has another SHA-256" in capsys.readouterr().err


def test_a_run_with_checkpoints_does_not_go_on_from_other_data(cli, tmp_path, capsys):  # trap T6
    assert cli("--stage", "train", "--set", "train.ending=saved") == 85
    train = next((tmp_path / "runs" / "toy").glob("train-*"))
    (train / "checkpoints" / "step-00000007").mkdir(parents=True)
    (train / "checkpoints" / "step-00000007" / "manifest.json").touch()
    gather = next((tmp_path / "runs" / "toy").glob("gather-*"))
    (gather / "stage.json").unlink()
    real = STAGES["gather"].run

    def other(self, context):
        result = real(self, context)
        (context.output / "more.txt").write_text("more")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STAGES["gather"], "run", other)
        assert cli("--stage", "train") == 2
    assert "train.data: must be the artifact that this run began with" in capsys.readouterr().err


def test_what_a_stage_goes_on_from_is_kept_until_it_is_done(cli, tmp_path):
    assert cli("--stage", "gather", "--set", "gather.ending=saved") == 85
    gather = next((tmp_path / "runs" / "toy").glob("gather-*"))
    (gather / "work" / "halfway").touch()
    assert cli("--stage", "gather", "--set", "gather.ending=error") == 1
    assert (gather / "work" / "halfway").exists()
    assert cli("--stage", "gather") == 0
    assert not (gather / "work").exists()
    assert cli("--stage", "train") == 0
    assert not list((tmp_path / "runs" / "toy").glob("train-*/work"))


@pytest.mark.parametrize("fault", [RuntimeError("no\ncharts"), SystemExit(3), None])
def test_a_fault_of_the_report_changes_no_exit_code(cli, tmp_path, capsys, monkeypatch, fault):
    def refresh_report(chain):
        if fault is not None:
            raise fault
        return tmp_path / "runs" / chain.recipe.name / "report" / "index.html", True

    assert cli("--stage", "tuned") == 2
    assert [cli("--stage", name) for name in ("train", "tuned")] == [0, 0]
    monkeypatch.setitem(sys.modules, "pipelines.report", SimpleNamespace(refresh_report=refresh_report))
    capsys.readouterr()
    assert cli("--all") == 0
    said = capsys.readouterr()
    if fault is None:
        assert f"report: {tmp_path / 'runs' / 'toy' / 'report' / 'index.html'}" in said.out
    else:
        (line,) = said.err.splitlines()
        assert line.startswith(f"the report could not be written: {type(fault).__name__}")


def test_two_runs_of_one_artifact_refuse_each_other(cli, tmp_path, capsys):
    assert cli("--stage", "gather", "--set", "gather.ending=saved") == 85
    directory = next((tmp_path / "runs" / "toy").glob("gather-*"))
    with hold(directory):
        assert cli("--stage", "gather") == 1
    assert f"is being worked on by process {os.getpid()} on " in capsys.readouterr().err
    assert records(tmp_path)["gather"]["state"] == "saved", "the refused run must not touch the record"
    assert cli("--stage", "gather") == 0


def test_a_killed_run_is_interrupted_and_its_lock_is_gone(cli, tmp_path, capsys):  # trap O1
    recipe = write_recipe(tmp_path)
    argv = ["--stage", "gather", "--pipeline", str(recipe), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, str(FAKE_RUN), *argv, "--set", "gather.ending=kill"], capture_output=True, check=False
    )
    assert done.returncode == -9
    assert records(tmp_path)["gather"]["state"] == "running"
    assert cli("--status") == 0
    assert "interrupted" in capsys.readouterr().out
    assert cli("--stage", "gather") == 0
