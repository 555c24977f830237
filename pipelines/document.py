"""YAML text as plain data that remembers its lines; every fault of the text is gathered, none is a traceback.

Scalars follow YAML 1.2's core schema, as editors read it: ``3e-4`` is a number, ``no`` and ``2024-01-01`` are text.
Anchors, aliases, merge keys and tags are refused: a recipe says everything in one place.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from stages.base import Fault

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NUMBER = 2**63 - 1

Place = tuple[str | int, ...]

_CORE = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's parser with YAML 1.2's scalars instead of 1.1's."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own attribute


for _tag, (_pattern, _first) in _CORE.items():
    _CoreLoader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


@dataclass
class Document:
    """A parsed recipe: plain ``data``, the 1-based ``lines`` of its places, and the ``faults`` of what was refused."""

    data: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    faults: list[tuple[Place, Fault]] = field(default_factory=list)
    overridden: set[Place] = field(default_factory=set)
    """Places whose value came from ``--set`` and so from no line."""

    def line(self, place: Place) -> int | None:
        """The line of ``place``, or of the nearest place above it that has one; None below an overridden place."""
        if any(place[:length] in self.overridden for length in range(len(place) + 1)):
            return None
        while place not in self.lines and place:
            place = place[:-1]
        return self.lines.get(place)


def parse(text: str) -> Document:
    """The document that ``text`` holds; syntax faults stand in its ``faults``."""
    document = Document()
    if len(text) > MAX_BYTES:
        _refuse(document, (), None, f"must be at most {MAX_BYTES} characters; got {len(text)}; is this a recipe?")
        return document
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.YAMLError as error:
        _refuse(document, (), _error_line(error), f"is not valid YAML: {_error_text(error)}")
        return document
    except RecursionError:
        _refuse(document, (), None, f"is nested more than {MAX_DEPTH} deep; write it flatter")
        return document
    if node is not None:
        document.data = _plain(node, (), document, set())
    return document


def dotted(place: Place) -> str:
    """A place as ``--set`` names it: ``("stages", "pretrain", "lr")`` is ``pretrain.lr``; the whole is ``recipe``."""
    inner = place[1:] if place[:1] == ("stages",) and len(place) > 1 else place
    return ".".join(str(part) for part in inner) or "recipe"


def place_of(path: str) -> Place:
    """The place that a path of a section names: ``gates.0.max`` and ``gates[0].max`` alike; () of an empty one."""
    words = re.split(r"[.\[\]]+", path.rstrip("]"))
    return tuple(int(word) if word.isdigit() else word for word in words if word)


def _plain(node: yaml.Node, place: Place, document: Document, open_nodes: set[int]) -> Any:
    line = node.start_mark.line + 1
    document.lines.setdefault(place, line)
    if len(place) > MAX_DEPTH:
        _refuse(document, place[:1], line, f"is nested more than {MAX_DEPTH} deep; write it flatter")
        return None
    if id(node) in open_nodes:
        _refuse(document, place, line, "repeats another part by an alias (*name); write it out")
        return None
    # PyYAML gives an alias as the very node of its anchor, so a node that comes twice is an alias.
    open_nodes.add(id(node))
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, place, document, open_nodes)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*place, index), document, open_nodes) for index, item in enumerate(node.value)]
    return _scalar(node, place, document)


def _mapping(node: yaml.MappingNode, place: Place, document: Document, open_nodes: set[int]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith((":str", ":merge")):
            shown = getattr(key_node, "value", "")
            shown = shown if isinstance(shown, str) else "a list or mapping"
            _refuse(document, place, line, f"has a key that must be text; got {shown!r}; write it in quotes")
            continue
        key = key_node.value
        if key in data:
            first = document.lines[(*place, key)]
            _refuse(document, (*place, key), line, f"is given twice; the first is in line {first}; keep one")
            continue
        document.lines[(*place, key)] = line
        data[key] = _plain(value_node, (*place, key), document, open_nodes)
    return data


def _scalar(node: yaml.Node, place: Place, document: Document) -> Any:
    line, text, kind = node.start_mark.line + 1, node.value, node.tag.rpartition(":")[2]
    if kind == "str":
        return text
    if node.tag not in _CORE:
        _refuse(document, place, line, f"has the tag {node.tag!r}; remove it, recipes hold plain values")
        return None
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        number = int(text, 0) if text[:2] in ("0o", "0x") else int(text) if kind == "int" else _float(text)
    except ValueError:
        # Python converts no more than some thousand digits.
        number = math.inf
    if not math.isfinite(number) or abs(number) > MAX_NUMBER:
        # A long one may be a secret: a key of digits alone.
        shown = text if len(text) <= 16 else f"a number of {len(text)} characters"
        _refuse(document, place, line, f"must be a finite number of at most {MAX_NUMBER}; got {shown}")
        return None
    return number


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _refuse(document: Document, place: Place, line: int | None, message: str) -> None:
    document.faults.append((place, Fault(dotted(place), message, line)))


def _error_line(error: yaml.YAMLError) -> int | None:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return mark.line + 1 if mark else None


def _error_text(error: yaml.YAMLError) -> str:
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    text = ", ".join(part for part in parts if part)
    # A refused character has no problem and mark but a reason and position.
    return text or " ".join(str(error).split())
