"""The later stages beside their training: stops inside measurements, weights that measuring leaves alone, offline W&B.

One process has the imports and forks the lives: see ``tracked_lives``.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_tracking import of_type, records

SCRIPT = Path(__file__).with_name("tracked_lives.py")
QUICK, SLOW = ("sft", "reference", "later"), ("grpo", "dpo", "qlora")
"""Of those that go the same ways through the code, one is enough for every day."""
PRODUCES = {"sft": "model", "grpo": "model", "dpo": "model", "qlora": "model", "evaluate": "scores", "export": "export"}
SECRETS = ("f00dfeed" * 5, "correct-horse-battery")


def of_kinds(*kinds):
    """Parameters, those of the slow set marked so."""
    return [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in kinds]


STOPPED = of_kinds("sft", "grpo", "dpo")


@pytest.fixture(scope="module")
def seen_of(tmp_path_factory):
    """What was seen of a part; those of the quick set, and those of the slow one, share one process."""
    found = {}

    def seen(name):
        parts = SLOW if name in SLOW else QUICK
        if parts not in found:
            root = tmp_path_factory.mktemp("lives")
            done = subprocess.run([sys.executable, SCRIPT, root, *parts], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            found[parts] = json.loads(done.stdout.splitlines()[-1]) | {"root": root}
        return found[parts]

    return seen


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in PRODUCES]
)
def tracked(request, seen_of):
    """One stage's artifact, what it was, and its offline W&B fragments read back."""
    kind, seen = request.param, seen_of(request.param)
    trains = kind not in ("evaluate", "export")
    directory = seen["root"] / kind / "asked" if trains else seen["root"] / kind
    assert seen[kind]["codes"][-1] == 0, seen[kind]["log"]
    return kind, directory, records(directory)


@pytest.mark.parametrize("kind", STOPPED)
def test_a_stop_inside_a_held_out_measurement_is_honoured_saved_and_made_up_for(seen_of, kind):  # trap T6
    found = seen_of(kind)[kind]
    assert found["codes"] == [85, 0, 0], found["log"]
    assert "saved at step 2, asked to stop by SIGTERM" in found["said"]
    assert found["saved"] == ["step-00000002"]
    assert found["measured"] == [0, 2, 4]


@pytest.mark.parametrize("kind", STOPPED)
def test_measuring_between_steps_leaves_the_weights_bit_for_bit_alone(seen_of, kind):  # trap M2
    found = seen_of(kind)[kind]
    assert found["before"] == [0, 4], "the parent is measured before the first step whatever the cadence"
    assert found["same_weights"]


def test_a_stop_of_one_rank_inside_the_reference_pass_ends_both_and_keeps_what_was_computed(seen_of):
    found = seen_of("reference")["reference"]
    assert found["codes"] == [85, 0], found["log"]
    assert "in a measurement, asked to stop by SIGTERM" in found["said"]
    assert found["blocks"] == 2, "one a rank"


def test_fragments_read_back_are_one_run_with_group_and_job_type(tracked):
    kind, directory, fragments = tracked
    assert len(fragments) == (2 if kind in ("sft", "grpo", "dpo") else 1)
    runs = [of_type(fragment, "run")[0] for fragment in fragments]
    assert {run["run_group"] for run in runs} == {"lives"}
    assert {run["job_type"] for run in runs} == {kind}
    assert len({run["run_id"] for run in runs}) == 1
    record = json.loads((directory / "stage.json").read_text())
    assert runs[0]["display_name"] == f"{kind}-{record['key'][:8]}"


def test_the_output_read_back_has_the_stages_type_digest_and_checksums(tracked):
    import base64
    import hashlib

    kind, directory, fragments = tracked
    (made,) = [one for one in of_type(fragments[-1], "artifact") if one["type"] != "checkpoint"]
    record = json.loads((directory / "stage.json").read_text())
    assert made["type"] == PRODUCES[kind]
    assert json.loads(made["metadata"])["digest"] == record["output_digest"]
    for entry in made["manifest"]["contents"]:
        content = (directory / "output" / entry["path"]).read_bytes()
        assert entry["digest"] == base64.b64encode(hashlib.md5(content).digest()).decode()
    files = {path.relative_to(directory / "output").as_posix() for path in (directory / "output").rglob("*")}
    entries = {entry["path"] for entry in made["manifest"]["contents"]}
    assert entries == {name for name in files if (directory / "output" / name).is_file()}


def test_every_edge_is_in_lineage_json_with_the_parents_digest(tracked):
    _, directory, _ = tracked
    content = json.loads((directory / "lineage.json").read_text())
    parents = json.loads((directory / "stage.json").read_text())["parents"]
    taken = {(edge["digest"], (directory / edge["path"]).resolve()) for edge in content["inputs"]}
    assert taken == {(link["digest"], Path(link["path"]).resolve() / "output") for link in parents.values()}
    assert [edge["path"] for edge in content["outputs"]][-1] == "output"


def test_each_row_of_the_journal_is_in_the_fragments_once(tracked):
    from stages.runtime.journal import read_rows

    _, directory, fragments = tracked
    sent = [row["item"]["journal/row"] for fragment in fragments for row in of_type(fragment, "history")]
    assert sent == [row.number for row in read_rows(directory)]


def test_no_secret_is_in_any_file_of_the_artifact(tracked):  # trap O6
    _, directory, fragments = tracked
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for secret in SECRETS:
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in json.dumps(fragments)
