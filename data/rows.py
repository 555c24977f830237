"""Choosing rows of a dataset (JSON objects, Parquet rows), and rendering them as text by a template of their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.source_config import PLACEHOLDER as _PLACEHOLDER
from data.source_config import RowFilter

NO_VALUE = "has no value"
NO_NUMBER = " is no number"
"""How the reason ends where a filter with bounds finds something else."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MissingField(KeyError):  # noqa: N818 - names what is missing
    """A template or filter names a field that the row lacks; the argument is the field's dotted name."""


def template_fields(template: str) -> list[str]:
    """Dotted names of the fields that ``template`` refers to, in order."""
    return _PLACEHOLDER.findall(template)


def render_row(template: str, row: Mapping[str, Any]) -> str:
    """``template`` with each ``{field}`` or ``{field.key}`` replaced by the row's value; other braces stay.

    Strings stay as they are and none is empty text; bytes are read as UTF-8. A mapping is rendered one ``key. value`` a
    line, a list one ``A. value`` a line, also the list of ``{key, value}`` objects that some multiple-choice sets use.
    Raises ``MissingField`` and ``UnicodeDecodeError``.

    >>> render_row("{question}\\n{options}", {"question": "2+2?", "options": {"A": "3", "B": "4"}})
    '2+2?\\nA. 3\\nB. 4'
    """
    return _PLACEHOLDER.sub(lambda match: _render(lookup(row, match[1])), template)


def lookup(row: Mapping[str, Any], dotted: str) -> Any:
    """The value at ``dotted`` in nested mappings; raises ``MissingField``."""
    value: Any = row
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise MissingField(dotted)
        value = value[part]
    return value


def objection(filters: Sequence[RowFilter], row: Mapping[str, Any]) -> tuple[str, str] | None:
    """(rule, what was found) of the first filter that refuses ``row``; None when all let it through.

    A field without a value passes no filter. Raises ``MissingField`` where the row lacks the field altogether.

    >>> objection([RowFilter(field="score", min=3)], {"score": 2.5})
    ('filter_score', '2.5 is below 3')
    """
    for one in filters:
        if reason := _refused(one, lookup(row, one.field)):
            return filter_rule(one), reason
    return None


def filter_rule(one: RowFilter) -> str:
    """The rule under which the rows that ``one`` refuses are counted."""
    return f"filter_{one.field.replace('.', '_')}"


def _refused(one: RowFilter, value: Any) -> str | None:
    if value is None:
        return NO_VALUE
    if one.min is not None or one.max is not None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            kind = "text" if isinstance(value, str) else type(value).__name__
            return f"{value!r:.40} ({kind}){NO_NUMBER}"
        # Written so that a value that is not a number (NaN) is refused by either bound.
        if one.min is not None and not value >= one.min:
            return f"{value!r} is below {one.min:g}"
        if one.max is not None and not value <= one.max:
            return f"{value!r} is above {one.max:g}"
    if one.equals is not None and not _same(value, one.equals):
        return f"{value!r:.40} is not {one.equals!r}"
    if one.in_ is not None and not any(_same(value, member) for member in one.in_):
        return f"{value!r:.40} is none of {len(one.in_)}"
    return None


def _same(value: Any, asked: Any) -> bool:
    """Equal and of one kind: ``true`` is not 1."""
    return isinstance(value, bool) == isinstance(asked, bool) and bool(value == asked)


def _render(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8-sig")
    if isinstance(value, Mapping):
        return "\n".join(f"{key}. {_render(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, Sequence):
        return "\n".join(_option(index, item) for index, item in enumerate(value))
    return str(value)


def _option(index: int, item: Any) -> str:
    if isinstance(item, Mapping) and set(item) == {"key", "value"}:
        return f"{item['key']}. {_render(item['value'])}"
    letter = _LETTERS[index] if index < len(_LETTERS) else str(index + 1)
    return f"{letter}. {_render(item)}"
