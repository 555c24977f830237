"""Verifiable tasks made by rule: every question has one exact answer, and a space large enough to hold some out.

A task is a bijection between the numbers ``0 .. space - 1`` and its questions, so that the space is known exactly and
nothing is drawn twice. A question belongs to the held-out side by its own hash, never by a seed: whatever is drawn for
training, in whatever stage, is disjoint from what is measured, the same question the other way round included.
``size`` sets how hard a task is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from data.source_config import Section

MIN_SPACE = 2_000
"""Fewest distinct questions of a task; fewer would be learned by heart."""
HELDOUT_SHARE = 0.25
"""Share of a task's questions that no training stage ever sees."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ANSWER = "Answer:"
"""What stands before the final answer of a completion."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question with its exact ``answer`` and, for a demonstration, the ``working`` that leads to it.

    ``asks`` is the same for questions that ask the same in another order (``7 + 6`` and ``6 + 7``), which must not
    stand on both sides; where it is empty the text says it.
    """

    text: str
    working: str
    answer: str
    asks: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A generator: ``space(size)`` questions, of which ``make(number, size)`` gives the one with that number.

    ``size`` is digits of a number, or letters of a word, as ``unit`` says; ``sizes`` are those it can take.
    """

    name: str
    unit: str
    sizes: range
    space: Callable[[int], int]
    make: Callable[[int, int], Question]


TASKS: dict[str, Task] = {}
"""Tasks by name; a new one is one function below."""


class TaskChoice(Section):
    """One task of a mixture."""

    name: str
    """A key of ``TASKS``: add, compare, count_letter, digit_sum, gcd, largest_digit, last_letter, parity, reverse or
    sort."""
    size: int = Field(ge=1, le=1_000_000_000)
    """How hard: digits of a number (add, compare, gcd, parity), digits in a row (digit_sum, largest_digit, sort), or
    letters of a word (count_letter, last_letter, reverse)."""
    train: int = Field(ge=0, le=1_000_000_000)
    """Questions drawn from the training side, without repetition."""
    heldout: int = Field(0, ge=0, le=1_000_000_000)
    """Questions of the held-out side: the first of a fixed order that no seed changes."""


def choice_faults(choice: TaskChoice) -> list[tuple[str, str]]:
    """What is wrong with one choice as (field, message); empty when it can be drawn."""
    task = TASKS.get(choice.name)
    if task is None:
        return [("name", f"must be one of {', '.join(sorted(TASKS))}; got {choice.name}; set one of them")]
    if choice.size not in task.sizes:
        low, high = task.sizes[0], task.sizes[-1]
        return [("size", f"must be {low} to {high} {task.unit}; got {choice.size}; set one of them")]
    space = task.space(choice.size)
    if space < MIN_SPACE:
        fitting = [size for size in task.sizes if task.space(size) >= MIN_SPACE]
        return [("size", f"must give at least {MIN_SPACE:,} questions; got {space:,}; set {fitting[0]} or more")]
    # The sides are shares of hashes: a margin keeps the draw from running dry.
    sides = {"train": choice.train, "heldout": choice.heldout}
    room = {"train": int(space * (1 - HELDOUT_SHARE) * 0.9), "heldout": int(space * HELDOUT_SHARE * 0.9)}
    return [
        (side, f"must be at most {room[side]:,} of a space of {space:,} questions; got {count:,}; set less, or size")
        for side, count in sides.items()
        if count > room[side]
    ]


def choices_faults(choices: Sequence[TaskChoice]) -> list[tuple[str, str]]:
    """Every fault of ``choices`` as (field, message); fields are ``tasks[0].size`` and the like."""
    faults = [
        (f"tasks[{number}].{field}", message)
        for number, choice in enumerate(choices)
        for field, message in choice_faults(choice)
    ]
    seen: set[tuple[str, int]] = set()
    for number, choice in enumerate(choices):
        if (choice.name, choice.size) in seen:
            faults.append((f"tasks[{number}].name", f"must appear once a size; got {choice.name} again; merge the two"))
        seen.add((choice.name, choice.size))
    return faults


def is_heldout(question: Question) -> bool:
    """Whether a question is on the held-out side: a property of what it asks alone."""
    return _hash(question.asks or question.text) < HELDOUT_SHARE


def rows(choice: TaskChoice, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Rows ``{"id", "prompt": [messages], "answer", "working", "task"}`` of one side, without repetition.

    ``split`` is ``train`` or ``heldout``; ``seed`` moves the training side alone.
    """
    for question in _draw(choice, split, seed):
        yield {
            "id": f"{choice.name}-{hashlib.sha256(question.text.encode()).hexdigest()[:16]}",
            "prompt": [{"role": "user", "content": question.text}],
            "answer": question.answer,
            "working": question.working,
            "task": choice.name,
        }


