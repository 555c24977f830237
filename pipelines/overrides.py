"""``--set a.b=c``: one value of a recipe replaced from the command line."""

from __future__ import annotations

import re
from typing import Any

from pipelines.document import Document, Place, dotted, parse
from pipelines.suggest import suggestion
from stages.base import Fault

_WAY = "write --set path=value, for example --set pretrain.lr=3e-4"


def apply_overrides(document: Document, overrides: list[str], top_level: list[str]) -> None:
    """Set each ``path=value`` in ``document.data``, later ones last; what cannot be set is added to its faults.

    A path begins with one of ``top_level`` (fields of the recipe) or with the name of one of its stages.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        words = path.strip().split(".")
        if not all(re.fullmatch(r"[\w/-]+", word) for word in words):
            # Not repeated: it may be a secret.
            _refuse(document, "--set", f"must be path=value, the path as words joined by dots; {_WAY}")
            continue
        if not equals or not text.strip():
            way = f"write --set {path.strip()}=VALUE, or =null for none"
            _refuse(document, path.strip(), f"needs a value; {way}")
            continue
        value = parse(text)
        if value.faults:
            _refuse(document, path, f"{value.faults[0][1].message}, in --set; quote it, or mind the shell")
            continue
        place = _place(document, words, top_level)
        if place:
            _set(document, place, value.data)


def _place(document: Document, words: list[str], top_level: list[str]) -> Place | None:
    first, *rest = words
    stages = document.data.get("stages") if isinstance(document.data, dict) else None
    names = [str(name) for name in stages] if isinstance(stages, dict) else []
    if first in names:
        return ("stages", first, *rest)
    if first in top_level:
        return (first, *rest)
    if first == "stages" and rest:
        _refuse(document, ".".join(words), f"must begin with the stage's name; set {'.'.join(rest)}")
    else:
        where = suggestion(first, [*names, *top_level], "stage or field")
        _refuse(document, ".".join(words), f"names no stage or field of the recipe: {first!r}; {where}")
    return None


def _set(document: Document, place: Place, value: Any) -> None:
    node = document.data
    for depth, word in enumerate(place[:-1]):
        if isinstance(node, dict):
            node = _child(node, str(word))
        elif isinstance(node, list) and str(word).isdigit() and int(word) < len(node):
            node = node[int(word)]
        else:
            node = None
        if not isinstance(node, dict | list):
            held = dotted(place[: depth + 1])
            _refuse(document, dotted(place), f"cannot be set: {held} holds no fields of its own; set {held} itself")
            return
    last: Any = place[-1]
    if isinstance(node, list):
        if not str(last).isdigit() or int(last) >= len(node):
            _refuse(document, dotted(place), f"must name an item from 0 to {len(node) - 1}; got {last!r}")
            return
        last = int(last)
    node[last] = value
    document.overridden.add(tuple(int(word) if str(word).isdigit() else word for word in place))
    document.overridden.add(place)


def _child(node: dict[str, Any], word: str) -> Any:
    """The section named ``word``, made when it is absent, so that ``tracking.wandb`` can be set without one."""
    if node.get(word) is None:
        node[word] = {}
    return node[word]


def _refuse(document: Document, path: str, message: str) -> None:
    document.faults.append(((path,), Fault(path, message)))
