"""Rendering a row of a dataset (a JSON object, a Parquet row) as text by a template of its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_PLACEHOLDER = re.compile(r"\{([\w.-]+)\}")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MissingField(KeyError):  # noqa: N818 - names what is missing
    """A template names a field that the row lacks; the argument is the field's dotted name."""


def template_fields(template: str) -> list[str]:
    """Dotted names of the fields that ``template`` refers to, in order."""
    return _PLACEHOLDER.findall(template)


def render_row(template: str, row: Mapping[str, Any]) -> str:
    """``template`` with each ``{field}`` or ``{field.key}`` replaced by the row's value; other braces stay.

    Strings stay as they are and none is empty text. A mapping is rendered one ``key. value`` a line, a list one
    ``A. value`` a line, also the list of ``{key, value}`` objects that some multiple-choice sets use.

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


def _render(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
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
