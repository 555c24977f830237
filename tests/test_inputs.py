"""A stage that names several models and data sets: what it needs, what is missing, checked and recorded."""

from typing import Any, ClassVar, Literal

import pytest
from fake_chain import RECIPE, STAGES, records, write_recipe
from pydantic import Field

from pipelines.run import main
from stages.base import Fault, Input, Stage, StageConfig, StageResult
from stages.runtime.edges import read_edges


class JudgeConfig(StageConfig):
    kind: Literal["judge"]
    """This stage."""
    from_: str = Field(alias="from")
    """Model that is judged."""
    beside: str | None = None
    """Model that it is held against."""
    texts: str | None = None
    """Corpus that it is judged on."""
    more: str | None = None
    """Another corpus."""


class Judge(Stage):
    kind: ClassVar[str] = "judge"
    Config: ClassVar[type[StageConfig]] = JudgeConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "scores"
    inputs: ClassVar[dict[str, Input]] = {
        "from_": Input("model"),
        "beside": Input("model", optional=True),
        "texts": Input("corpus", optional=True),
        "more": Input("corpus", optional=True),
    }

    @classmethod
    def check_parents(cls, config: Any, model: Any, parents: Any) -> list[Fault]:
        words = {field: (path / "output" / "text.txt").read_text() for field, path in parents.items()
                 if cls.inputs[field].produces == "corpus"}  # fmt: skip
        return [Fault(field, "must hold no poison; got some") for field, word in words.items() if "poison" in word]

    def run(self, context: Any) -> StageResult:
        (context.output / "fields.txt").write_text(" ".join(sorted(context.parents)))
        return StageResult({"inputs": len(context.parents)})


ALL = {**STAGES, "judge": Judge}
TEXT = (
    RECIPE
    + """  other:
    kind: gather
    sources:
      - {type: text, text: other}
  judge:
    kind: judge
    from: tuned
    beside: train
    texts: gather
    more: other
"""
)


@pytest.fixture
def run(tmp_path):
    def run(*argv):
        path = write_recipe(tmp_path, TEXT)
        return main([*argv, "--pipeline", str(path), "--runs", str(tmp_path / "runs")], ALL)

    return run


def test_every_missing_training_ancestor_is_named_with_the_command_that_runs_it(run, tmp_path, capsys):
    assert run("--stage", "judge") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line, (field, stage) in zip(lines, [("from", "tuned"), ("beside", "train")], strict=True):
        assert f"judge.{field}: must be a finished stage; got {stage}, stale (never run); run: deepspeed " in line
        assert f"--stage {stage}" in line
    assert not (tmp_path / "runs").exists()


def test_all_inputs_are_handed_over_verified_and_recorded(run, tmp_path):
    assert run("--stage", "train") == run("--stage", "tuned") == 0
    assert run("--stage", "judge") == 0
    judge = next((tmp_path / "runs" / "toy").glob("judge-*"))
    assert (judge / "output" / "fields.txt").read_text() == "beside from_ more texts"
    found = records(tmp_path)
    made_from = {field: found[link["stage"]]["output_digest"] for field, link in found["judge"]["parents"].items()}
    assert {field: link["digest"] for field, link in found["judge"]["parents"].items()} == made_from
    assert {edge["name"].split("-")[0] for edge in read_edges(judge)["inputs"]} == {"gather", "other", "train", "tuned"}


def test_one_stage_may_be_named_by_several_inputs(run, tmp_path):
    assert run("--stage", "train") == run("--stage", "tuned") == 0
    assert run("--stage", "judge", "--set", "judge.beside=tuned", "--set", "judge.more=gather") == 0
    assert records(tmp_path)["judge"]["metrics"] == {"inputs": 4}


def test_inputs_left_out_are_no_parents(run, tmp_path):
    assert run("--stage", "train") == 0
    argv = [word for name in ("beside", "texts", "more") for word in ("--set", f"judge.{name}=null")]
    assert run("--stage", "judge", "--set", "judge.from=train", *argv) == 0
    assert set(records(tmp_path)["judge"]["parents"]) == {"from_"}


def test_finished_parents_are_checked_field_by_field_before_anything_runs(run, tmp_path, capsys):
    poison = ["--set", "other.sources.0.text=poison"]
    assert run("--stage", "other", *poison) == 0
    assert run("--plan", *poison) == 2
    assert "judge.more: must hold no poison" in capsys.readouterr().err


def test_an_input_that_names_the_wrong_kind_of_stage_is_refused(run, capsys):
    assert run("--plan", "--set", "judge.texts=train", "--set", "judge.beside=gather") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": must")[0].split(": ")[-1] for line in lines] == ["judge.beside", "judge.texts"]
