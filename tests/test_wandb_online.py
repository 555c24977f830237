"""W&B's own client, online, against a recorder of its protocol: runs, rows, edges as claimed, nothing else is sent."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from graphql_reader import answer
from tracked_run import ROOT
from wandb_recorder import recording

SECRETS = {
    "WANDB_API_KEY": "f00dfeed" * 5,
    "HF_TOKEN": "hf_" + "Zq7" * 11,
    "PEDIGREE_PLANTED_SECRET": "correct-horse-battery",
}
TOKENS, MODEL = "tokenize-00000000", "pretrain-b-11111111"
COMMON = """
import os, shutil, sys
from pathlib import Path
from stages.runtime.tracking import open_tracker
from tracked_run import sealed
root, secret = Path(sys.argv[1]), os.environ["PEDIGREE_PLANTED_SECRET"]
def tracker(name, kind, mode):
    stage, _, key = name.rpartition("-")
    config = {"lr": 0.002, "api_key": secret, "note": "uses " + secret}
    facts = {"pipeline": "demo", "stage": stage, "kind": kind, "key": key * 8, "mode": mode, "config": config}
    return open_tracker(root / "demo" / name, **facts)
def chain(mode):
    tokens, model = root / "demo" / "tokenize-00000000", root / "demo" / "pretrain-b-11111111"
    made, child = [sealed(one / "output", content=b"bytes-of-" + one.name.encode()) for one in (tokens, model)]
    first = tracker(tokens.name, "tokenize", mode)
    first.log("tokenize", 1, {"tokens": 10, "origin": "harmless-marker"})
    first.log_artifact(tokens.name, "tokens", tokens / "output", made, {"tokens": 10})
    first.finish("done")
    second = tracker(model.name, "pretrain", mode)
    second.use_artifact(tokens.name, tokens / "output", made, "tokens")
    for step in (1, 2, 3):
        second.log("train", step, {"loss_nats_per_token": 10.0 + step})
    second.finish("saved")
    third = tracker(model.name, "pretrain", mode)
    third.resume(3)
    third.use_artifact(tokens.name, tokens / "output", made, "tokens")
    third.log("train", 4, {"loss_nats_per_token": 14.0})
    third.log("eval", 4, {"bpb": 1.5, "heldout_hash": "9f"})
    checkpoint = model / "checkpoints" / "step-00000004"
    sealed(checkpoint, content=b"bytes-of-state")
    third.log_checkpoint(4, checkpoint)
    third.alert("cannot reach https://user:" + secret + "@host/x")
    third.notify("step 4: loss spike " + secret)
    third.log_artifact(model.name, "model", model / "output", child, {"bpb": 1.5})
    third.finish("done")
    return [one._mirror.failure for one in (first, second, third) if one._mirror]
"""
TOY = """
from fake_chain import RECIPE, STAGES, write_recipe
from pipelines.run import main
text = RECIPE.replace("wandb: disabled", "wandb: online")
recipe = ["--pipeline", str(write_recipe(root, text)), "--runs", str(root)]
assert main(["--stage", "train", *recipe], STAGES) == 0
"""
"""A recipe's own command, which runs a data stage and a training stage."""


