"""`--plan` and `--status`: what they say of keys, reasons, costs, variants, and runs of other lengths."""

import json

import pytest
from fake_chain import records

from pipelines.chain import build_chain
from pipelines.status import status_lines
from stages.runtime import artifact


def test_status_marks_the_recipes_artifact_among_its_variants(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    assert cli("--stage", "train", "--set", "train.lr=1e-4") == 0
    capsys.readouterr()
    assert cli("--status", "--json") == 0
    entries = json.loads(capsys.readouterr().out)
    assert [(entry["stage"], entry["state"], entry["current"]) for entry in entries] == [
        ("gather", "done", True),
        ("train", "done", True),
        ("train", "done", False),
        ("tuned", "stale", True),
    ]
    assert entries[1]["loss"] == 1.5
    assert entries[1]["tokens_per_s"] == 1000.0
    assert entries[1]["max_steps"] == 300
    assert cli("--status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("*") for line in lines[1:4]) >= 2
    assert "300/300" in lines[2]


def test_one_record_that_cannot_be_read_hides_no_other_stage(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    (record,) = (tmp_path / "runs").rglob("gather-*/stage.json")
    record.write_text("{half")
    capsys.readouterr()
    assert cli("--status", "--json") == 0
    states = {entry["stage"]: (entry["state"], entry["note"]) for entry in json.loads(capsys.readouterr().out)}
    assert states["train"] == ("done", "")
    assert states["gather"][0] == "failed"
    assert "cannot be read" in states["gather"][1]


ROW = '{"event": "train", "step": 7, "time": "2026-01-01T00:00:00.000+00:00", "loss_nats_per_token": 2.5}'
TORN = ROW[:50]
GARBAGE = ["\0" * 40, '{"step": 7}', "[1]", '{"event": [], "step": 7}', '{"event": "resume", "step": "x"}', ROW[20:]]


@pytest.mark.parametrize(
    ("lines", "note"),
    [
        *(pytest.param([ROW, garbage, ROW], "metrics.jsonl: line 2 is no row", id=garbage) for garbage in GARBAGE),
        pytest.param([ROW, "x", "y", ROW, "z", ROW], "metrics.jsonl: 3 lines are no rows, first 2", id="several"),
        # What a kill or a power cut leaves at the end, which the next run cuts off.
        pytest.param([ROW, TORN], "", id="torn"),
        pytest.param([ROW, "\0" * 40, "\0" * 9 + TORN], "", id="blocks-left-empty"),
        pytest.param([ROW, ROW], "", id="whole"),
    ],
)
def test_status_notes_a_broken_row_of_metrics_unless_it_is_the_torn_end(cli, tmp_path, capsys, lines, note):
    assert cli("--stage", "train", "--set", "train.ending=error") == 1
    (metrics,) = (tmp_path / "runs").rglob("train-*/metrics.jsonl")
    metrics.write_text("\n".join(lines))
    capsys.readouterr()
    assert cli("--status", "--json") == 0
    found = {entry["stage"]: entry for entry in json.loads(capsys.readouterr().out)}
    failed = "failed: RuntimeError: the sum is not finite"
    assert found["train"]["note"] == (f"{failed}; {note}" if note else failed)
    assert (found["train"]["step"], found["train"]["loss"], found["gather"]["note"]) == (7, 2.5, "")


def test_a_broken_row_far_above_is_noted_of_every_artifact(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    assert cli("--stage", "train", "--set", "train.lr=1e-4") == 0
    for metrics in (tmp_path / "runs").rglob("train-*/metrics.jsonl"):
        metrics.write_text("\n".join([ROW, "x", *[ROW] * 1_000, ""]))
    capsys.readouterr()
    assert cli("--status", "--json") == 0
    found = [entry["note"] for entry in json.loads(capsys.readouterr().out) if entry["stage"] == "train"]
    assert found == ["metrics.jsonl: line 2 is no row"] * 2


def test_plan_shows_keys_reasons_figures_and_disk(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    capsys.readouterr()
    assert cli("--plan", "--set", "train.lr=1e-4", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    by_name = {stage["stage"]: stage for stage in plan["stages"]}
    assert by_name["gather"]["state"] == "done"
    assert by_name["train"]["reasons"] == ["train.lr 2e-4 -> 1e-4"]
    assert by_name["train"]["figures"]["tokens"] == 30000
    assert by_name["tuned"]["parents"] == {"data": "gather", "from": "train"}
    assert cli("--plan", "--set", "train.lr=1e-4") == 0
    out = capsys.readouterr().out
    assert by_name["train"]["key"][:8] in out
    assert "30,000" in out
    assert "disk: at least 4.0 KiB wanted by what is left, " in out
    assert "left to do: train, tuned" in out


def test_a_plan_warns_of_finished_children_that_a_longer_parent_would_leave_behind(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    capsys.readouterr()
    assert cli("--plan", "--set", "train.max_steps=600") == 0
    assert "note:" not in capsys.readouterr().out, "no child was made yet"
    assert cli("--stage", "tuned") == 0
    child = next((tmp_path / "runs" / "toy").glob("tuned-*")).name
    capsys.readouterr()
    assert cli("--plan", "--set", "train.max_steps=600") == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert "extending train (max_steps 300 -> 600) replaces the output that" in note
    assert f"that {child} came from" in note
    assert cli("--plan") == 0
    assert "note:" not in capsys.readouterr().out


def test_the_plain_recipe_after_an_extension_is_planned_and_told_what_to_set(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    assert cli("--stage", "train", "--set", "train.max_steps=600") == 0
    capsys.readouterr()
    assert cli("--plan") == 0
    out = capsys.readouterr().out
    assert "holds 600 of max_steps, the recipe asks for 300: set train.max_steps=600 to go on from it" in out
    assert "as the recipe stands, a run of train would be refused" in out
    assert "left to do: tuned" in out
    assert cli("--status") == 0
    assert "longer" in capsys.readouterr().out
    for argv in (["--all"], ["--stage", "train"], ["--stage", "tuned"]):
        assert cli(*argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("line 22: train.max_steps: must be at least 600, which ")
        assert "got 300; set it in the recipe or by --set train.max_steps=600, or move that directory away" in line
    assert records(tmp_path)["train"]["attempts"] == 2
    assert cli("--plan", "--set", "train.max_steps=600") == 0
    assert "left to do: tuned" in capsys.readouterr().out
    assert cli("--stage", "tuned", "--set", "train.max_steps=600") == 0
    assert cli("--all", "--until", "gather") == 0, "what does not need it is not held up"


def test_why_names_other_sources_shortly_and_changed_fields_of_the_same_ones(cli, capsys):
    assert cli("--stage", "gather") == 0
    capsys.readouterr()

    def why(*argv):
        assert cli("--plan", "--json", *argv) == 0
        return json.loads(capsys.readouterr().out)["stages"][0]["reasons"]

    assert why("--set", "gather.sources.0.text=bye") == ["gather.sources.0.text hello -> bye"]
    sources = "[{type: text, text: a}, {type: text, text: b}, {type: text, text: c}]"
    assert why("--set", f"gather.sources={sources}") == ["gather.sources text -> text and 2 more"]


def test_own_text_is_a_short_reason(tmp_path, capsys):
    from pipelines.recipe import DEFAULT, load_recipe
    from pipelines.staleness import _differences
    from stages import STAGES as REAL

    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 2000)
    first, second = (
        build_chain(load_recipe(DEFAULT, [], REAL, data), tmp_path / "runs", REAL).nodes["clean"]
        for data in (None, tmp_path)
    )
    (reason,) = _differences(second, {"identity": first.job.identity, "parents": {}})
    assert reason.startswith("clean.sources ")
    assert len(reason) < 100, reason


ENTRY = {
    "current": True, "stage": "train", "key": "0" * 64, "state": "failed", "step": 3, "max_steps": 10, "loss": 1.0,
    "bpb": 2.0, "tokens_per_s": 10.0, "checkpoint_age_s": 5.0, "age_s": 5.0, "note": "x" * 300,
}  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_notes_of_the_status_keep_to_the_terminals_width(width):
    lines = status_lines([ENTRY, {**ENTRY, "note": ""}], width)
    noted = [line for line in lines if "xxx" in line]
    assert len(noted) == 1
    assert len(noted[0]) <= width
    assert noted[0].endswith("...")


def test_notes_are_whole_in_a_pipe():
    assert any(line.endswith("x" * 300) for line in status_lines([ENTRY]))


def test_last_events_pass_over_a_lost_future(tmp_path):
    rows = [("train", 100), ("train", 300), ("eval", 290), ("resume", 280), ("train", 295)]
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"event": "{e}", "step": {s}}}\n' for e, s in rows))
    assert {event: row["step"] for event, row in artifact.last_events(tmp_path).items()} == {
        "train": 295,
        "resume": 280,
    }
