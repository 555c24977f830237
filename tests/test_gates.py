"""Gates: judged on intervals, each limit by itself; what closes them, and what is refused before anything runs."""

import dataclasses
import json

import pytest
import yaml
from report_chain import STAGES, make_chain, run_chain

from pipelines.chain import build_chain
from pipelines.gates import judge, line, verdict_of
from pipelines.gates_record import overrides_of, read_gates
from pipelines.gates_run import is_open, settle
from pipelines.recipe import DEFAULT, load_recipe
from stages import STAGES as REAL
from stages.base import ConfigError
from stages.evaluate import Evaluate, EvaluateConfig
from stages.runtime.artifact import ArtifactError
from stages.runtime.manifest import write_manifest
from stages.runtime.suites.intervals import ALL_ALIKE

STAGES_OF = {
    "text": {"kind": "gather", "sources": [{"name": "wiki"}]},
    "base": {"kind": "fit", "data": "text"},
    "tuned": {"kind": "fit", "data": "text", "from": "base"},
    "ship": {"kind": "ship", "from": "tuned"},
    "judge-base": {"kind": "judge", "from": "base", "data": "text", "quality": 0.3},
    "judge-tuned": {"kind": "judge", "from": "tuned", "data": "text", "quality": 0.3},
}


def recipe(*gates, **changes):
    """The recipe with these gates on ``judge-tuned``; ``changes`` are fields by stage, ``_`` for ``-``."""
    stages = {name: {**plain, **changes.pop(name.replace("-", "_"), {})} for name, plain in STAGES_OF.items()}
    stages["judge-tuned"]["gates"] = list(gates)
    head = {"name": "toy", "seed": 17, "tracking": {"wandb": "disabled"}}
    return yaml.safe_dump({**head, "stages": {**stages, **changes}}, sort_keys=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gates")
    run_chain(make_chain(directory, recipe()))
    return directory


def judged(home, *gates, **changes):
    """The judgements of ``judge-tuned`` by name; other configs are run first."""
    chain = make_chain(home, recipe(*gates, **changes))
    run_chain(chain)
    return {one.name: one for one in judge(chain, chain.nodes["judge-tuned"])}


def rewritten(home, change, **changes):
    """A chain whose ``judge-tuned`` artifact was changed by ``change(scores, items)``."""
    chain = make_chain(home, recipe(*changes.pop("gates"), **changes))
    run_chain(chain)
    node = chain.nodes["judge-tuned"]
    output = node.job.directory / "output"
    files = [output / "scores.json", output / "items.json", output / "manifest.json"]
    before = [path.read_bytes() for path in files]
    scores, items = map(json.loads, before[:2])
    change(scores, items)
    for path, content in zip(files[:2], (scores, items), strict=True):
        path.write_text(json.dumps(content))
    write_manifest(output)
    try:
        return judge(chain, node)
    finally:
        for path, content in zip(files, before, strict=True):
            path.write_bytes(content)


def one_of(scores, name):
    return next(score for score in scores["scores"] if score["name"] == name)


BPB, REFUSAL, SUM = "bpb/de", "safety/over_refusal", "reasoning/add"


@pytest.mark.parametrize(
    ("limit", "interval", "state"),
    [
        ({"max": 0.05}, [0.01, 0.049], "passed"),
        ({"max": 0.05}, [0.01, 0.05], "passed"),
        ({"max": 0.05}, [0.04, 0.3], "undecided"),
        ({"max": 0.05}, [0.06, 0.3], "failed"),
        ({"min": 0.5}, [0.5, 0.9], "passed"),
        ({"min": 0.5}, [0.4, 0.9], "undecided"),
        ({"min": 0.5}, [0.1, 0.499], "failed"),
        ({"max": 0.05}, None, "cannot be judged"),
    ],
)
def test_a_limit_is_held_against_the_interval_and_never_against_the_value(home, limit, interval, state):  # trap M6
    def change(scores, items):
        # A value on the far side of the limit changes nothing.
        one_of(scores, REFUSAL).update(interval=interval, value=0.9 if "max" in limit else 0.0)

    (found,) = rewritten(home, change, gates=[{"metric": REFUSAL, **limit}])
    assert found.state == state
    assert found.stops == (state in ("failed", "cannot be judged"))


def test_undecided_stops_the_chain_where_the_gate_asks_for_proof(home):
    def change(scores, items):
        one_of(scores, REFUSAL)["interval"] = [0.01, 0.2]

    for undecided, stops in (("pass", False), ("stop", True)):
        gate = {"metric": REFUSAL, "max": 0.05, "undecided": undecided}
        (found,) = rewritten(home, change, gates=[gate])
        assert (found.state, found.stops, found.closed) == ("undecided", stops, stops)
        assert "the interval of 200 prompts holds the limit" in found.why


@pytest.mark.parametrize(
    ("quality", "limit", "state"),
    [(0.30, 0.02, "passed"), (0.20, 0.01, "failed"), (0.40, 0.0, "passed"), (0.30, -0.05, "failed"),
     (0.40, -0.05, "passed"), (0.28, 0.02, "undecided")],
)  # fmt: skip
def test_a_regression_is_the_paired_interval_in_the_direction_of_the_score(home, quality, limit, state):
    # Bits a byte fall by what quality rises; noise of 0.05 in each of 200 documents of both leaves about 0.01 each way.
    gate = {"metric": BPB, "max_regression": limit}
    (found,) = judged(home, gate, judge_tuned={"quality": quality}).values()
    assert found.state == state
    assert found.value == pytest.approx(0.30 - quality, abs=0.02)
    assert found.interval[0] < found.value < found.interval[1]
    assert (found.baseline, found.unit) == ("base", "bits_per_byte")


def test_a_score_that_should_rise_regresses_when_it_falls(home):
    gates = [{"metric": SUM, "max_regression": 0.02}]
    (found,) = judged(home, *gates, judge_tuned={"quality": 0.10}).values()
    assert found.state == "failed"
    assert found.value == pytest.approx(0.1, abs=0.05)
    assert "at most 0.02 worse than base" in line(found)
    assert "worse by 0." in line(found)


def test_each_limit_and_each_score_of_a_pattern_is_judged_by_itself(home):  # trap M8
    def change(scores, items):
        for name, interval in (("en", [0.0, 0.01]), ("hi", [0.5, 0.7])):
            scores["scores"].append({**one_of(scores, REFUSAL), "name": f"{REFUSAL}/{name}", "interval": interval})
        one_of(scores, REFUSAL)["interval"] = [0.0, 0.04]

    gate = {"metric": f"{REFUSAL}*", "max": 0.05, "min": 0.0}
    found = {one.name: one.state for one in rewritten(home, change, gates=[gate])}
    assert found == {
        f"{REFUSAL} max": "passed", f"{REFUSAL}/en max": "passed", f"{REFUSAL}/hi max": "failed",
        f"{REFUSAL} min": "passed", f"{REFUSAL}/en min": "passed", f"{REFUSAL}/hi min": "passed",
    }  # fmt: skip


def test_a_score_that_is_missing_closes_the_gate(home):
    (found,) = judged(home, {"metric": "bpb/df", "max": 9.0, "undecided": "pass"}).values()
    assert (found.state, found.closed) == ("cannot be judged", True)
    assert found.why == "judge-tuned has no such score; did you mean 'bpb/de'?"


def test_a_limit_on_a_score_without_an_interval_is_told_why_there_is_none(home):
    def alike(scores, items):
        one_of(scores, BPB).update(interval=None, method=ALL_ALIKE)

    (found,) = rewritten(home, alike, gates=[{"metric": BPB, "max": 9.0}])
    assert (found.state, found.closed) == ("cannot be judged", True)
    assert found.why == f"{BPB} has no interval: every item says the same; 200 documents"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda scores, items: one_of(scores, BPB).update(set_hash="b" * 64), "must be measured with the same set"),
        (
            lambda scores, items: one_of(scores, BPB).update(suite_version=2),
            "must be measured with the same suite vers",
        ),
        (lambda scores, items: one_of(scores, BPB).update(better="none"), "has no better direction; set max or min"),
        (lambda scores, items: one_of(scores, BPB).update(items=None), "no interval: not paired"),
        (lambda scores, items: items[BPB]["numerator"].__setitem__(0, float("nan")), "no interval: not a number"),
        (lambda scores, items: items[BPB]["ids"].__setitem__(0, "x"), "must be measured on the same items"),
        (lambda scores, items: items[BPB].update(families=["one", "two"] * 100), "in the same families"),
    ],
)
def test_what_was_not_measured_alike_closes_a_gate_on_a_regression(home, change, words):  # trap M3
    (found,) = rewritten(home, change, gates=[{"metric": BPB, "max_regression": 5.0}])
    if found.interval is not None:
        assert found.interval != found.interval
    assert (found.state, found.closed) == ("cannot be judged", True)
    assert words in found.why