def demonstration(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a row of a tasks artifact: its prompt, and a short reply that ends with the exact answer."""
    final = f"{ANSWER} {row['answer']}"
    reply = f"{row['working']} {final}" if row["working"] else final
    return [*row["prompt"], {"role": "assistant", "content": reply}]


def _draw(choice: TaskChoice, split: str, seed: int) -> Iterator[Question]:
    """Distinct questions of one side in a random order: by ``seed`` for training, always the same held out."""
    task = TASKS[choice.name]
    wanted = {"train": choice.train, "heldout": choice.heldout}[split]
    order = f"{choice.name} {choice.size}" + (f" {seed}" if split == "train" else "")
    for number in _permutation(task.space(choice.size), random.Random(order)):
        if wanted == 0:
            return
        question = task.make(number, choice.size)
        if is_heldout(question) == (split == "heldout"):
            wanted -= 1
            yield question
    assert wanted == 0, "choice_faults leaves a margin, so that a side never runs dry"


def _permutation(space: int, drawn: random.Random) -> Iterator[int]:
    """Every number below ``space`` once, in a random order, without holding them all."""
    moved: dict[int, int] = {}
    for place in range(space):
        other = drawn.randrange(place, space)
        yield moved.pop(other, other) if other != place else moved.pop(place, place)
        if other != place:
            moved[other] = moved.pop(place, place)


def _hash(text: str) -> float:
    """A number in [0, 1) that only the text decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _task(unit: str, sizes: range, space: Callable[[int], int]) -> Callable[[Callable[[int, int], Question]], None]:
    """Register a ``make`` function under its own name."""

    def register(make: Callable[[int, int], Question]) -> None:
        name = make.__name__.lstrip("_")
        TASKS[name] = Task(name, unit, sizes, space, make)

    return register


def _digits(number: int, count: int, base: int = 10) -> list[int]:
    """``count`` digits of ``number`` in ``base``, the lowest first."""
    return [number // base**place % base for place in range(count)]


def _numbers(size: int) -> int:
    """How many numbers have exactly ``size`` digits."""
    return 9 * 10 ** (size - 1)


def _two_numbers(number: int, size: int) -> tuple[int, int]:
    first, second = divmod(number, _numbers(size))
    low = 10 ** (size - 1)
    return low + first, low + second


def _either_way(first: int, second: int) -> str:
    return f"{min(first, second)} and {max(first, second)}"


@_task("digits", range(1, 7), lambda size: _numbers(size) * (_numbers(size) - 1))
def _compare(number: int, size: int) -> Question:
    first, other = divmod(number, _numbers(size) - 1)
    # The second number skips the first, so that no pair is equal.
    second = other + (other >= first)
    low = 10 ** (size - 1)
    first, second = low + first, low + second
    text = f"Which number is larger, {first} or {second}?"
    return Question(text, "", str(max(first, second)), _either_way(first, second))


@_task("digits", range(1, 7), lambda size: _numbers(size) ** 2)
def _add(number: int, size: int) -> Question:
    first, second = _two_numbers(number, size)
    return Question(f"What is {first} + {second}?", "", str(first + second), _either_way(first, second))


@_task("digits", range(1, 5), lambda size: _numbers(size) ** 2)
def _gcd(number: int, size: int) -> Question:
    first, second = _two_numbers(number, size)
    answer = math.gcd(first, second)
    working = f"{first} = {answer} * {first // answer}, {second} = {answer} * {second // answer}."
    text = f"What is the greatest common divisor of {first} and {second}?"
    return Question(text, working, str(answer), _either_way(first, second))


@_task("letters", range(2, 13), lambda size: 26**size)
def _last_letter(number: int, size: int) -> Question:
    word = _word(number, size)
    return Question(f"What is the last letter of {' '.join(word)}?", "", word[-1])


@_task("letters", range(2, 13), lambda size: 26**size)
def _reverse(number: int, size: int) -> Question:
    word = _word(number, size)
    return Question(f"Write {' '.join(word)} backwards.", "", " ".join(reversed(word)))


@_task("letters", range(2, 13), lambda size: 26 * 3**size)
def _count_letter(number: int, size: int) -> Question:
    # Three letters fill the word, so that the one that is asked for is often there.
    rest, target = divmod(number, 26)
    filler = [LETTERS[target], LETTERS[(target + 7) % 26], LETTERS[(target + 15) % 26]]
    word = [filler[digit] for digit in _digits(rest, size, 3)]
    return Question(
        f"How many times does {LETTERS[target]} occur in {' '.join(word)}?", "", str(word.count(LETTERS[target]))
    )


@_task("digits", range(2, 13), lambda size: 10**size)
def _digit_sum(number: int, size: int) -> Question:
    digits = _digits(number, size)
    return Question(f"What is the sum of the digits {' '.join(map(str, digits))}?", "", str(sum(digits)))


@_task("digits", range(2, 13), lambda size: 10**size)
def _largest_digit(number: int, size: int) -> Question:
    digits = _digits(number, size)
    return Question(f"Which is the largest digit of {' '.join(map(str, digits))}?", "", str(max(digits)))


@_task("digits", range(2, 10), _numbers)
def _parity(number: int, size: int) -> Question:
    shown = 10 ** (size - 1) + number
    return Question(f"Is {shown} even or odd?", "", "odd" if shown % 2 else "even")


@_task("digits", range(2, 13), lambda size: 10**size)
def _sort(number: int, size: int) -> Question:
    digits = _digits(number, size)
    return Question(f"Sort {' '.join(map(str, digits))} from low to high.", "", " ".join(map(str, sorted(digits))))


def _word(number: int, size: int) -> list[str]:
    return [LETTERS[digit] for digit in _digits(number, size, 26)]
