"""House rules that a reader should not have to check by eye."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from stages import STAGES
from stages.runtime.suites.config import NEEDS

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pipelines", "stages", "model", "data")


def python_files() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def section_types() -> set[type[BaseModel]]:
    """Every configuration section that a recipe can reach."""
    importlib.import_module("pipelines.recipe")
    found: set[type[BaseModel]] = set()
    queue = [BaseModel]
    while queue:
        for child in queue.pop().__subclasses__():
            queue.append(child)
            if child.__module__.split(".")[0] in ROOMS and child.model_fields:
                found.add(child)
    return found


def test_every_stage_is_listed_by_its_own_kind():
    assert {kind: stage.kind for kind, stage in STAGES.items()} == {kind: kind for kind in STAGES}


def test_every_section_is_frozen_and_refuses_unknown_keys():  # trap T7
    loose = [
        section.__qualname__
        for section in section_types()
        if section.model_config.get("extra") != "forbid" or not section.model_config.get("frozen")
    ]
    assert loose == []


def test_every_field_says_what_it_is():
    bare = {
        f"{section.__qualname__}.{name}"
        for section in section_types()
        for name, field in section.model_fields.items()
        if not field.description
    }
    assert bare == set()


def test_every_field_is_read_somewhere():
    read = set()
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    read |= {field for stage in STAGES.values() for field in stage.inputs}  # chain reads them by name
    read |= set(NEEDS)  # so does the registry of suites
    unread = {
        f"{section.__qualname__}.{name}"
        for section in section_types()
        for name in section.model_fields
        if name not in read and name not in {"kind", "mixer", "type"}
    }
    assert unread == set()


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_within_a_readers_reach(path):
    assert len(path.read_text().splitlines()) <= 400


def test_nothing_loads_pickles_from_strangers():  # trap O3
    calls = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if re.search(r"\b(torch\.load|pickle\.loads?)\(", path.read_text())
    ]
    assert calls == []