def test_few_families_cannot_pass_a_gate_on_a_regression(home):
    families = {key: {"families": 5} for key in ("judge_tuned", "judge_base")}
    (found,) = judged(home, {"metric": BPB, "max_regression": 5.0}, **families).values()
    assert (found.state, found.families) == ("cannot be judged", 5)
    families = {key: {"families": 8} for key in ("judge_tuned", "judge_base")}
    (found,) = judged(home, {"metric": BPB, "max_regression": 5.0}, **families).values()
    assert found.state == "passed"
    assert "n = 200 documents in 8 families" in line(found)


def test_a_baseline_that_is_not_measured_closes_the_gate_by_name(tmp_path):
    chain = make_chain(tmp_path, recipe({"metric": BPB, "max_regression": 0.01}))
    run_chain(chain, "text", "base", "tuned", "judge-tuned")
    (found,) = judge(chain, chain.nodes["judge-tuned"])
    assert found.closed
    assert found.why == "base is not measured: judge-base is not done; run it first"


def test_another_model_than_the_parent_can_be_the_baseline(home):
    more = {
        "other": {"kind": "fit", "data": "text", "max_steps": 20},
        "judge-other": {"kind": "judge", "from": "other", "data": "text", "quality": 0.9},
    }
    gate = {"metric": BPB, "max_regression": 0.01, "against": "other"}
    chain = run_chain(make_chain(home, recipe(gate, **more)))
    (found,) = judge(chain, chain.nodes["judge-tuned"])
    assert (found.baseline, found.state) == ("other", "failed")
    assert found.value == pytest.approx(0.6, abs=0.02)


