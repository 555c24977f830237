"""Gates while the chain runs: what stops, with which exit code, what an override leaves behind, what is shown."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from report_chain import STAGES, make_chain, run_chain

from pipelines import compare, lineage, report
from pipelines.gates_run import handed_on
from pipelines.launch import run_all, together
from pipelines.run import main, parse, stages_argv
from stages.base import ConfigError
from stages.runtime.artifact import read_record

TESTS = Path(__file__).resolve().parent
SCRIPT = f"""
import sys
sys.path[:1] = [{str(TESTS.parent)!r}, {str(TESTS)!r}]
from report_chain import STAGES
from pipelines.run import main
sys.exit(main(None, STAGES))
"""
GATES = [{"metric": "bpb/de", "max_regression": 0.01}, {"metric": "safety/over_refusal", "max": 0.5}]
RECIPE = {
    "name": "toy",
    "seed": 17,
    "tracking": {"wandb": "disabled"},
    "stages": {
        "text": {"kind": "gather", "sources": [{"name": "wiki"}]},
        "base": {"kind": "fit", "data": "text"},
        "tuned": {"kind": "fit", "data": "text", "from": "base"},
        "ship": {"kind": "ship", "from": "tuned"},
        "judge-base": {"kind": "judge", "from": "base", "data": "text", "quality": 0.3},
        "judge-tuned": {"kind": "judge", "from": "tuned", "data": "text", "quality": 0.1, "gates": GATES},
    },
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the recipe, everything run but the evaluations and what goes on from the tuned model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.py").write_text(SCRIPT)
    run_chain(chain_of(tmp_path), "text", "base", "tuned")
    return tmp_path


def chain_of(home):
    return make_chain(home, yaml.safe_dump(RECIPE, sort_keys=False))


@pytest.fixture
def run(home, capsys):
    def act(*argv):
        capsys.readouterr()
        code = main([*argv, "--pipeline", "toy.yaml", "--runs", "runs"], STAGES)
        out, err = capsys.readouterr()
        return code, out, err

    return act


def record(home, stage):
    found = [read_record(path.parent) for path in (home / "runs" / "toy").glob(f"{stage}-*/stage.json")]
    return found[0] if found else None


def all_of(home, *overrides):
    """``--all`` with real processes; the exit code."""
    chain = chain_of(home)

    def argv(nodes):
        names = [word for node in nodes for word in ("--stage", node.name)]
        words = [word for one in overrides for word in ("--override-gate", one)]
        return [sys.executable, "run.py", *names, *words, "--pipeline", "toy.yaml", "--runs", "runs"]

    return run_all(chain, chain.selection(None, None), argv, lambda node: f"run {node.name}", overrides=overrides)


def test_an_evaluation_whose_gate_fails_is_done_and_ends_with_code_1(home, run):
    code, out, err = run("--stage", "judge-base", "--stage", "judge-tuned")
    assert code == 1
    assert record(home, "judge-tuned")["state"] == "done"
    assert "judge-tuned: gates: 1 failed, 1 passed" in out
    first, last = err.splitlines()
    assert first.startswith("gate judge-tuned:bpb/de failed (at most 0.01 worse than base): worse by 0.2")
    page = record_page(last)
    assert "the chain stops here" in (home / page).read_text(encoding="utf-8")


def record_page(line):
    """The page that a line of ``settle`` names."""
    return line.partition("why: ")[2].partition(";")[0]


def test_what_goes_on_from_the_model_is_not_begun(home, run):
    run("--stage", "judge-base", "--stage", "judge-tuned")
    code, out, err = run("--stage", "ship")
    assert (code, out) == (1, "")
    assert record(home, "ship") is None
    assert "gate judge-tuned:bpb/de failed" in err
    # An evaluation is no step on from a model, and other models are free.
    assert run("--stage", "judge-base")[0] == 0


def test_a_gate_that_nobody_decided_refuses_with_the_command_that_decides_it(home, run):
    code, out, err = run("--stage", "ship")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "ship.from: must wait for the gates of judge-tuned, which is stale (never run); run: python " in line
    assert line.endswith("(or set --override-gate judge-tuned)")
    assert record(home, "ship") is None
    # A metric that was never measured cannot be let pass; the whole evaluation can.
    assert run("--stage", "ship", "--override-gate", "judge-tuned:bpb/de")[0] == 2
    assert run("--stage", "ship", "--override-gate", "judge-tuned")[0] == 0
    (said,) = record(home, "ship")["overridden_gates"]
    assert (said["stage"], said["metric"]) == ("judge-tuned", None)
    assert said["said"] == "not measured: stale (never run)"


def test_an_override_is_in_the_record_and_in_the_lineage_of_what_went_on(home, run, capsys):
    run("--stage", "judge-base", "--stage", "judge-tuned")
    code, out, _ = run("--stage", "ship", "--override-gate", "judge-tuned:bpb/de")
    assert code == 0
    assert "gate judge-tuned:bpb/de failed, overridden 2" in out
    (said,) = record(home, "ship")["overridden_gates"]
    assert said["key"] == record(home, "judge-tuned")["key"]
    assert said["said"].startswith("gate judge-tuned:bpb/de failed (at most 0.01 worse than base)")
    assert record(home, "tuned")["overridden_gates"] == []
    assert lineage.main(["show", record_name(home, "ship"), "--runs", "runs"]) == 0
    shown = capsys.readouterr().out
    assert "overridden" in shown
    assert "judge-tuned bpb/de" in shown or "judge-tuned:bpb/de" in shown


def record_name(home, stage):
    return next((home / "runs" / "toy").glob(f"{stage}-*")).name


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stage", "ship", "--override-gate", "judge-tunde"], "got 'judge-tunde'; did you mean 'judge-tuned'?"),
        (["--stage", "ship", "--override-gate", "judge-base"], "must name an evaluate stage with gates"),
        (["--stage", "ship", "--override-gate", "judge-tuned:bpb/ed"], "got 'bpb/ed'; did you mean 'bpb/de'?"),
        (["--plan", "--override-gate", "judge-tuned"], "--override-gate belongs to --all and --stage"),
    ],
)
def test_an_override_of_nothing_is_refused(run, argv, words):
    code, out, err = run(*argv)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert words in err


def test_all_stops_at_a_closed_gate_stays_there_and_goes_on_when_it_is_overridden(home, capfd):
    capfd.readouterr()
    assert all_of(home) == 1
    _, err = capfd.readouterr()
    assert record(home, "judge-tuned")["state"] == "done"
    assert record(home, "ship") is None
    assert err.count("the chain stops at its gates") == 1
    assert all_of(home) == 1
    out, err = capfd.readouterr()
    assert "gate judge-tuned:bpb/de failed" in err
    assert "started" not in out
    assert all_of(home, "judge-tuned:bpb/de") == 0
    assert len(record(home, "ship")["overridden_gates"]) == 1
    # What was let pass once needs no flag again, and everything is done.
    assert all_of(home) == 0
    assert "started" not in capfd.readouterr().out.partition("ship: done")[2]


def test_a_finished_gate_waits_for_the_evaluation_that_it_is_compared_with(home, capfd):
    run_chain(chain_of(home), "judge-tuned")
    assert all_of(home) == 1
    said = capfd.readouterr().out
    assert "judge-tuned: its gates are judged anew" in said
    assert said.index("judge-base: never run") < said.index("judge-tuned: its gates are judged anew")
    assert record(home, "judge-base")["state"] == "done"
    assert record(home, "ship") is None
    gates = json.loads(next((home / "runs" / "toy").glob("judge-tuned-*/gates.json")).read_text())
    assert "cannot be judged" not in json.dumps(gates)


def test_a_selection_without_the_gate_on_the_way_is_refused_before_anything_runs(home):
    chain = chain_of(home)
    chosen = [node for node in chain if node.name == "ship"]
    with pytest.raises(ConfigError, match="must wait for the gates of judge-tuned"):
        run_all(chain, chosen, lambda nodes: ["false"], lambda node: f"run {node.name}")


def test_a_child_ends_with_the_stage_whose_gates_are_to_be_judged(home):
    order = [node for node in chain_of(home) if not node.stage.launched]
    assert [[node.name for node in group] for group in together(order)] == [
        ["text", "judge-base", "judge-tuned"], ["ship"],
    ]  # fmt: skip


def test_children_are_told_of_overrides_but_of_none_that_is_known_to_override_nothing(home):
    said = ["judge-tuned:bpb/de", "judge-tuned:safety/over_refusal"]
    chain = chain_of(home)
    ship, tuned = chain.nodes["ship"], chain.nodes["judge-tuned"]
    assert handed_on(chain, [ship], said) == said, "nothing is measured yet"
    run_chain(chain, "judge-base", "judge-tuned")
    assert handed_on(chain, [ship], said) == said[:1]
    assert handed_on(chain, [tuned], said) == said, "the evaluation's own child says what idles"
    words = stages_argv([ship], parse(["--all"]), said)
    place = words.index("--override-gate")
    assert words[place : place + 4] == ["--override-gate", said[0], "--override-gate", said[1]]


def test_status_and_plan_show_a_closed_gate(home, run):
    run("--stage", "judge-base", "--stage", "judge-tuned")
    code, out, _ = run("--status")
    (line,) = [line for line in out.splitlines() if "judge-tuned" in line]
    assert code == 0
    assert "gate closed" in line
    entries = {entry["stage"]: entry for entry in json.loads(run("--status", "--json")[1])}
    found = {one["metric"]: one for one in entries["judge-tuned"]["gates"]}
    assert found["bpb/de"]["closed"]
    assert found["safety/over_refusal"]["state"] == "passed"
    assert "gates" not in entries["judge-base"]
    _, out, _ = run("--plan")
    assert "note: gates of judge-tuned (bpb/de, safety/over_refusal) stand before ship" in out
    assert "note: gate judge-tuned:bpb/de failed" in out


def test_status_report_and_lineage_say_of_a_regression_what_the_gates_line_says(home, run, capsys):
    err = run("--stage", "judge-base", "--stage", "judge-tuned")[2]
    (said,) = re.findall(r"worse by 0\.2\d+ \[0\.\d+, 0\.\d+\] bits_per_byte, n = 200 documents", err)
    assert said in run("--status", "--json")[1]
    run("--stage", "ship", "--override-gate", "judge-tuned")
    assert lineage.main(["show", record_name(home, "ship"), "--runs", "runs"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert report.main(["--pipeline", "toy.yaml", "--runs", "runs"], STAGES) == 0
    assert f"found {said}<" in (home / "runs/toy/report/index.html").read_text(encoding="utf-8")


def test_looking_at_the_status_writes_nothing(home, run):
    run("--stage", "judge-base", "--stage", "judge-tuned")
    before = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*") if path.is_file()}
    run("--status")
    run("--plan")
    assert {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*") if path.is_file()} == before


def test_an_override_of_a_gate_that_is_open_says_that_it_overrides_nothing(home, run):
    code, out, _ = run("--stage", "judge-base", "--stage", "judge-tuned", "--override-gate", "judge-tuned")
    assert code == 0
    assert "overrides nothing" not in out
    code, out, _ = run("--stage", "judge-tuned", "--override-gate", "judge-tuned:safety/over_refusal")
    assert "judge-tuned: --override-gate judge-tuned:safety/over_refusal overrides nothing: no gate" in out


def test_a_later_stage_done_or_not_says_of_an_override_of_an_open_gate_that_it_overrides_nothing(home, run):
    word = "judge-tuned:safety/over_refusal"
    told = f"judge-tuned: --override-gate {word} overrides nothing: no gate that it names is closed"
    run("--stage", "judge-base", "--stage", "judge-tuned")
    argv = ["--stage", "ship", "--override-gate", "judge-tuned:bpb/de", "--override-gate", word]
    code, out, _ = run(*argv)
    assert (code, out.splitlines().count(told)) == (0, 1)
    code, out, _ = run(*argv)
    assert (code, out.splitlines()[0]) == (0, told)
    assert "ship: already done" in out
    assert "judge-tuned:bpb/de overrides nothing" not in out


def test_a_gate_against_an_evaluation_is_answered_with_the_model_that_it_measures(home, run):
    gate = "[{metric: bpb/de, max_regression: 0.1, against: judge-base}]"
    code, _, err = run("--stage", "judge-tuned", "--set", f"judge-tuned.gates={gate}")
    assert code == 2
    assert "got 'judge-base'; set base, which judge-base measures" in err


def test_a_damaged_record_of_gates_is_told_by_whoever_reads_it_and_hides_nothing_else(home, run, capsys):
    assert run("--stage", "judge-base")[0] == 0
    assert run("--stage", "judge-tuned")[0] == 1
    record = next((home / "runs" / "toy").glob("judge-tuned-*/gates.json"))
    record.write_text("{broken")
    said = f"{record.resolve()} must hold judgements and overrides; JSONDecodeError: "
    code, out, _ = run("--plan")
    assert code == 0
    assert f"note: judge-tuned: its gates cannot be judged: {said}" in out
    assert "left to do: ship" in out
    for name, command in {"compare": compare, "report": report}.items():
        variants = ["base", "tuned"] if name == "compare" else []
        assert command.main([*variants, "--pipeline", "toy.yaml", "--runs", "runs"], STAGES) == 0
        assert said in capsys.readouterr().err, name
    for argv in (["--stage", "ship"], ["--stage", "judge-tuned"], ["--all"]):
        code, _, err = run(*argv)
        assert code == 1
        assert f"judge-tuned: its gates cannot be judged: {said}" in err, argv
    assert lineage.main(["verify", "judge-tuned", "--runs", "runs"]) == 1
    assert f"FAULT {said}" in capsys.readouterr().err
