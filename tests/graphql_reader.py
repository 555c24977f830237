"""As much of GraphQL as an answer to W&B's client needs: a query is read, and plain data is given its shape.

``answer(query, variables, root)`` walks the query's fields through nested dictionaries. A field that the data lacks is
a ``LookupError``: whoever answers for a server must know every field that it is asked for. A callable stands for a
field with arguments and is given the query's variables.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

TOKEN = re.compile(r'\.\.\.|[A-Za-z_]\w*|\$\w+|"(?:[^"\\]|\\.)*"|-?\d[\w.]*|[{}()\[\]:@!=,|&]|#[^\n]*')
INTERFACES = {"ArtifactCollection"}
"""Types that stand for several of the data's."""


@dataclasses.dataclass
class Field:
    """One selection: what it is called in the answer and in the data, the variable it waits for, what lies below.

    ``kind`` is ``field``, ``spread`` (a fragment's name) or ``inline`` (a type's name).
    """

    kind: str
    name: str
    alias: str = ""
    condition: str = ""
    below: list[Field] = dataclasses.field(default_factory=list)


class Reader:
    """Reads one document of operations and fragments."""

    def __init__(self, text: str) -> None:
        self.tokens = [token for token in TOKEN.findall(text) if token[0] not in "#,"]
        self.place = 0
        self.fragments: dict[str, tuple[str, list[Field]]] = {}
        self.operation, self.fields = "", list[Field]()
        self.defaults: dict[str, bool] = {}
        while self.place < len(self.tokens):
            self._definition()

    def holds(self, condition: str, variables: Mapping[str, Any]) -> bool:
        """Whether a field with this condition is asked for."""
        if condition in ("", "true", "false"):
            return condition != "false"
        return bool(variables.get(condition[1:], self.defaults.get(condition)))

    def _take(self, wanted: str = "") -> str:
        token = self.tokens[self.place]
        assert not wanted or token == wanted, f"{wanted} expected, {token} found"
        self.place += 1
        return token

    def _next_is(self, token: str) -> bool:
        return self.place < len(self.tokens) and self.tokens[self.place] == token

    def _definition(self) -> None:
        word, name = self._take(), self._take()
        if word == "fragment":
            self._take("on")
            kind = self._take()
            self.fragments[name] = (kind, self._selections())
            return
        assert word in ("query", "mutation"), word
        self.operation = name
        given = self._pass_over()
        pairs = zip(given, given[4:], strict=False)
        self.defaults = {
            first: last == "true" for first, last in pairs if first[0] == "$" and last in ("true", "false")
        }
        self.fields = self._selections()

    def _pass_over(self) -> list[str]:
        """What stands in brackets here, if anything."""
        start = self.place
        depth = 0
        while depth or self._next_is("("):
            depth += {"(": 1, ")": -1}.get(self._take(), 0)
        return self.tokens[start : self.place]

    def _selections(self) -> list[Field]:
        self._take("{")
        found = []
        while not self._next_is("}"):
            found.append(self._selection())
        self._take("}")
        return found

    def _selection(self) -> Field:
        if self._next_is("..."):
            self._take()
            field = Field("inline", self._take_type()) if self._next_is("on") else Field("spread", self._take())
        else:
            alias = name = self._take()
            if self._next_is(":"):
                self._take()
                name = self._take()
            field = Field("field", name, alias)
            self._pass_over()
        while self._next_is("@"):
            self._take()
            assert self._take() == "include", "no other directive is known"
            field.condition = self._pass_over()[-2]
        if self._next_is("{"):
            field.below = self._selections()
        return field

    def _take_type(self) -> str:
        self._take("on")
        return self._take()


def operation_of(query: str) -> str:
    """The name of the query or mutation."""
    return Reader(query).operation


def answer(query: str, variables: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """The data in the shape that ``query`` asks for; ``LookupError`` names the path of a field that is not there."""
    reader = Reader(query)
    return _shaped(reader, reader.fields, root, variables, reader.operation)


def _shaped(reader: Reader, fields: list[Field], value: Any, variables: Mapping[str, Any], path: str) -> Any:
    if callable(value):
        value = value(variables)
    if isinstance(value, list):
        return [_shaped(reader, fields, item, variables, path) for item in value]
    if value is None or not fields:
        return value
    found: dict[str, Any] = {}
    for field in fields:
        if not reader.holds(field.condition, variables):
            continue
        if field.kind != "field":
            kind, below = (field.name, field.below) if field.kind == "inline" else reader.fragments[field.name]
            if kind in INTERFACES or value.get("__typename", kind) == kind:
                found |= _shaped(reader, below, value, variables, path)
        elif field.name not in value:
            raise LookupError(f"{path}.{field.name}")
        else:
            found[field.alias] = _shaped(reader, field.below, value[field.name], variables, f"{path}.{field.name}")
    return found