def test_an_evaluation_of_another_recipe_can_be_the_baseline_by_its_path(home, tmp_path):
    released = run_chain(make_chain(tmp_path, recipe(judge_tuned={"quality": 0.4})))
    directory = released.nodes["judge-tuned"].job.directory
    (found,) = judged(home, {"metric": BPB, "max_regression": 0.05, "against": str(directory)}).values()
    assert (found.state, found.baseline) == ("failed", str(directory))
    assert found.value == pytest.approx(0.1, abs=0.02)
    gate = {"metric": BPB, "max_regression": 0.05, "against": str(tmp_path / "nowhere")}
    with pytest.raises(ConfigError, match="must be the directory of a finished evaluation; got "):
        make_chain(home, recipe(gate))


def test_an_override_is_bound_to_what_it_overrode(tmp_path, capsys):
    text = recipe({"metric": REFUSAL, "max": 0.05})
    chain = run_chain(make_chain(tmp_path, text))
    node = chain.nodes["judge-tuned"]
    assert not settle(chain, node)
    assert "the chain stops at its gates; why: " in capsys.readouterr().err
    assert settle(chain, node, [f"judge-tuned:{REFUSAL}"])
    assert "failed, overridden 2" in capsys.readouterr().out
    # The next run needs no flag, and the record holds it once.
    assert settle(chain, node)
    assert settle(chain, node, ["judge-tuned"])
    assert len(read_gates(node.job.directory)["overrides"]) == 1
    (found,) = judge(chain, node)
    assert (found.state, found.stops, found.closed) == ("failed", True, False)
    assert verdict_of([found]) == "1 overridden"
    stricter = make_chain(tmp_path, recipe({"metric": REFUSAL, "max": 0.01}))
    assert stricter.nodes["judge-tuned"].job.directory == node.job.directory
    assert not is_open(stricter, stricter.nodes["judge-tuned"])
    again = run_chain(make_chain(tmp_path, recipe({"metric": REFUSAL, "max": 0.05}, judge_tuned={"items": 300})))
    assert not is_open(again, again.nodes["judge-tuned"])


