"""Questions of benchmark files: rows with a question, and the right one of several endings or an exact answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.errors import DataError

ENDINGS = (".jsonl", ".json", ".yaml", ".yml")
_SHOWN = 5
_CHOICE = re.compile(r"\(([A-D])\)\s*(.*?)\s*(?=\([A-D]\)|\Z)", re.DOTALL)
_RIGHT = re.compile(r"answer is \(?([A-D])\)?")


def read_questions(
    path: Path, *, kind: str, question: str, choices: str, answer: str, id_field: str, first: int | None = None
) -> list[dict[str, Any]]:
    """Rows ``{"id", "question", "choices", "right"}`` for ``kind`` choice, ``{"id", "question", "answer"}`` for answer.

    ``choices`` may be a list or a mapping of letters; ``answer`` the right one's number from 0, letter or text. For
    ``kind`` answer a worked solution counts as what follows its last ``####``. ``first`` reads only so many rows.

    Raises:
        DataError: with the first rows that are faulty, or for a file without rows.
    """
    rows: list[dict[str, Any]] = []
    faults: dict[str, list[int]] = {}
    asked = (question, answer, *((choices,) if kind == "choice" else ()))
    for number, row in enumerate(islice(_rows(path, first), first), start=1):
        try:
            rows.append(_row(_with_fields(row, asked), kind, question, choices, answer, id_field))
        except (TypeError, ValueError, IndexError) as error:
            faults.setdefault(str(error), []).append(number)
    if faults or not rows:
        shown = _shown(faults) or "no row"
        raise DataError([("path", f"must hold questions; {path.name} has {shown}; mend it, or the fields")])
    if len({row["id"] for row in rows}) < len(rows):
        raise DataError([("id_field", f"must tell questions apart; {path.name} has two of one id; set another field")])
    return rows


def read_mmlu_examples(tasks: Path, language: str) -> list[dict[str, Any]]:
    """The few worked examples a subject that the harness ships for MMLU, as questions of multiple choice.

    ``tasks`` is the harness's folder of tasks; ``language`` is ``en``, ``de`` or ``hi``. Those are MMLU's development
    questions, of which the English ones stand with their reasoning (Hendrycks et al. 2021, arXiv:2009.03300, MIT).

    Raises:
        DataError: when the harness ships none.
    """
    folder = tasks / ("mmlu/flan_cot_fewshot" if language == "en" else f"llama3/instruct/mmlu_{language}")
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("mmlu_*.yaml")):
        for example in _examples(path):
            row = _english(example) if language == "en" else _translated(example)
            if row is not None:
                subject = path.stem.removeprefix("mmlu_").removeprefix(f"{language}_")
                found.setdefault(_content_id(row), {"id": f"{subject}/{_content_id(row)[:12]}", **row})
    if not found:
        raise DataError([("local", f"must be shipped by the harness; {folder.name} holds no examples in {language}")])
    return list(found.values())


def _examples(path: Path) -> list[Mapping[str, Any]]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Tags such as ``!function`` stand for nothing here."""

    Loader.add_multi_constructor("!", lambda *_: None)
    content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    return list((content.get("fewshot_config") or {}).get("samples") or [])


def _english(example: Mapping[str, Any]) -> dict[str, Any] | None:
    """An example that lists its choices in the question and names the right one at the end of its reasoning."""
    asked, listed = str(example["question"]), _CHOICE.findall(str(example["question"]))
    right = _RIGHT.findall(str(example["target"]))
    letters = [letter for letter, _ in listed]
    if not right or right[-1] not in letters or letters != list("ABCD")[: len(letters)]:
        return None
    question = asked[: asked.index("(A)")].strip()
    return {"question": question, "choices": [text for _, text in listed], "right": letters.index(right[-1])}


def _translated(example: Mapping[str, Any]) -> dict[str, Any] | None:
    choices, right = example["input_choice_list"], example["input_correct_responses"]
    if len(right) != 1 or right[0] not in choices:
        return None
    texts = [str(text) for text in choices.values()]
    return {"question": example["input_question"].strip(), "choices": texts, "right": list(choices).index(right[0])}


def _with_fields(row: Any, fields: Iterable[str]) -> Mapping[str, Any]:
    """``row``, which must be a mapping with all of ``fields``."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be a mapping of fields; got {type(row).__name__}")
    missing = [field for field in fields if field not in row]
    if missing:
        raise ValueError(f"no field {' and no field '.join(missing)}, but {', '.join(map(str, row)) or 'none at all'}")
    return row


def _shown(faults: Mapping[str, Sequence[int]]) -> str:
    """Each fault with the first rows that have it, as the end of a sentence."""
    lines = []
    for message, rows in list(faults.items())[:_SHOWN]:
        few = ", ".join(map(str, rows[:_SHOWN])) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
        lines.append(f"in row {few}: {message}")
    return "; ".join(lines) + (f"; and {len(faults) - _SHOWN} other faults" if len(faults) > _SHOWN else "")


def _row(row: Any, kind: str, question: str, choices: str, answer: str, id_field: str) -> dict[str, Any]:
    asked = row[question]
    if not isinstance(asked, str) or not asked.strip():
        raise ValueError(f"{question} must be text; got {asked!r:.40}")
    if kind == "answer":
        found: dict[str, Any] = {"question": asked, "answer": str(row[answer]).rpartition("####")[2].strip()}
        if not found["answer"]:
            raise ValueError(f"{answer} must not be empty")
    else:
        texts, place = _choices(row[choices], row[answer], choices, answer)
        found = {"question": asked, "choices": texts, "right": place}
    return {"id": str(row.get(id_field) or _content_id(found)[:16]), **found}


def _choices(listed: Any, right: Any, choices: str, answer: str) -> tuple[list[str], int]:
    """The endings, and the place of the right one."""
    letters = list(listed) if isinstance(listed, Mapping) else [chr(ord("A") + place) for place in range(len(listed))]
    texts = [str(text) for text in (listed.values() if isinstance(listed, Mapping) else listed)]
    if len(texts) < 2 or len(set(texts)) < len(texts):
        raise ValueError(f"{choices} must be two or more different endings; got {len(set(texts))}")
    if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(texts):
        return texts, right
    if right in letters:
        return texts, letters.index(right)
    if right in texts:
        return texts, texts.index(right)
    raise ValueError(f"{answer} must be a number below {len(texts)}, a letter or one of {choices}; got {right!r:.40}")


def _rows(path: Path, first: int | None) -> Iterator[Any]:
    """Rows of a file, one a line or in a list; of lines no more than the ``first`` are read."""
    if path.suffix not in ENDINGS:
        raise DataError([("path", f"must end in one of {', '.join(ENDINGS)}; got {path.name}; rename or convert it")])
    try:
        content = list(islice(_lines(path), first)) if path.suffix == ".jsonl" else _whole(path)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise DataError([("path", f"must hold rows; {path.name} cannot be read: {said}; mend it")]) from error
    if not isinstance(content, list):
        raise DataError([("path", f"must hold a list of rows; {path.name} holds {type(content).__name__}; mend it")])
    yield from content


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is no JSON: {error.msg} at column {error.colno}") from error


def _whole(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _content_id(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
