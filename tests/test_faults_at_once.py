"""The faults of one field, stage or gate do not hide those of another, and none is told that only follows from it."""

import json

import pytest
import yaml

from pipelines.mending import common, mended, without_echoes
from pipelines.recipe import DEFAULT
from pipelines.run import main
from stages import STAGES
from stages.base import Fault
from stages.evaluate import EvaluateConfig

NONSENSE = [[[]]]
"""A value that no field takes."""


@pytest.fixture
def told(tmp_path, capsys):
    """What ``--plan`` says of the default recipe after a change, as (path, message)."""

    def tell(change, mode="--plan"):
        recipe = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))
        change(recipe["stages"])
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        assert main([mode, "--pipeline", str(path), "--runs", str(tmp_path / "runs")]) == 2
        lines = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
        return [tuple(line.split(": ", 1)) for line in lines]

    return tell


GATES = [
    ({"metric": "bpb/all", "max": "x"}, "0.max", "must be a valid number"),
    ({"metric": "bpb/al", "max": 1}, "1.metric", "did you mean bpb/all?"),
    ({"metric": "nosuch/all", "max": 1}, "2.metric", "must begin with one of the chosen suites"),
    ({"metric": "bpb/all"}, "3", "must have a limit"),
    ({"metric": "bpb/all", "max": 1, "min": 2}, "4.min", "must be at most max 1.0"),
    ({"metric": "bpb/all", "max_regresion": 1}, "5.max_regresion", "did you mean 'max_regression'?"),
    ({"metric": "bpb/all", "max": 1, "against": "sft"}, "6.against", "is read with max_regression alone"),
    ({"metric": "bpb/all", "max_regression": 0.1, "against": "stf"}, "7.against", "must be parent or another model"),
    (5, "8", "must be a mapping of fields"),
    ({"max": 1}, "9.metric", "is required and absent"),
    ({"metric": "bpb/all", "max": 1, "undecided": "go"}, "10.undecided", "must be one of pass, stop"),
]


@pytest.mark.parametrize("mode", ["--plan", "--status"])
def test_gates_that_are_wrong_in_all_ways_are_told_in_one_round(told, mode):  # traps T7, M8
    def change(stages):
        stages["evaluate-dpo"]["gates"] = [gate for gate, _, _ in GATES]

    found = told(change, mode)
    assert {path for path, _ in found} == {f"evaluate-dpo.gates.{place}" for _, place, _ in GATES}
    assert len(found) == len(GATES)
    for _, place, words in GATES:
        assert any(path == f"evaluate-dpo.gates.{place}" and words in message for path, message in found), place


def test_a_wrong_type_hides_neither_the_other_fields_nor_the_other_stages_nor_the_chain(told):  # trap T7
    def change(stages):
        stages["sft"]["lr"] = "high"
        stages["sft"]["schedule"] = {"kind": "wsd", "warmup_steps": 900, "decay_steps": 0}
        stages["grpo"]["max_completion_length"] = 100
        stages["pretrain"]["mixture"] = {"nosuch": 1.0}
        stages["evaluate-dpo"]["gates"][0]["metric"] = "bpb/al"

    paths = [path for path, _ in told(change)]
    assert {"sft.lr", "sft.schedule.warmup_steps", "grpo.max_completion_length", "pretrain.mixture.nosuch"} < set(paths)
    assert "evaluate-dpo.gates.0.metric" in paths


def test_a_fault_that_another_value_of_a_faulty_field_might_end_is_not_told(told):
    def change(stages):
        stages["grpo"]["max_length"] = "long"
        stages["grpo"]["max_completion_length"] = 1000  # more than the default max_length holds

    assert [path for path, _ in told(change)] == ["grpo.max_length"]


def test_a_misspelt_suite_does_not_make_its_gates_wrong(told):
    def change(stages):
        suites = stages["evaluate-dpo"]["suites"]
        suites["bpd"] = suites.pop("bpb")

    assert [path for path, _ in told(change)] == ["evaluate-dpo.suites.bpd"]


def test_a_misspelt_kind_hides_no_gate_of_a_stage_beside_it_and_closes_none(told):
    def change(stages):
        stages["evaluate-grpo"]["kind"] = "evaluat"
        stages["evaluate-sft"]["gates"] = [{"metric": "bpb/al", "max": 1}]

    assert [path for path, _ in told(change)] == ["evaluate-grpo.kind", "evaluate-sft.gates.0.metric"]


def first_of(kind):
    stages = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))["stages"]
    return next((name for name, section in stages.items() if section["kind"] == kind), None)


@pytest.mark.parametrize("kind", ["tasks", "export"])
def test_one_wrong_field_is_one_path(told, kind):
    """Whatever else is told would be an echo."""
    name = first_of(kind)
    for field, info in STAGES[kind].Config.model_fields.items():
        place = info.alias or field

        def change(stages, place=place):
            stages[name][place] = NONSENSE

        if place != "kind":
            assert {path[: len(f"{name}.{place}")] for path, _ in told(change)} == {f"{name}.{place}"}


def test_sections_are_mended_with_values_unlike_one_another():
    raw = {
        "kind": "evaluate",
        "from": "a",
        "suites": {"bpb": {"seq_len": "long"}},
        "batch_size": -1,
        "precison": "bf16",
    }
    found = mended(EvaluateConfig, raw).configs
    assert {config.batch_size for config in found} >= {1, 2**10, 32}
    assert {config.precision for config in found} >= {"bf16", "fp32"}
    assert len({config.suites.bpb.seq_len for config in found}) > 2
    assert mended(EvaluateConfig, 5).configs == []


def test_what_is_common_and_what_is_an_echo():
    one, other = Fault("a.lr", "x"), Fault("a.b", "y")
    assert common([[one, other, one], [one], [other, one]]) == [one]
    assert common([]) == []
    assert without_echoes([one, other, Fault("a", "z"), Fault("a.lr.k", "w")], ["a.lr"]) == [other]