def test_an_override_of_one_metric_leaves_the_others_closed(home, capsys):
    chain = make_chain(home, recipe({"metric": REFUSAL, "max": 0.01}, {"metric": BPB, "max": 0.1}))
    node = chain.nodes["judge-tuned"]
    assert not settle(chain, node, [f"judge-tuned:{REFUSAL}"])
    assert [one.closed for one in judge(chain, node)] == [False, True]
    (end,) = [said for said in capsys.readouterr().err.splitlines() if "to go on" in said]
    assert end.endswith(f"to go on all the same: --override-gate judge-tuned:{BPB}")


def test_a_damaged_record_of_overrides_closes_the_gate_and_is_never_overwritten(home, capsys):
    chain = make_chain(home, recipe({"metric": REFUSAL, "max": 0.9}))
    node = chain.nodes["judge-tuned"]
    path = node.job.directory / "gates.json"
    for content in ("{", "[]", '{"format": 2}', '{"format": 1, "overrides": [{"x": 1}]}'):
        path.write_text(content)
        with pytest.raises(ArtifactError, match="must hold judgements and overrides"):
            overrides_of(node.job.directory)
        assert not is_open(chain, node)
        assert not settle(chain, node)
        assert path.read_text() == content
    path.unlink()
    assert "its gates cannot be judged" in capsys.readouterr().err


def test_gates_change_no_key_and_an_evaluation_is_not_run_again_for_them(home):
    plain = make_chain(home, recipe())
    asked = make_chain(home, recipe({"metric": BPB, "max": 3.0}))
    assert {node.name: node.job.key for node in plain} == {node.name: node.job.key for node in asked}


def test_the_page_shows_limit_interval_worst_items_and_replies_as_text(home):
    gates = [{"metric": BPB, "max_regression": 0.01}, {"metric": REFUSAL, "max": 0.5}]
    chain = run_chain(make_chain(home, recipe(*gates, judge_tuned={"quality": 0.1})))
    node = chain.nodes["judge-tuned"]
    assert not settle(chain, node)
    text = (node.job.directory / "gates.html").read_text(encoding="utf-8")
    assert "the chain stops here" in text
    assert text.index("bpb/de") < text.index("safety/over_refusal")
    assert "--override-gate judge-tuned:bpb/de" in text
    assert text.count("<svg") == 2
    rows = text[text.index("items that weigh most") :].count('<th scope="row">item')
    assert rows == 8
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert settle(chain, node, ["judge-tuned"])
    text = (node.job.directory / "gates.html").read_text(encoding="utf-8")
    assert "the chain goes on" in text
    assert "overridden 2" in text


# What cannot be decided is refused with the recipe.


def evaluate(*gates, **changes):
    plain = {"kind": "evaluate", "from": "sft", "data": "tokens", "suites": {"bpb": {}}, "gates": list(gates)}
    return EvaluateConfig.model_validate(plain | changes)


