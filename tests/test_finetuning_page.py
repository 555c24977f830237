"""The recipe on the page about fine-tuning is one, and its rows are those that the stages read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from data.messages_config import MessagesSource
from data.messages_rules import MessagesFault
from data.messages_sources import read_conversations
from data.preferences_config import PreferenceSource
from data.preferences_rows import RowFault, read_rows
from pipelines.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
ROWS = [re.sub(r"\.\.\.", "{}", row) for row in re.findall(r"`(\{\"(?:messages|prompt)\".*?\})`", PAGE)]


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """The page's stages, with the files that they name filled by the page's rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats").mkdir()
    for path, row in (("chats/a.jsonl", ROWS[0]), ("pairs.jsonl", ROWS[1])):
        lines = [row.replace("{}", f"Words {number}", 1).replace("{}", "Yes", 1) for number in range(40)]
        (tmp_path / path).write_text("\n".join(line.replace("{}", "No") for line in lines) + "\n")
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    return yaml.safe_load(block)["stages"]


def test_the_pages_stages_follow_the_default_recipes_pretraining(stages, tmp_path):
    recipe = yaml.safe_load((ROOT / "pipelines/recipes/default.yaml").read_text(encoding="utf-8"))
    before = {name: recipe["stages"][name] for name in ("clean", "tokenizer", "tokenize", "pretrain")}
    del before["clean"]["preferences"], before["clean"]["decontaminate"]
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(recipe | {"stages": before | stages}, sort_keys=False))
    assert {config.kind for name, config in load_recipe(path).stages.items() if name in stages} == set(stages)


def test_the_pages_rows_are_read_and_none_is_left_out(stages):
    conversations, pairs = stages["messages"]["sources"][0], stages["preferences"]["sources"][1]
    read = list(read_conversations(TypeAdapter(MessagesSource).validate_python(conversations), Path("cache"), {}))
    assert [row for row in read if isinstance(row, MessagesFault)] == []
    found = list(read_rows(TypeAdapter(PreferenceSource).validate_python(pairs), Path("cache")))
    assert [row for row in found if isinstance(row, RowFault)] == []
    assert (len(read), len(found)) == (40, 40)
