"""Imports run one way: pipelines -> stages -> {model, data}; runtime imports no stage; no stage imports another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pipelines", "stages", "model", "data")
MAY_IMPORT = {
    "pipelines": {"pipelines", "stages", "model", "data"},
    "stages": {"stages", "model", "data"},
    "model": {"model"},
    "data": {"data"},
}
SHARED_STAGE_MODULES = {"stages.base", "stages.runtime"}


def imported_modules(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(path: Path, source: str) -> list[str]:
    """What `source`, standing at `path` (relative to the root), imports but must not."""
    room = path.parts[0]
    bad = []
    for module in sorted(imported_modules(source)):
        top = module.split(".")[0]
        if top in ROOMS and top not in MAY_IMPORT[room]:
            bad.append(f"{path}: {room} must not import {module}")
        if room == "stages" and path.name != "__init__.py" and top == "stages":
            parts = module.split(".")
            if len(parts) > 1 and ".".join(parts[:2]) not in SHARED_STAGE_MODULES:
                bad.append(f"{path}: a stage and its runtime must not import {module}")
    return bad


def sources() -> list[Path]:
    return [path.relative_to(ROOT) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_run_downwards_only(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/lm.py", "import data.loader"),
        ("data/loader.py", "from stages.base import Stage"),
        ("stages/pretrain.py", "from stages.clean import Clean"),
        ("stages/runtime/loop.py", "def f():\n    from stages import pretrain"),
        ("stages/clean.py", "import pipelines.run"),
    ],
)
def test_an_upward_import_is_found(path, source):
    assert len(violations(Path(path), source)) >= 1