@pytest.mark.parametrize(
    ("gate", "path", "words"),
    [
        ({"metric": "bpb/de"}, "gates.0", "must have a limit; got none; set max, min or max_regression"),
        ({"metric": "bpb/de", "max": 1, "min": 2}, "gates.0.min", "must be at most max 1.0; got 2.0"),
        ({"metric": "bpb/de", "max": 1, "against": "sft"}, "gates.0.against", "is read with max_regression alone"),
        ({"metric": "safety/refusal", "min": 0.5}, "gates.0.metric", "must begin with one of the chosen suites (bpb)"),
    ],
)
def test_a_gate_that_says_nothing_is_refused_with_the_recipe(gate, path, words):
    (fault,) = Evaluate.check(evaluate({"metric": "bpb/all", "max": 9}, gate), None)
    assert fault.path == path.replace("gates.0", "gates.1")
    assert words in fault.message


def test_limits_must_be_numbers():
    with pytest.raises(ValueError, match="finite"):
        evaluate({"metric": "bpb/de", "max": float("nan")})


@pytest.mark.parametrize(
    ("name", "gate", "words"),
    [
        ("evaluate-dpo", {"metric": "bpb/de", "max_regression": 0.01, "against": "dpp"}, "did you mean 'dpo-ipo'?"),
        ("evaluate-dpo", {"metric": "bpb/de", "max_regression": 0.01, "against": "dpo"}, "another model stage"),
        ("evaluate-grpo", {"metric": "bpb/de", "max_regression": 0.01, "against": "dpo"},
         "must be decided before what goes on from its model, yet waits for it"),
    ],
)  # fmt: skip
def test_a_gate_that_could_never_be_decided_is_refused_before_anything_runs(tmp_path, name, gate, words):
    settings = [f"{name}.gates={json.dumps([gate])}"]
    with pytest.raises(ConfigError) as error:
        build_chain(load_recipe(DEFAULT, settings, REAL), tmp_path, REAL)
    assert words in " ".join(str(error.value).split())


def test_a_baseline_that_nothing_measures_is_refused_before_anything_runs(tmp_path):
    words = "judge-tuned.gates.0.against: must be measured as well; no evaluate stage has `from: base`; add one"
    with pytest.raises(ConfigError, match=words):
        make_chain(tmp_path, recipe({"metric": BPB, "max_regression": 0.01}, judge_base={"from": "tuned"}))


def test_a_model_without_a_parent_cannot_be_held_against_it(tmp_path):
    text = recipe(judge_base={"gates": [{"metric": BPB, "max_regression": 0.1}]})
    with pytest.raises(ConfigError, match="since base has no parent in this recipe; got parent; set max or min"):
        make_chain(tmp_path, text)


def test_gated_evaluations_come_before_all_that_goes_on_from_their_model(tmp_path):
    gated = ["evaluate-grpo.gates=[{metric: bpb/de, max_regression: 0.01}]"]
    ungated = ["evaluate-dpo.gates=[]"]
    plain = [node.name for node in build_chain(load_recipe(DEFAULT, ungated, REAL), tmp_path, REAL)]
    chain = build_chain(load_recipe(DEFAULT, gated, REAL), tmp_path, REAL)
    order = [node.name for node in chain]
    assert sorted(order) == sorted(plain)
    assert plain.index("dpo") < plain.index("evaluate-grpo")
    assert order.index("evaluate-sft") < order.index("evaluate-grpo") < min(map(order.index, ("dpo", "dpo-ipo")))
    assert order.index("evaluate-dpo") < min(map(order.index, ("qlora", "export")))
    chosen = [node.name for node in chain.selection(None, "dpo")]
    assert {"evaluate-grpo", "evaluate-sft"} < set(chosen)
    assert "evaluate-dpo" not in chosen
    assert "evaluate-sft" not in [
        node.name for node in build_chain(load_recipe(DEFAULT, ungated, REAL), tmp_path, REAL).selection(None, "dpo")
    ]


def test_judgements_are_plain_data(home):
    (found,) = judged(home, {"metric": BPB, "max": 3.0}).values()
    assert json.loads(json.dumps(dataclasses.asdict(found)))["state"] == "passed"
    assert STAGES["judge"].Config.model_fields["gates"].json_schema_extra == {"operational": True}