def run_online(url, root, code):
    """A child with W&B's client, whose server is the recorder, and secrets all around it."""
    home = root / "home"
    home.mkdir(exist_ok=True)
    env = {**os.environ, **SECRETS, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "WANDB_BASE_URL": url, "HOME": str(home)}
    # These would be the user's say; what the program does by itself is looked at.
    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING"):
        env.pop(name, None)
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMMON + code, str(root)], env=env, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Two stages tracked online as they ran, the second saved and resumed."""
    root = tmp_path_factory.mktemp("live")
    with recording() as recorder:
        said = run_online(recorder.url, root, f"print(chain('auto'))\n{TOY}")
    assert said.splitlines()[0] == "['', '', '']"
    recorder.root = root
    return recorder


@pytest.fixture(scope="module")
def synced(tmp_path_factory):
    """The same two stages tracked nowhere, brought to the server twice by sync; a first time it takes no artifact."""
    root = tmp_path_factory.mktemp("synced")
    code = "import json\nfrom stages.runtime.sync import sync\nprint(json.dumps([sync(root), sync(root)]))"
    with recording() as recorder:
        recorder.refused.add("CreateArtifact")
        first = "chain('disabled')\nfrom stages.runtime.sync import sync\nprint(sync(root))"
        recorder.broken = run_online(recorder.url, root, first)
        recorder.refused.clear()
        recorder.said = json.loads(run_online(recorder.url, root, code))
    recorder.root = root
    return recorder


@pytest.fixture(scope="module", params=["live", "synced"])
def told(request):
    """The recorder of either way."""
    return request.getfixturevalue(request.param)


def of_group(recorder, group="demo"):
    """Runs of one pipeline by their display names."""
    return {run["displayName"]: run for run in recorder.runs.values() if run["group"] == group}


def run_of(recorder, name):
    return next(run for run in recorder.runs.values() if run["displayName"] == name)


def edges(recorder, group="demo"):
    """(run, direction, artifact) of a pipeline as the server has them, by display names."""
    shown = {run["name"]: name for name, run in of_group(recorder, group).items()}
    names = {identity: one["artifactSequence"]["name"] for identity, one in recorder.artifacts.items()}
    made = {
        (shown[one["maker"]], "made", names[key]) for key, one in recorder.artifacts.items() if one["maker"] in shown
    }
    return made | {(shown[run], "took", names[key]) for run, key in recorder.uses if run in shown}


def test_the_client_asks_for_nothing_that_the_recorder_does_not_know(told):
    assert told.unknown == []
    assert {path.split()[1].split("/")[1] for path in told.paths} == {"graphql", "files", "storage"}


def test_the_server_has_one_run_a_stage_with_group_job_type_and_config(told):
    assert sorted(of_group(told)) == [MODEL, TOKENS]
    run = run_of(told, MODEL)
    assert (run["group"], run["jobType"]) == ("demo", "pretrain")


def test_every_row_that_holds_arrived_once_on_its_own_axis(told):
    rows = told.rows[run_of(told, MODEL)["name"]]
    trained = [(row["train/step"], row["train/loss_nats_per_token"]) for row in rows if "train/step" in row]
    assert trained == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 14.0)]
    assert [row["eval/bpb"] for row in rows if "eval/bpb" in row] == [1.5]
    numbers = [row["journal/row"] for row in rows]
    assert numbers == sorted(set(numbers))
    assert json.loads(run_of(told, MODEL)["summaryMetrics"])["journal/row"] == numbers[-1]


def test_the_server_has_the_edges_of_lineage_json_and_an_input_is_its_makers_output(told):
    made = {(MODEL, "made", MODEL), (MODEL, "made", f"{MODEL}-checkpoint"), (TOKENS, "made", TOKENS)}
    assert edges(told) == made | {(MODEL, "took", TOKENS)}
    taken = {key for run, key in told.uses if run == run_of(told, MODEL)["name"]}
    makers = [one["maker"] for key, one in told.artifacts.items() if key in taken]
    assert makers == [run_of(told, TOKENS)["name"]], "one version, made by tokenize and not by who took it"
    on_disk = json.loads((told.root / "demo" / MODEL / "lineage.json").read_text())
    digests = {json.loads(told.artifacts[key]["metadata"])["digest"] for key in taken}
    assert digests == {edge["digest"] for edge in on_disk["inputs"]}


def test_only_lists_of_files_and_the_runs_own_tables_are_uploaded_never_their_content(told):
    names = {path.rsplit("/", 1)[1].split(":")[0] for path in told.stored}
    assert names == {"artifact", "config.yaml", "wandb-summary.json"}
    assert not any(b"bytes-of-" in body for body in told.bodies)


def test_no_secret_is_in_anything_that_was_sent(told):  # trap O6
    assert any(b"harmless-marker" in body for body in told.bodies)
    for name, secret in SECRETS.items():
        assert [body[:200] for body in told.bodies if secret.encode() in body] == [], name


def test_a_recipes_own_command_leaves_the_same_graph(live):
    runs = of_group(live, "toy")
    gather, train = sorted(runs)
    assert [runs[name]["jobType"] for name in (gather, train)] == ["gather", "train"]
    assert edges(live, "toy") == {(gather, "made", gather), (train, "took", gather), (train, "made", train)}
    types = {one["artifactSequence"]["name"]: one["artifactType"]["name"] for one in live.artifacts.values()}
    assert (types[gather], types[train]) == ("corpus", "model")
    assert json.loads(runs[train]["config"])["config"]["value"]["lr"] == 2e-4
    assert all(live.exits[run["name"]] == [0] for run in runs.values())


def test_neither_the_machine_nor_the_command_nor_a_path_of_the_program_is_sent(told):
    begun = [asked for name, asked in told.operations if name == "UpsertBucket"]
    assert begun
    assert {asked[name] for asked in begun for name in ("host", "program", "commit", "repo")} == {None}
    assert not any(b"sys.argv" in body or b"wandb-metadata" in body for body in told.bodies)


def test_an_ending_that_was_saved_is_told_as_preempted_and_then_as_done(live):
    name = run_of(live, MODEL)["name"]
    assert live.exits[name] == [85, 0]
    assert live.preempted == [name]


def test_alerts_and_alarms_reach_the_server_without_their_secrets(live):  # trap O6
    assert {run for run, _, _ in live.alerts} == {run_of(live, MODEL)["name"]}
    assert [(title, text) for _, title, text in live.alerts] == [
        (MODEL, "cannot reach https://[redacted]@host/x"),
        (f"{MODEL}: alarm", "step 4: loss spike [redacted]"),
    ]


def test_sync_says_when_the_server_did_not_take_an_artifact_and_mends_it_later(synced):
    assert synced.broken.count("FAILED") == 2
    first, second = synced.said
    assert not any("FAILED" in line for line in first + second)
    assert all(": 0 rows sent" in line for line in second)


def test_the_recorder_refuses_and_notes_what_it_does_not_know():
    with recording() as recorder:
        for path, body in (("graphql", {"query": "query Strange { thing { id } }"}), ("elsewhere", {})):
            request = urllib.request.Request(f"{recorder.url}/{path}", json.dumps(body).encode(), method="POST")
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(request)
    assert [what.split(":")[0] for what in recorder.unknown] == ["operation Strange", "POST /elsewhere"]


def test_an_answer_has_the_fields_that_were_asked_for_and_no_others():
    data = {"run": lambda asked: {"id": asked["id"], "kept": [{"a": 1, "b": 2}], "__typename": "Run"}}
    query = (
        "query Q($id: ID!, $all: Boolean = true) { mine: run(id: $id) { ...F kept @include(if: $all) { a } } }"
        " fragment F on Run { id } fragment G on Other { b }"
    )
    assert answer(query, {"id": 7}, data) == {"mine": {"id": 7, "kept": [{"a": 1}]}}
    assert answer(query, {"id": 7, "all": False}, data) == {"mine": {"id": 7}}
    with pytest.raises(LookupError, match=r"R\.run\.c"):
        answer("query R { run(id: 1) { c } }", {"id": 7}, data)
