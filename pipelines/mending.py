"""What is known of a section although fields of it are wrong: what holds whatever those fields may become.

Each faulty field is given values that it would take (none, the least and the greatest number, each of its words). What
is found wrong elsewhere with every one of them does not depend on it, and is told beside it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from pipelines.document import Place
from pipelines.suggest import nearest
from pipelines.validation import Wrong, wrong_places
from stages.base import Fault

MOST_FAULTS = 64
"""Faulty fields of one section; a section with more is not looked into any further."""
MOST_VALUES = 6
_ROUNDS = 4
"""How deep what is put in place of a field may itself want fields."""
_ABSENT: Any = object()
_VALUES: tuple[Any, ...] = (None, False, True, 0, 1e-6, 0.5, 1, 2, 8, 64, 2**10, 2**20, 10**9, "x", [], {})


@dataclasses.dataclass(frozen=True)
class _Edit:
    """A value put at a place below the section, or taken away from there."""

    place: Place
    value: Any


@dataclasses.dataclass(frozen=True)
class Mended:
    """A section with other values in place of the faulty ones, as unlike one another as may be.

    ``configs`` is empty where no values are known that would do. ``made_up`` says that whole sections in it are
    nobody's: the defaults of their fields, which are no guess of what they may become.
    """

    configs: list[Any]
    made_up: bool = False


def mended(section: type[BaseModel], raw: Any) -> Mended:
    """``raw`` as ``section``, mended."""
    base, edits = copy.deepcopy(raw), []
    for _ in range(_ROUNDS):
        wrong = wrong_places(section, base)
        if len(wrong) > MOST_FAULTS or () in wrong:
            return Mended([])
        for place, what in wrong.items():
            taken = [choice for choice in _choices(base, place, what) if _takes(section, base, choice)]
            if not taken:
                return Mended([])
            # The first hold the defaults and the least number, the last is the greatest.
            edits.append(taken if len(taken) <= MOST_VALUES else [*taken[: MOST_VALUES - 1], taken[-1]])
            _apply(base, taken[0])
    variants = (_variant(section, raw, edits, number) for number in range(max(map(len, edits), default=0)))
    made_up = any(edit.value == {} for choices in edits for choice in choices for edit in choice)
    return Mended([one for one in variants if one is not None], made_up)


def common(found: Iterable[Sequence[Fault]]) -> list[Fault]:
    """The faults that every one of ``found`` holds; none of nothing."""
    lists = list(found)
    return [one for one in dict.fromkeys(lists[0]) if all(one in faults for faults in lists)] if lists else []


def without_echoes(found: Iterable[Fault], refused: Iterable[str]) -> list[Fault]:
    """The faults but those at, below or above a ``refused`` path: they only follow from what is told already."""
    paths = set(refused)
    return [one for one in found if not any(_touch(one.path, path) for path in paths)]


def _touch(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _choices(raw: Any, place: Place, what: Wrong) -> Iterator[list[_Edit]]:
    """What might be done about a fault, the likeliest first."""
    away, last = _Edit(place, _ABSENT), place[-1]
    if what.unknown:
        near, beside = nearest(str(last), what.names), _at(raw, place[:-1])
        if near is not None and near not in beside:
            yield [away, _Edit((*place[:-1], near), beside[last])]
        yield [away]
        return
    if isinstance(last, str):
        yield [away]
    for value in (*what.names, *_VALUES):
        yield [_Edit(place, value)]


def _takes(section: type[BaseModel], raw: Any, edits: Sequence[_Edit]) -> bool:
    """Whether nothing is wrong any more at the places of ``edits``; below them something may be missing."""
    changed = copy.deepcopy(raw)
    _apply(changed, edits)
    wrong = wrong_places(section, changed)
    return not any(edit.place in wrong for edit in edits)


def _variant(
    section: type[BaseModel], raw: Any, edits: Sequence[Sequence[Sequence[_Edit]]], number: int
) -> BaseModel | None:
    changed = copy.deepcopy(raw)
    try:
        for choices in edits:
            _apply(changed, choices[number % len(choices)])
        return section.model_validate_json(json.dumps(changed), strict=True)
    except (ValidationError, KeyError, IndexError, TypeError):
        # What was put in one place left no room for what was put below it.
        return None


def _apply(raw: Any, edits: Sequence[_Edit]) -> None:
    for edit in edits:
        parent, last = _at(raw, edit.place[:-1]), edit.place[-1]
        if isinstance(parent, list) and last == len(parent):
            parent.append(copy.deepcopy(edit.value))
        elif edit.value is not _ABSENT:
            parent[last] = copy.deepcopy(edit.value)
        elif isinstance(parent, dict):
            parent.pop(last, None)


def _at(raw: Any, place: Place) -> Any:
    for part in place:
        raw = raw[part]
    return raw
