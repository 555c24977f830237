"""Tasks: exact answers, known spaces, sides that no seed moves, refusals before anything is drawn."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from data.tasks import HELDOUT_SHARE, MIN_SPACE, TASKS, Question, TaskChoice, choice_faults, demonstration, rows
from stages.base import StageContext
from stages.tasks import Tasks


def smallest(name: str) -> int:
    """The least size with room enough."""
    return next(size for size in TASKS[name].sizes if TASKS[name].space(size) >= MIN_SPACE)


def draw(name: str, split: str, *, seed: int = 1, count: int = 300, size: int | None = None) -> list[dict[str, Any]]:
    choice = TaskChoice(name=name, size=size or smallest(name), train=count, heldout=count)
    return list(rows(choice, split, seed))


def solved(name: str, text: str) -> str:
    """The answer to a question, worked out from its words by another way than the generator's."""
    numbers = [int(found) for found in re.findall(r"\d+", text)]
    letters = re.findall(r"\b[a-z]\b", text)
    return {
        "add": lambda: str(sum(numbers)),
        "compare": lambda: str(sorted(numbers)[-1]),
        "count_letter": lambda: str(sum(letter == letters[0] for letter in letters[1:])),
        "digit_sum": lambda: str(sum(numbers)),
        "gcd": lambda: str(max(d for d in range(1, 100) if all(n % d == 0 for n in numbers))),
        "largest_digit": lambda: str(max(numbers)),
        "last_letter": lambda: re.findall(r"[a-z]", text)[-1],
        "parity": lambda: ["even", "odd"][int(str(numbers[0])[-1]) % 2],
        "reverse": lambda: " ".join(letters[::-1]),
        "sort": lambda: " ".join(sorted(re.findall(r"\d", text))),
    }[name]()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_answer_is_the_one_that_the_words_of_the_question_ask_for(name: str) -> None:
    found = draw(name, "train")
    assert [row["answer"] for row in found] == [solved(name, row["prompt"][0]["content"]) for row in found]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_space_holds_as_many_different_questions_as_it_says(name: str) -> None:
    task, size = TASKS[name], smallest(name)
    space = task.space(size)
    numbers = range(space) if space <= 20_000 else range(0, space, space // 20_000)
    assert len({task.make(number, size).text for number in numbers}) == len(numbers)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_sides_are_disjoint_and_no_seed_moves_the_held_out_one(name: str) -> None:
    heldout = draw(name, "heldout", seed=1)
    assert heldout == draw(name, "heldout", seed=2)
    for seed in (1, 2):
        assert not {row["id"] for row in draw(name, "train", seed=seed)} & {row["id"] for row in heldout}
    assert draw(name, "train", seed=1) != draw(name, "train", seed=2)
    assert len({row["id"] for row in draw(name, "train")}) == 300


def test_a_larger_held_out_side_begins_with_the_smaller_one() -> None:
    few, many = draw("add", "heldout", count=50), draw("add", "heldout", count=200)
    assert many[:50] == few


def test_the_share_of_questions_held_out_is_the_one_stated() -> None:
    choice = TaskChoice(name="add", size=2, train=5_400, heldout=1_800)
    assert choice_faults(choice) == []
    assert len(list(rows(choice, "train", 1))) == 5_400
    assert len(list(rows(choice, "heldout", 1))) == 1_800
    # Of 8,100 questions 2,025 are expected held out, with a standard deviation of 39.
    task = TASKS["add"]
    from data.tasks import is_heldout

    held = sum(is_heldout(task.make(number, 2)) for number in range(8_100))
    assert math.isclose(held, 8_100 * HELDOUT_SHARE, abs_tol=4 * 39)


def test_a_demonstration_ends_with_the_exact_answer() -> None:
    row = next(row for row in draw("gcd", "train") if row["answer"] == "1")
    question, reply = demonstration(row)
    first, second = re.findall(r"\d+", question["content"])
    assert reply == {"role": "assistant", "content": f"{first} = 1 * {first}, {second} = 1 * {second}. Answer: 1"}


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"name": "chess"}, "name", "must be one of add"),
        ({"size": 99}, "size", "must be 1 to 6 digits; got 99"),
        ({"name": "compare", "size": 1}, "size", "at least 2,000 questions; got 72; set 2 or more"),
        ({"train": 6_000}, "train", "at most 5,467"),
        ({"heldout": 2_000}, "heldout", "at most 1,822"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_way_out(changes: dict[str, Any], field: str, words: str) -> None:
    plain = {"name": "add", "size": 2, "train": 10, "heldout": 10}
    ((named, message),) = choice_faults(TaskChoice.model_validate(plain | changes))
    assert named == field
    assert words in message


def config(*choices: dict[str, Any]) -> Any:
    return Tasks.Config.model_validate({"kind": "tasks", "tasks": list(choices)})


def run(directory: Path, seed: int, *choices: dict[str, Any]) -> tuple[Path, Any]:
    directory.mkdir()
    context = StageContext(
        pipeline="test", name="tasks", key="0" * 64, seed=seed, config=config(*choices), model=None,
        directory=directory, output=directory, work=directory, cache=directory, parents={}, tracker=None,
    )  # fmt: skip
    return directory, Tasks().run(context)


def test_the_stage_refuses_every_fault_at_once_before_it_runs() -> None:
    faults = Tasks.check(config({"name": "add", "size": 1, "train": 5}, {"name": "sort", "size": 50, "train": 5}), None)
    assert [fault.path for fault in faults] == ["tasks[0].size", "tasks[1].size", "tasks[0].heldout"]
    twice = {"name": "add", "size": 2, "train": 5, "heldout": 5}
    (fault,) = Tasks.check(config(twice, twice), None)
    assert fault.path == "tasks[1].name"


def test_the_artifact_holds_both_sides_and_one_hash_for_the_held_out_one(tmp_path: Path) -> None:
    choices = [{"name": "parity", "size": 4, "train": 60, "heldout": 20}, {"name": "sort", "size": 4, "train": 40}]
    one, result = run(tmp_path / "one", 1, *choices)
    two, _ = run(tmp_path / "two", 2, *choices)
    sides = {side: (one / f"{side}.jsonl").read_text().splitlines() for side in ("train", "heldout")}
    assert {side: len(found) for side, found in sides.items()} == {"train": 100, "heldout": 20}
    row = json.loads(sides["heldout"][0])
    assert set(row) == {"id", "prompt", "answer", "working", "task"}
    assert (one / "heldout.jsonl").read_bytes() == (two / "heldout.jsonl").read_bytes()
    assert (one / "train.jsonl").read_bytes() != (two / "train.jsonl").read_bytes()
    facts = [json.loads((folder / "tasks.json").read_bytes()) for folder in (one, two)]
    assert facts[0]["heldout_hash"] == facts[1]["heldout_hash"] == result.metrics["heldout_hash"]
    assert facts[0]["tasks"]["parity-4"] == {"name": "parity", "size": 4, "train": 60, "heldout": 20, "space": 9_000}


def test_the_order_of_a_draw_is_a_permutation() -> None:
    import random

    from data.tasks import _permutation

    assert sorted(_permutation(997, random.Random(3))) == list(range(997))
    # Each place is taken about equally often by each number: 4,000 draws of 5, expected 800, standard deviation 25.
    firsts = [next(iter(_permutation(5, random.Random(seed)))) for seed in range(4_000)]
    assert all(math.isclose(firsts.count(number), 800, abs_tol=110) for number in range(5))


def test_questions_are_told_apart_by_their_text_alone() -> None:
    from data.tasks import is_heldout

    assert is_heldout(Question("a", "x", "1")) == is_heldout(Question("a", "y", "2"))


@pytest.mark.parametrize("name", ["add", "compare", "gcd"])
def test_a_question_asked_the_other_way_round_stands_on_the_same_side(name: str) -> None:  # trap M4
    from data.tasks import is_heldout

    sides: dict[frozenset[str], set[bool]] = {}
    for number in range(TASKS[name].space(2)):
        question = TASKS[name].make(number, 2)
        pair = frozenset(re.findall(r"\d+", question.text))
        sides.setdefault(pair, set()).add(is_heldout(question))
    assert len(sides) in (90 * 89 // 2, 90 * 91 // 2)
    assert all(len(found) == 1 for found in sides.values())
