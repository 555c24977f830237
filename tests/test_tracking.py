"""W&B is a copy that may fail and never ends a run; secrets go nowhere (TRAPS O5, O6)."""

import base64
import hashlib
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tracked_run import KEY, run_child, sealed, tracker_in

from stages.base import StopRequested
from stages.runtime import journal, mirror
from stages.runtime.journal import read_metrics

FULL_RUN = """
import sys
from pathlib import Path
from stages.runtime.tracking import open_tracker
directory, steps = Path(sys.argv[1]), [int(step) for step in sys.argv[2].split(",")]
tracker = open_tracker(
    directory, pipeline="demo", stage="pretrain-b", kind="pretrain", key="ab12cd34" * 8, mode="offline",
    config={"lr": 0.002, "api_key": sys.argv[3], "note": "uses " + sys.argv[3], "eos_token": "<|endoftext|>"},
)
if steps[0] > 1:
    tracker.resume(steps[0] - 1)
for step in steps:
    tracker.log("train", step, {"loss": 1 / step, "origin": "harmless-marker"})
    tracker.log("eval", step, {"bpb": 2 / step, "heldout_hash": "9f", "note": "with " + sys.argv[3]})
tracker.alert("cannot reach https://user:" + sys.argv[3] + "@host/x")
tracker.use_artifact("tokenize-11223344", directory.parent / "tokenize-11223344" / "output", sys.argv[4])
tracker.log_artifact("pretrain-b-ab12cd34", "model", directory / "output", sys.argv[5], {"step": steps[-1]})
tracker.finish(sys.argv[6])
"""
SECRETS = {
    "WANDB_API_KEY": "f00dfeed" * 5,
    "HF_TOKEN": "hf_" + "Zq7" * 11,
    "PEDIGREE_PLANTED_SECRET": "correct-horse-battery",
}


