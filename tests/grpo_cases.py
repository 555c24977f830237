"""Tiny questions for reinforcement runs, and a reward that random weights can earn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.rewards import REWARDS
from data.tasks import TaskChoice, rows

CHOICE = TaskChoice(name="parity", size=4, train=40, heldout=12)


def vowels(text: str, row: Mapping[str, Any]) -> float:
    """Share of vowels among the characters, rounded: something that completions of any model differ in."""
    return round(sum(letter in "aeiou" for letter in text) / max(1, len(text)), 2)


REWARDS["vowels"] = vowels

CONFIG: dict[str, Any] = {
    "rewards": {"vowels": 1.0}, "global_batch_size": 16, "micro_batch_size": 4, "num_generations": 8,
    "num_iterations": 2, "max_length": 64, "max_completion_length": 24, "eval_batch_size": 12,
    "probe": {"questions": 4, "samples": 8},
}  # fmt: skip
"""Two steps on each batch of two groups of eight."""


def tasks_data(directory: Path) -> None:
    """A tasks artifact of four-digit numbers, even or odd."""
    output = directory / "output"
    output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        text = "".join(json.dumps(row) + "\n" for row in rows(CHOICE, split, 1))
        (output / f"{split}.jsonl").write_text(text, encoding="utf-8")
    facts = {"format": 1, "tasks": {}, "heldout_hash": hashlib.sha256(text.encode()).hexdigest()}
    (output / "tasks.json").write_text(json.dumps(facts), encoding="utf-8")
