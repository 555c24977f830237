"""Programming problems with tests: rows of HumanEval's, MBPP's or one's own form, and programs made of completions.

A problem of form ``function`` ends in the head of a function that the completion goes on with; one of form ``script``
says in words (a docstring) what the completion must define. In both the program is the prompt, then the completion,
then, as a part of its own, the tests.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.compressed import UnreadableFile, bounded_lines
from data.errors import DataError

FORMAT = 1
PROBLEMS_FILE, INFO_FILE = "problems.jsonl", "problems.json"
EMPTY_BODY = "    pass\n"
"""What stands for the body where nothing was written."""
MAX_ROW_BYTES = 1 << 20
SHOWN_FAULTS = 10
"""Faults of a file that are told one by one."""
_FIELDS = ("id", "source", "form", "prompt", "question", "entry_point", "tests", "solution")
_REQUIRED = {
    "humaneval": ("task_id", "prompt", "entry_point", "canonical_solution", "test"),
    "mbpp": ("task_id", "code", "test_list"),
    "plain": ("id", "prompt", "tests", "solution"),
}
_ASKS_FUNCTION = (
    "Complete this Python function. Reply with the whole function in one code block.\n\n```python\n{prompt}```"
)
_ASKS_SCRIPT = "{text}\nReply with Python code in one code block. It must pass these tests:\n\n```python\n{tests}\n```"
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_SCRIPT_ENDS = re.compile(r'^(?:assert\b|print\(|if __name__|"""|```)', re.MULTILINE)


def read_problems_file(path: Path, source: str, form: str, limit: int | None = None) -> list[dict[str, str]]:
    """Rows of ``path`` as problems of the source of that name; ``form`` is a ``ProblemFormat``.

    Raises:
        DataError: with line and field of the first ten faulty rows and how many more there are, or for a file that
            cannot be read.
    """
    found: list[dict[str, str]] = []
    faults: list[tuple[str, str]] = []
    try:
        for number, line in enumerate(bounded_lines(path, MAX_ROW_BYTES), start=1):
            if limit is not None and len(found) + len(faults) >= limit:
                break
            if line.content is not None and not line.content.strip():
                continue
            try:
                found.append(_problem(_parsed(line.content), source, form))
            except ValueError as error:
                faults.append(("", f"{path.name}, line {number}: {error}"))
    except (UnreadableFile, OSError) as error:
        raise DataError([("", f"{path.name} must be a readable .jsonl file; {error}; give another")]) from error
    repeated = [name for name, count in Counter(row["id"] for row in found).items() if count > 1]
    faults += [("", f"{path.name}: ids must differ; {name} comes more than once; rename one") for name in repeated]
    if not faults and not found:
        faults = [("", f"{path.name} must hold problems; it is empty; give another")]
    if faults:
        raise DataError(first_faults(faults, path.name))
    return found


def first_faults(faults: Sequence[tuple[str, str]], what: str) -> list[tuple[str, str]]:
    """The first ``SHOWN_FAULTS``, and a line with the number of the others of ``what``."""
    more = len(faults) - SHOWN_FAULTS
    rest = "1 more fault" if more == 1 else f"{more:,} more faults"
    return [*faults[:SHOWN_FAULTS], *([("", f"{what}: and {rest} like these")] if more > 0 else [])]


def _parsed(content: bytes | None) -> Mapping[str, Any]:
    if content is None:
        raise ValueError(f"must be at most {MAX_ROW_BYTES:,} bytes; it is longer; leave it out")
    row = json.loads(content)
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object; got {type(row).__name__}")
    return row


def _problem(row: Mapping[str, Any], source: str, form: str) -> dict[str, str]:
    missing = [name for name in _REQUIRED[form] if row.get(name) in (None, "", [])]
    # An empty solution is a fault of HumanEval's form; where it says nothing of tests there is nothing to run.
    if missing:
        raise ValueError(f"must have {', '.join(_REQUIRED[form])}; {', '.join(missing)} is missing; is format right?")
    found = {"humaneval": _humaneval, "mbpp": _mbpp, "plain": _plain}[form](row)
    wrong = [name for name, value in found.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"must have text in {', '.join(wrong)}; got something else")
    return {"source": source, **found}


def _humaneval(row: Mapping[str, Any]) -> dict[str, str]:
    tests = f"{row['test']}\n\ncheck({row['entry_point']})\n"
    return _function(str(row["task_id"]), row["prompt"], row["entry_point"], tests, row["canonical_solution"])


def _plain(row: Mapping[str, Any]) -> dict[str, str]:
    if row.get("entry_point"):
        return _function(str(row["id"]), row["prompt"], row["entry_point"], row["tests"], row["solution"])
    return _script(str(row["id"]), row["prompt"], row["tests"], row["solution"])


def _mbpp(row: Mapping[str, Any]) -> dict[str, str]:
    text, tests = row.get("text") or row.get("prompt"), row["test_list"]
    if not isinstance(text, str) or not isinstance(tests, list) or not all(isinstance(one, str) for one in tests):
        raise ValueError("must have text or prompt, and test_list as a list of texts; got something else")
    imports = row.get("test_imports") or row.get("test_setup_code") or []
    lines = [imports] if isinstance(imports, str) else list(imports)
    return _script(f"MBPP/{row['task_id']}", text, "\n".join([*lines, *tests]), row["code"], "\n".join(tests))


def _function(name: str, prompt: str, entry_point: str, tests: str, solution: str) -> dict[str, str]:
    question = _ASKS_FUNCTION.format(prompt=prompt if str(prompt).endswith("\n") else f"{prompt}\n")
    return {"id": name, "form": "function", "prompt": prompt, "question": question, "entry_point": entry_point,
            "tests": tests, "solution": solution}  # fmt: skip


def _script(name: str, text: str, tests: str, solution: str, shown: str | None = None) -> dict[str, str]:
    shown = tests if shown is None else shown
    # Three quotes within would end the docstring; the text is there to be read.
    prompt = '"""\n' + f"{text}\n{shown}".replace("\\", "\\\\").replace('"""', "'''") + '\n"""\n'
    return {"id": name, "form": "script", "prompt": prompt, "question": _ASKS_SCRIPT.format(text=text, tests=shown),
            "entry_point": "", "tests": tests, "solution": solution}  # fmt: skip


def program(problem: Mapping[str, str], code: str) -> tuple[str, str]:
    """The two parts of the program: prompt and completion, and the tests that follow it."""
    return f"{problem['prompt']}{code}\n", problem["tests"]


def continuation(problem: Mapping[str, str], text: str) -> str:
    """What of a continuation counts: a body ends where a line begins at the margin, a script where tests begin."""
    if problem["form"] == "script":
        end = _SCRIPT_ENDS.search(text)
        return text[: end.start()] if end else text
    kept = []
    for place, line in enumerate(text.split("\n")):
        # The first line goes on where the prompt ends; a closing bracket at the margin goes on with its own.
        if place and line[:1] not in ("", " ", "\t", ")", "]", "}", "\r"):
            break
        kept.append(line)
    return "\n".join(kept)


def reply_code(problem: Mapping[str, str], text: str) -> str:
    """The code of a chat's reply: its first fenced block, else all of it; a body or the whole function both fit."""
    block = _FENCE.search(text)
    code = block[1] if block else text
    if problem["form"] == "function" and re.search(rf"^(?:async )?def {problem['entry_point']}\b", code, re.MULTILINE):
        # The prompt's own head stands without a body; the function that follows takes its place.
        return f"{EMPTY_BODY}\n\n{code}"
    return code


def write_problems(directory: Path, rows: Sequence[Mapping[str, str]], sources: Iterable[Mapping[str, Any]]) -> Any:
    """Write the artifact; returns the content of ``problems.json``.

    Raises:
        DataError: when two problems have one id.
    """
    repeated = [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    if repeated:
        raise DataError([("sources", f"must give problems with ids of their own; {repeated[0]} comes twice; drop one")])
    text = "".join(json.dumps({name: row[name] for name in _FIELDS}, ensure_ascii=False) + "\n" for row in rows)
    (directory / PROBLEMS_FILE).write_text(text, encoding="utf-8", newline="")
    info = {
        "format": FORMAT, "problems": len(rows), "hash": hashlib.sha256(text.encode()).hexdigest(),
        "sources": list(sources),
    }  # fmt: skip
    content = json.dumps(info, ensure_ascii=False, indent=1, sort_keys=True)
    (directory / INFO_FILE).write_text(content + "\n", encoding="utf-8")
    return info


def read_problems(directory: Path) -> Iterator[dict[str, str]]:
    """The problems of an artifact's output folder.

    Raises:
        ValueError: when they are not those that were frozen.
    """
    content = (Path(directory) / PROBLEMS_FILE).read_bytes()
    info = json.loads((Path(directory) / INFO_FILE).read_text(encoding="utf-8"))
    found = hashlib.sha256(content).hexdigest()
    if found != info["hash"]:
        raise ValueError(f"{PROBLEMS_FILE} must hash to {info['hash'][:12]}; got {found[:12]}; make the stage anew")
    for line in content.decode().split("\n"):
        if line:
            yield json.loads(line)