def records(directory):
    """Every record of every W&B fragment below `directory`, a list a fragment, oldest first."""
    fragments = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        lines = subprocess.run(
            [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", path],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        fragments.append([json.loads(line) for line in lines])
    return fragments


def of_type(fragment, kind):
    return [record[kind] for record in fragment if record["type"] == kind]


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """A run of three steps that was saved, and its continuation that was done, with secrets all around it."""
    runs = tmp_path_factory.mktemp("runs") / "demo"
    directory = runs / "pretrain-b-ab12cd34"
    taken, made = sealed(runs / "tokenize-11223344" / "output"), sealed(directory / "output")
    home = tmp_path_factory.mktemp("home")
    for steps, state in (("1,2,3", "saved"), ("3,4", "done")):
        arguments = (str(directory), steps, SECRETS["PEDIGREE_PLANTED_SECRET"], taken, made, state)
        child = run_child(FULL_RUN, *arguments, HOME=str(home), **SECRETS)
        assert "wandb" not in (child.stdout + child.stderr).lower()
    return types.SimpleNamespace(directory=directory, taken=taken, made=made, home=home, fragments=records(directory))


def test_fragments_of_a_stage_are_one_run_with_group_and_job_type(offline_run):
    first, second = (of_type(fragment, "run")[0] for fragment in offline_run.fragments)
    assert first["run_group"] == second["run_group"] == "demo"
    assert first["job_type"] == second["job_type"] == "pretrain"
    assert first["run_id"] == second["run_id"]
    assert first["display_name"] == "pretrain-b-ab12cd34"
    assert second["resume"] is True


def test_each_event_has_its_own_step_axis_and_no_row_is_lost(offline_run):
    for fragment, steps in zip(offline_run.fragments, ([1, 2, 3], [3, 4]), strict=True):
        axes = {
            metric["glob_name"]: metric["step_metric"]
            for metric in of_type(fragment, "metric")
            if "glob_name" in metric
        }
        assert axes["train/*"] == "train/step"
        assert axes["eval/*"] == "eval/step"
        rows = [row["item"] for row in of_type(fragment, "history")]
        assert [row["train/step"] for row in rows if "train/loss" in row] == steps
        assert [row["eval/bpb"] for row in rows if "eval/bpb" in row] == [2 / step for step in steps]


def test_a_mirrored_row_names_its_line_in_the_journal(offline_run):
    lines = {row.number: row.values for row in journal.read_rows(offline_run.directory)}
    for fragment in offline_run.fragments:
        for row in (row["item"] for row in of_type(fragment, "history")):
            event = lines[row[mirror.ROW]]["event"]
            assert row[f"{event}/step"] == lines[row[mirror.ROW]]["step"]


def test_outputs_are_checksummed_references_and_offline_edges_go_to_lineage_json(offline_run):
    (artifact,) = of_type(offline_run.fragments[0], "artifact")
    entries = {entry["path"]: entry for entry in artifact["manifest"]["contents"]}
    weights = entries["model.safetensors"]
    assert weights["digest"] == base64.b64encode(hashlib.md5(b"weights").digest()).decode()
    assert weights["ref"] == f"file://{offline_run.directory}/output/model.safetensors"
    assert artifact["type"] == "model"
    assert json.loads(artifact["metadata"])["digest"] == offline_run.made
    content = json.loads((offline_run.directory / "lineage.json").read_text())
    (taken,), (made,) = content["inputs"], content["outputs"]
    assert (taken["path"], taken["digest"]) == ("../tokenize-11223344/output", offline_run.taken)
    assert (made["path"], made["digest"], made["type"]) == ("output", offline_run.made, "model")


def test_the_exit_code_says_how_the_stage_ended(offline_run):
    saved, done = offline_run.fragments
    assert of_type(saved, "exit")[0]["exit_code"] == 85
    assert len(of_type(saved, "preempting")) == 1
    assert of_type(done, "exit")[0].get("exit_code", 0) == 0
    assert of_type(done, "preempting") == []


def test_no_secret_is_in_any_file_of_the_run(offline_run):  # trap O6
    files = [path for path in offline_run.directory.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    inspected = json.dumps(offline_run.fragments)
    for name, secret in SECRETS.items():
        assert [str(path) for path, content in contents.items() if secret.encode() in content] == [], name
        assert secret not in inspected, name
    # The search would have found them: what is not secret is in the journal and in W&B's own file.
    assert sum(b"harmless-marker" in content for content in contents.values()) >= 2
    assert "harmless-marker" in inspected
    assert "<|endoftext|>" in inspected.encode().decode("unicode_escape")


def test_wandb_records_neither_argv_nor_packages_nor_code_and_stays_in_the_run_folder(offline_run):
    names = {path.name for path in offline_run.directory.rglob("*") if path.is_file()}
    assert names.isdisjoint({"wandb-metadata.json", "requirements.txt", "diff.patch", "output.log"})
    assert not any("environment" in record for fragment in offline_run.fragments for record in fragment)
    assert [path for path in offline_run.home.rglob("*") if path.is_file()] == []


def test_two_stages_of_one_process_are_two_runs(tmp_path):
    code = """
import sys
from pathlib import Path
from stages.runtime.tracking import open_tracker
for stage in ("clean", "tokenizer"):
    tracker = open_tracker(
        Path(sys.argv[1]) / stage, pipeline="p", stage=stage, kind=stage, key="0" * 64, config={}, mode="offline"
    )
    tracker.log(stage, 1, {"documents": 5})
    if stage == "tokenizer":
        tracker.finish("done")
"""
    run_child(code, str(tmp_path))
    for stage in ("clean", "tokenizer"):
        (fragment,) = records(tmp_path / stage)
        assert of_type(fragment, "run")[0]["job_type"] == stage
        assert len(of_type(fragment, "history")) == 1


def test_disabled_never_imports_wandb_and_writes_no_wandb_folder(tmp_path):
    code = """
import sys
sys.modules["wandb"] = None
from pathlib import Path
from stages.runtime.tracking import open_tracker
tracker = open_tracker(Path(sys.argv[1]), pipeline="p", stage="s", kind="k", key="0" * 64, config={}, mode="disabled")
tracker.log("train", 1, {"loss": 1.0})
tracker.finish("done")
"""
    assert run_child(code, str(tmp_path)).stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lineage.json", "metrics.jsonl"]


SURVIVE = """
import logging, os, signal, sys, time
from pathlib import Path
if sys.argv[2] == "import":
    sys.modules["wandb"] = None
from stages.runtime.tracking import open_tracker
started = time.monotonic()
tracker = open_tracker(Path(sys.argv[1]), pipeline="p", stage="s", kind="k", key="0" * 64, config={}, mode="offline")
tracker.log("train", 1, {"loss": 1.0})
if sys.argv[2] == "kill":
    import psutil
    for child in psutil.Process().children(recursive=True):
        child.kill()
        child.wait()
for step in range(2, 50):
    tracker.log("train", step, {"loss": 1.0})
tracker.log_artifact("a", "model", Path(sys.argv[1]) / "absent", "00", {})
tracker.finish("done")
print("alive")
"""


@pytest.mark.parametrize("failure", ["import", "kill", "absent artifact"])
def test_training_survives_wandb_and_hears_of_it_once(tmp_path, failure):
    child = run_child(SURVIVE, str(tmp_path), failure)
    assert child.stdout.strip() == "alive"
    assert child.stderr.count("metrics.jsonl goes on") == 1
    assert "Traceback" not in child.stderr, "what became of it at the end of the process was told already"
    assert [row["step"] for row in read_metrics(tmp_path, "train")] == list(range(1, 50))


def test_wandb_is_left_out_when_its_folder_cannot_be_made(tmp_path):
    (tmp_path / "wandb").write_text("a file where W&B wants a folder")
    child = run_child(SURVIVE, str(tmp_path), "disk")
    assert child.stdout.strip() == "alive"
    assert len(read_metrics(tmp_path, "train")) == 49


def test_auto_is_online_with_a_key_or_a_netrc_login_and_else_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert mirror.resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert mirror.resolve_mode("auto") == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert mirror.resolve_mode("auto") == "online"
    assert mirror.resolve_mode("disabled") == "disabled"


def test_a_run_id_is_stable_and_tells_pipelines_stages_and_keys_apart():
    def run_id(pipeline="p", stage="s", key=KEY):
        return mirror.identity(pipeline, stage, "kind", key, "project", None).id

    assert run_id() == run_id()
    assert len({run_id(), run_id(pipeline="q"), run_id(stage="t"), run_id(key="0" * 64)}) == 4


def test_a_stop_request_during_a_mirror_call_is_no_failure_of_wandb(tmp_path, monkeypatch):
    class Run:
        def define_metric(self, name, **facts):
            raise StopRequested("SIGTERM")

    monkeypatch.setattr(mirror.WandbMirror, "_open", lambda self, *rest: setattr(self, "_run", Run()))
    tracker = tracker_in(tmp_path, mode="offline")
    with pytest.raises(StopRequested, match="SIGTERM"):
        tracker.log("train", 1, {"loss": 1.0})
    assert tracker._mirror.failure == ""


def test_lineage_json_stays_strict_whatever_the_metadata_holds(tmp_path):
    tracker = tracker_in(tmp_path)
    tracker.log_artifact("a", "model", tmp_path, "00", {"bpb": math.nan, "path": tmp_path, "nested": [{"x": 1}]})
    tracker.log_artifact("a", "model", tmp_path, "00", {})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "lineage.json").read_text(), parse_constant=refuse)
    (edge,) = content["outputs"]
    assert edge["metadata"] == {"bpb": "NaN", "path": str(tmp_path), "nested": [{"x": 1}]}


def test_more_figures_than_wandb_takes_keys_travel_by_group():
    import wandb

    figures = {f"margin_nats/{group}": float(group) for group in range(150)} | {"margin_nats": 1.0}
    artifact = wandb.Artifact("a", type="model", metadata=mirror.described(figures))
    assert artifact.metadata["margin_nats"] == 1.0
    assert artifact.metadata["by_group"]["margin_nats/149"] == 149.0
    with pytest.raises(ValueError, match="100 metadata keys"):
        wandb.Artifact("a", type="model", metadata=figures)
