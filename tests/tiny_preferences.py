"""A tiny preferences artifact for tests: one asks for a word's neighbours, or for what a word must not be asked."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_run import SOURCES


def pairs(count: int, seed: int, template: str) -> list[dict[str, Any]]:
    """Rows of a preferences artifact in two languages and two categories; no two are equal."""
    drawn, rows = random.Random(seed), []
    for number in range(count):
        language = ("en", "de")[number % 2]
        words = SOURCES[language]
        place, category = drawn.randrange(len(words)), ("harmful", "benign")[number // 2 % 2]
        answers = [f"{words[place - 1]} {words[place - 2]}", f"{words[place - 3]} no"]
        chosen, rejected = answers if category == "benign" else answers[::-1]
        rows.append({
            "id": f"{template}{number}",
            "prompt": [{"role": "user", "content": f"{words[place]} {number}"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "category": category,
            "language": language,
            "template": f"{template}{number % 3}",
            "source": "made",
        })  # fmt: skip
    return rows


def write_preferences(directory: Path, train: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> None:
    """The artifact's output."""
    output = directory / "output"
    output.mkdir(parents=True)
    for side, rows in (("train", train), ("heldout", heldout)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (output / f"{side}.jsonl").write_text(text, encoding="utf-8")
    (output / "preferences.json").write_text(json.dumps({"heldout_hash": "heldout of the tests"}))


def preferences_data(directory: Path) -> None:
    """Eighteen pairs to train on and ten held out: with 32 pairs a block of the reference, one file."""
    write_preferences(directory, pairs(18, 1, "train"), pairs(10, 2, "heldout"))
