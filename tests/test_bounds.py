"""Every number that a recipe can set has a least and a greatest value, or a reason why not; words are checked too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from data.languages import ISO_639_1
from pipelines.recipe import recipe_schema
from pipelines.run import main

FREE = {
    "RowFilter": "compared with the values of the user's own rows, whatever they are",
    "GateConfig": "compared with scores of any unit",
    "GRPOConfig.rewards": "weights on a common scale; of any sign, one above 0: stages.grpo",
    "PretrainConfig.mixture": "weights on a common scale, above 0: stages.runtime.mixture_settings",
    "MixturePhase.mixture": "weights on a common scale, above 0: stages.runtime.mixture_settings",
    "StreamConfig.passes": "at least 1 by a message of its own: data.stream_config",
    "TokenizerConfig.language_shares": "shares on a common scale, above 0: stages.tokenizer",
}
LOWER, UPPER = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}


def numbers(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every schema of a number below ``node``, with the names of the fields that lead there."""
    if isinstance(node, list):
        for item in node:
            yield from numbers(item, path)
    elif isinstance(node, dict):
        if node.get("type") in ("integer", "number"):
            yield path, node
        for key, item in node.items():
            if key == "properties":
                for name, field in item.items():
                    yield from numbers(field, (*path, name))
            elif key != "$defs":
                yield from numbers(item, path)


def schema_numbers() -> list[tuple[str, dict[str, Any]]]:
    schema = recipe_schema()
    parts = [*schema["$defs"].items(), ("Recipe", {key: schema[key] for key in schema if key != "$defs"})]
    return [(".".join(path), number) for title, part in parts for path, number in numbers(part, (title,))]


def is_free(path: str) -> bool:
    return any(path == free or path.startswith(f"{free}.") for free in FREE)


def test_every_numeric_field_of_every_stage_is_bounded_on_both_sides():
    found = schema_numbers()
    assert len(found) > 200
    unbounded = [
        path
        for path, number in found
        if "enum" not in number and not (LOWER & set(number) and UPPER & set(number)) and not is_free(path)
    ]
    assert unbounded == []


def test_what_is_listed_as_free_is_there_and_is_not_bounded_by_now():
    loose = {path for path, number in schema_numbers() if not (LOWER & set(number) and UPPER & set(number))}
    assert [free for free in FREE if not any(path == free or path.startswith(f"{free}.") for path in loose)] == []


@pytest.fixture
def plan(tmp_path, capsys):
    """``--plan`` of the default recipe with a value set; the code and what it said."""

    def run(*settings, runs=tmp_path / "runs"):
        argv = [word for setting in settings for word in ("--set", setting)]
        code = main(["--plan", "--runs", str(runs), *argv])
        captured = capsys.readouterr()
        return code, captured.err if code else captured.out

    return run


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("pretrain.global_batch_size=1000000000000", "less than or equal to 1048576; got 1000000000000; set 1048576"),
        ("pretrain.lr=1e18", "less than or equal to 10; got 1e+18; set 10.0 or less"),
        ("evaluate-sft.batch_size=1000000000000", "less than or equal to 65536"),
        ("evaluate-sft.suites.reasoning.questions=601", "the 600 questions that tasks holds out of a task; got 601"),
        ("pretrain.betas=[0.9, 1.5]", "less than 1; got 1.5"),
        ("pretrain.max_steps=10000000000", "less than or equal to 1000000000"),
        ("qlora.adapter.rank=1000000000", "less than or equal to 65536"),
        ("grpo.temperature=1e9", "less than or equal to 100"),
        ("clean.sources.0.language=xx", "must be a language of ISO 639-1, or three letters of ISO 639-3; got 'xx'"),
        ("messages.sources.0.language=cn", "got 'cn'; did you mean 'zh'?"),
        ('clean.sources.0.template="{title"', "must write fields as {field} or {field.key}; got '{title'; close"),
        ('clean.sources.0.template="{title!r}"', "got '{title!r}'"),
        ('clean.sources.0.template="{title.__class__}"', "got 'title.__class__', which is an attribute"),
        ('clean.sources.0.template="title"', "must name a field of the rows, or all texts were alike; got 'title'"),
    ],
)
def test_what_no_run_could_mean_is_refused_in_one_line_with_value_and_way_out(plan, setting, rule):
    code, err = plan(setting)
    assert code == 2
    (line,) = err.splitlines()
    assert re.match(rf"(line \d+: )?{re.escape(setting.partition('=')[0])}[.:]", line)
    assert rule in line


@pytest.mark.parametrize(
    "template", ["{title}\n\n{extract}", "{a.b-c}", "int main() {return 0} {text}", "{ {text} }", "{x: 1} {text}"]
)
def test_templates_whose_other_braces_are_text_stay_valid(template):
    from pydantic import TypeAdapter

    from data.source_config import Template

    assert TypeAdapter(Template).validate_python(template) == template


def test_languages_are_those_of_iso_639_1():
    assert len(ISO_639_1 - {"bh", "sh"}) == 183
    assert {"en", "de", "hi", "zh", "ar", "nb"} < ISO_639_1
    assert "xx" not in ISO_639_1


def test_runs_that_cannot_be_written_are_refused_by_plan_and_run_alike(plan, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    for runs, words in (("/proc/x", "/proc cannot be written"), (tmp_path / "file" / "runs", "file is no folder"),
                        ("x" * 300, "File name too long")):  # fmt: skip
        code, err = plan(runs=runs)
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith("--runs must be a folder that can be written; got ")
        assert words in line
        assert main(["--all", "--runs", str(runs)]) == 2
        assert "--runs must be a folder" in capsys.readouterr().err
    assert plan()[0] == 0
    assert not (tmp_path / "runs").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
