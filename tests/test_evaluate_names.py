"""What an evaluation will give is known before it runs: misspelt gates, unlike baselines, faulty files (TRAPS M8)."""

import json
import math

import evaluated
import pytest
import yaml
from evaluated import config, evaluate
from fake_chain import write_recipe

from pipelines.chain import build_chain
from pipelines.gates_names import names_of
from pipelines.recipe import DEFAULT, load_recipe
from stages import STAGES
from stages.base import ConfigError
from stages.evaluate import Evaluate
from stages.runtime.gates import GateConfig
from stages.runtime.suites import names
from stages.runtime.suites.config import Suites
from stages.runtime.suites.registry import SUITES
from stages.runtime.suites.sets import Prompt, Sets, Source, made_sets


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    return evaluated.make_parents(tmp_path_factory.mktemp("evaluated"))


def test_every_score_of_an_evaluation_is_among_the_names_that_were_known(parents, tmp_path):
    _, output = evaluate(tmp_path, parents)
    found = {score["name"] for score in json.loads((output / "scores.json").read_text())["scores"]}
    sets = made_sets({field: path / "output" for field, path in parents.items()}, None)
    known = set(names.score_names(config().suites, sets))
    assert found <= known
    # Of facts and replies some cannot be judged: no fact is easy, and a reply of eight tokens is short.
    assert known - found <= {
        *(f"{score}/easy" for score in ("margins/accuracy", "margins/nats_per_token")),
        *(f"decoding/language_{how}{part}" for how in ("greedy", "sampled") for part in ("", "/de", "/en", "/hi")),
        *(f"decoding/repetition_ratio_{how}" for how in ("greedy", "sampled")),
    }


@pytest.mark.parametrize(
    ("suites", "sets", "expected"),
    [
        ({"bpb": {}}, Sets(documents=[Source("wiki", "en", "science"), Source("news", "en", "")]),
         ["bpb/all", "bpb/en", "bpb/source/wiki", "bpb/source/news", "bpb/domain/science"]),
        ({"bpb": {}}, Sets(), ["bpb/all", "bpb/*"]),
        ({"safety": {}}, Sets(prompts=[Prompt("benign", "en", "benign/a")] * 2 + [Prompt("benign", "de", "benign/b")]),
         ["safety/over_refusal", "safety/over_refusal/de", "safety/over_refusal/en", "safety/over_refusal/a"]),
        ({"reasoning": {}}, Sets(questions=["add"]), ["reasoning/all", "reasoning/answered", "reasoning/add"]),
        ({"code": {"k": [1]}}, Sets(problems=["own"]), ["code/own/pass_at_1", "code/own/valid_python"]),
        ({"harness": {"local": ["tasks_local"]}}, Sets(), ["harness/tasks_local/exact_match"]),
        ({"harness": {"local": [], "tasks": ["mmlu"]}}, Sets(), ["harness/*"]),
        ({"samples": {}}, Sets(), []),
    ],
)  # fmt: skip
def test_the_names_of_a_suite_go_by_the_parts_of_its_set(suites, sets, expected):
    assert names.score_names(Suites.model_validate(suites), sets) == expected


@pytest.mark.parametrize(
    ("name", "metric", "fits"),
    [
        ("bpb/de", "bpb/de", True), ("bpb/de", "bpb/d*", True), ("bpb/de", "bpb/dee", False),
        ("bpb/*", "bpb/de", True), ("bpb/*", "safety/*", False), ("harness/*", "harness/mmlu*", True),
        ("format/stop_rate/*", "format/stop*", True), ("format/stop_rate/*", "format/stop_rate", False),
    ],
)  # fmt: skip
def test_a_gate_may_ask_for_a_name_that_is_known_in_part(name, metric, fits):
    assert names.may_fit(name, metric) is fits


def planned(tmp_path, change):
    """The default recipe with ``change`` made to its stages, as a chain."""
    recipe = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))
    change(recipe["stages"])
    path = write_recipe(tmp_path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    return build_chain(load_recipe(path), tmp_path / "runs", STAGES)


def gates(*found):
    def change(stages):
        stages["evaluate-dpo"]["gates"] = list(found)

    return change


@pytest.mark.parametrize(
    ("metric", "nearest"),
    [
        ("bpb/dee", "bpb/de"), ("safety/over_refusals", "safety/over_refusal"),
        ("reasoning/partiy", "reasoning/parity"),
        ("bpb/source/wikipedia", "bpb/source/wikipedia-en"), ("margins/accuracy/captial", "margins/accuracy/capital"),
        ("safety/refusal/sumggle", "safety/refusal/smuggle"),
    ],
)  # fmt: skip
def test_a_misspelt_metric_is_told_at_the_plan_with_the_nearest_score(tmp_path, metric, nearest):
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, gates({"metric": "bpb/hi", "max": 3.0}, {"metric": metric, "max": 3.0}))
    (fault,) = caught.value.faults
    assert fault.path == "evaluate-dpo.gates.1.metric"
    assert f"got {metric!r}; did you mean {nearest}" in fault.message


def test_patterns_and_scores_of_every_suite_are_none_the_less_accepted(tmp_path):
    asked = ["safety/over_refusal*", "bpb/d?", "decoding/said_greedy/hi", "format/stop_rate/de", "margins/recall_at_20"]
    chain = planned(tmp_path, gates(*({"metric": metric, "max": math.tau} for metric in asked)))
    kinds = {name: STAGES[stage.kind] for name, stage in chain.recipe.stages.items()}
    known = names_of(chain.recipe, kinds, "evaluate-dpo")
    assert len(known) == len(set(known)) > 100
    assert not [name for name in known if name.endswith("*")]


def test_a_baseline_that_will_not_have_the_score_is_told_at_the_plan(tmp_path):
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, gates({"metric": "decoding/said_greedy", "max_regression": 0.1}))
    (fault,) = caught.value.faults
    assert fault.path == "evaluate-dpo.gates.0.against"
    assert "evaluate-grpo lacks decoding/said_greedy; add the suite there" in fault.message


@pytest.mark.parametrize(
    ("field", "said"),
    [("documents", "suites.bpb.documents is 20 here, 21"), ("precision", "precision is fp32 here, bf16")],
)
def test_a_baseline_that_will_be_measured_otherwise_is_told_at_the_plan(tmp_path, field, said):
    def change(stages):
        gates({"metric": "bpb/de", "max_regression": 0.1, "against": "sft"})(stages)
        there = stages["evaluate-sft"]
        (there if field == "precision" else there["suites"]["bpb"])[field] = {"documents": 21}.get(field, "bf16")

    with pytest.raises(ConfigError, match=f"evaluate-dpo.gates.0.against: must be measured alike; {said}"):
        planned(tmp_path, change)


def test_a_gate_on_no_score_of_the_finished_sets_is_told_before_anything_is_scored(parents):
    gated = config(gates=[{"metric": "bpb/fr", "max": 2.0}, {"metric": "safety/refusal/c", "min": 0.5},
                          {"metric": "bpb/de", "max": 2.0}])  # fmt: skip
    faults = Evaluate.check_parents(gated, None, parents)
    assert [fault.path for fault in faults] == ["gates.0.metric", "gates.1.metric"]
    # Of sets that are not there yet nothing is known.
    assert Evaluate.check_parents(gated, None, {"from_": parents["from_"]}) == []


def test_a_score_without_a_better_direction_has_no_regression(parents, tmp_path):
    (fault,) = names.metric_faults([GateConfig(metric="decoding/agreement/en", max_regression=0.1)], ["decoding/*"])
    assert fault.path == "gates.0.max_regression"
    assert names.metric_faults([GateConfig(metric="decoding/agreement/en", max=0.1)], ["decoding/*"]) == []
    _, output = evaluate(tmp_path, parents)
    scores = json.loads((output / "scores.json").read_text())["scores"]
    undirected = {score["name"] for score in scores if score["better"] == "none" and score["part"] is None}
    assert undirected == set(names.NO_DIRECTION)


BAD = [{"question": "which?", "options": ["a", "b"], "answer": 0}]
FILE = {"name": "own_local", "type": "file", "kind": "choice", "licence": "CC0"}


def only_harness(path):
    suites = {"harness": {"local": [], "files": [{**FILE, "path": str(path)}]}}
    return {"suites": suites} | dict.fromkeys(evaluated.INPUTS)


def test_the_first_rows_of_a_file_of_questions_are_looked_at_with_the_recipe(tmp_path):
    path = tmp_path / "own.jsonl"
    evaluated.write_rows(path, BAD)
    (fault,) = Evaluate.check(config(**only_harness(path)), None)
    assert fault.path == "suites.harness.files[0].path"
    assert "in row 1: no field choices, but question, options, answer" in fault.message
    path.write_text('{"question": "which?",\n', encoding="utf-8")
    (fault,) = Evaluate.check(config(**only_harness(path)), None)
    assert "own.jsonl cannot be read: line 1 is no JSON" in fault.message
    broken = tmp_path / "own.yaml"
    broken.write_text("- [", encoding="utf-8")
    (fault,) = Evaluate.check(config(**only_harness(broken)), None)
    assert "own.yaml cannot be read" in fault.message


def test_later_rows_are_read_before_anything_is_scored(parents, tmp_path, monkeypatch):
    path = tmp_path / "own.jsonl"
    good = [{"question": f"which {number}?", "choices": ["a", "b"], "answer": 0} for number in range(100)]
    evaluated.write_rows(path, [*good, *BAD])
    both = {"bpb": evaluated.SUITES["bpb"], **only_harness(path)["suites"]}
    changes = only_harness(path) | {"suites": both, "data": "data"}
    assert Evaluate.check(config(**changes), None) == []

    def never(bench, section):
        raise AssertionError("a suite was run")

    monkeypatch.setitem(SUITES, "bpb", SUITES["bpb"]._replace(run=never))
    with pytest.raises(ConfigError, match=r"suites\.harness\.files\[0\]\.path: must hold questions; .* in row 101"):
        evaluate(tmp_path / "run", parents, **changes)


def test_a_published_task_is_looked_up_with_the_recipe(monkeypatch):
    monkeypatch.setattr("stages.runtime.suites.published.task_manager", Manager)
    asked = {"suites": {"harness": {"local": [], "tasks": ["arc_easy", "gsm8k", "mmlu", "helaswag"]}}}
    (fault,) = Evaluate.check(config(**asked | dict.fromkeys(evaluated.INPUTS)), None)
    assert fault.path == "suites.harness.tasks"
    assert "got helaswag; did you mean hellaswag?" in fault.message


class Manager:
    """Stands for the harness's index, which takes seconds to read."""

    def __init__(self, published):
        self.all_tasks = ["hellaswag", "winogrande"]


def test_needles_in_a_language_without_text_are_told_before_anything_is_scored(parents, tmp_path, monkeypatch):
    def never(bench, section):
        raise AssertionError("a suite was run")

    monkeypatch.setitem(SUITES, "bpb", SUITES["bpb"]._replace(run=never))
    both = {"bpb": evaluated.SUITES["bpb"], "needles": {"lengths": [112], "languages": ["hi"]}}
    with pytest.raises(ConfigError, match=r"suites\.needles\.languages: must be languages with held-out documents"):
        evaluate(tmp_path, parents, **dict.fromkeys(evaluated.INPUTS[1:]) | {"suites": both})
