"""Verifiable questions: drawn by rule, split by the question's hash, answered exactly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from data.tasks import TASKS, TaskChoice, choices_faults, rows
from model.spec import ModelSpec
from stages.base import Fault, Input, Stage, StageConfig, StageContext, StageResult

SPLITS = ("train", "heldout")


class TasksConfig(StageConfig):
    """Which tasks, how hard, and how many questions of each."""

    kind: Literal["tasks"] = "tasks"
    """This stage."""
    tasks: list[TaskChoice] = Field(min_length=1)
    """The mixture; the held-out side of a task is the same in every recipe."""


class Tasks(Stage):
    """From generators to frozen questions of two disjoint sides."""

    kind: ClassVar[str] = "tasks"
    Config: ClassVar[type[StageConfig]] = TasksConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "tasks"
    inputs: ClassVar[dict[str, Input]] = {}

    @classmethod
    def check(cls, config: TasksConfig, model: ModelSpec | None) -> list[Fault]:
        """Unknown tasks, sizes and spaces too small, and sides without questions."""
        faults = [Fault(field, message) for field, message in choices_faults(config.tasks)]
        for split in SPLITS:
            if not any(getattr(choice, split) for choice in config.tasks):
                faults.append(
                    Fault(f"tasks[0].{split}", "must be above 0 in one task at least; got 0; set 500 or more")
                )
        return faults

    @classmethod
    def plan(cls, config: TasksConfig, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Questions on either side."""
        return {f"{split}_questions": sum(getattr(choice, split) for choice in config.tasks) for split in SPLITS}

    def run(self, context: StageContext) -> StageResult:
        """Draw, check that the sides are disjoint, write ``{train,heldout}.jsonl``, and ``tasks.json`` last."""
        choices = context.config.tasks
        sides = {split: [row for choice in choices for row in rows(choice, split, context.seed)] for split in SPLITS}
        assert not {row["id"] for row in sides["train"]} & {row["id"] for row in sides["heldout"]}, "sides overlap"
        digests = {split: _write(context.output / f"{split}.jsonl", found) for split, found in sides.items()}
        facts = {
            "format": 1,
            "tasks": {f"{choice.name}-{choice.size}": _facts(choice) for choice in choices},
            "heldout_hash": digests["heldout"],
        }
        (context.output / "tasks.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        counts = {f"{split}_questions": len(found) for split, found in sides.items()}
        return StageResult(counts | {"heldout_hash": digests["heldout"]}, _summary(choices, sides))


def _facts(choice: TaskChoice) -> dict[str, Any]:
    return {**choice.model_dump(), "space": TASKS[choice.name].space(choice.size)}


def _write(path: Path, found: list[dict[str, Any]]) -> str:
    """Write rows a line; the SHA-256 of the file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    path.write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def _summary(choices: list[TaskChoice], sides: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["task            size          space     train  held-out  for example"]
    for choice in choices:
        example = next(row for found in sides.values() for row in found if row["task"] == choice.name)
        lines.append(
            f"{choice.name:<14}  {choice.size:>4}  {TASKS[choice.name].space(choice.size):>13,}  {choice.train:>8,}  "
            f"{choice.heldout:>8,}  {example['prompt'][0]['content']} {example['answer']}"
        )
    return lines
