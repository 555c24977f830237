"""What the README says of the code is what the code says of itself."""

import importlib.util
import re
from pathlib import Path

import pytest

from pipelines.recipe import RECIPES
from stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def readme_module():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_and_presets_are_what_the_code_computes():
    assert readme_module().render(README) == README


def test_a_drifted_figure_is_found():
    assert readme_module().render(README.replace("699,911,936", "700,000,000")) == README


def layout() -> dict[str, str]:
    block = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    return dict(re.match(r"(\S+/)\s+(.*)", line).groups() for line in block.splitlines())


def test_every_folder_of_the_layout_exists_and_every_room_is_listed():
    assert [folder for folder in layout() if not (ROOT / folder).is_dir()] == []
    assert {"pipelines/", "stages/", "model/", "data/", "ds_configs/", "tests/"} <= set(layout())


@pytest.mark.parametrize("folder", ["stages/", "stages/runtime/", "model/", "model/mixers/", "data/", "ds_configs/"])
def test_every_name_of_the_layout_is_a_file(folder):
    names = re.findall(r"\b[a-z][a-z0-9_]+\b", layout()[folder].split(":")[0])
    missing = [n for n in names if not any((ROOT / folder / f"{n}{end}").exists() for end in (".py", ".json"))]
    assert missing == []


def test_stages_and_recipes_are_all_named():
    assert [kind for kind in STAGES if kind not in layout()["stages/"]] == []
    assert [path.name for path in RECIPES.glob("*.yaml") if f"`{path.name}`" not in README] == []


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets
