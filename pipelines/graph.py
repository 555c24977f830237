"""How the stages of a recipe depend on one another: parents, what they produce, cycles, order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.document import Document, Place, dotted
from pipelines.suggest import suggestion
from stages.base import Fault, Stage

Registry = Mapping[str, type[Stage]]
PlacedFault = tuple[Place, Fault]


def is_path(parent: str) -> bool:
    """Whether an input names an artifact directory elsewhere instead of a stage of the recipe."""
    return "/" in parent


def input_name(stage: type[Stage], field: str) -> str:
    """An input's field as the recipe spells it (``from_`` is ``from``)."""
    return stage.Config.model_fields[field].alias or field


def raw_parents(stage: type[Stage], raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Field and value of each input that an unvalidated stage section gives or takes by default."""
    for field in stage.inputs:
        declared = stage.Config.model_fields[field]
        default = None if declared.is_required() else declared.get_default()
        yield field, raw.get(input_name(stage, field), raw.get(field, default))


def graph_faults(document: Document, known: Mapping[str, type[Stage]], raw: Mapping[str, Any]) -> list[PlacedFault]:
    """Missing parents, parents that produce something else, and cycles.

    ``raw`` holds the recipe's stage sections by name, ``known`` the class of those whose kind is valid.
    """
    faults: list[PlacedFault] = []
    edges: dict[str, list[str]] = {}
    for name, stage in known.items():
        for field, parent in raw_parents(stage, raw[name]):
            if not isinstance(parent, str) or is_path(parent):
                continue
            place: Place = ("stages", name, input_name(stage, field))
            edges.setdefault(name, []).append(parent)
            message = _parent_fault(stage.inputs[field].produces, parent, known, raw)
            if message:
                faults.append((place, Fault(dotted(place), message, document.line(place))))
    for cycle in cycles(edges):
        place = ("stages", cycle[0])
        way = " -> ".join([*cycle, cycle[0]])
        text = f"must not depend on itself; got the cycle {way}; let one of them name another parent"
        faults.append((place, Fault(dotted(place), text, document.line(place))))
    return faults


def _parent_fault(produces: str, parent: str, known: Mapping[str, type[Stage]], raw: Mapping[str, Any]) -> str | None:
    fitting = sorted(name for name, stage in known.items() if stage.produces == produces)
    if parent not in raw:
        near = suggestion(parent, fitting, f"stage that produces {produces}")
        return (
            f"must name a stage of this recipe that produces {produces}; got {parent!r}; {near} "
            "(an artifact elsewhere is a path with a slash)"
        )
    if parent in known and parent not in fitting:
        found = known[parent].produces
        return (
            f"must name a stage that produces {produces}; got {parent!r}, which produces {found}; "
            f"{suggestion(parent, fitting, f'stage that produces {produces}')}"
        )
    return None


def cycles(edges: Mapping[str, list[str]]) -> list[list[str]]:
    """Each cycle once, as the names along it, child before parent."""
    found: list[list[str]] = []
    finished: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append(way[way.index(name) :])
        elif name not in finished:
            for parent in edges.get(name, []):
                visit(parent, [*way, name])
            finished.add(name)

    for name in edges:
        visit(name, [])
    return found


def in_order(parents: Mapping[str, list[str]]) -> list[str]:
    """Names with every parent before its children, otherwise in the order given; there must be no cycle."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for parent in parents[name]:
                visit(parent)
            order.append(name)

    for name in parents:
        visit(name)
    return order
