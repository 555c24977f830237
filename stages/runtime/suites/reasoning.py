"""Exact answers to held-out questions: decoded greedily, the final answer compared character by character."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.rewards import extract_answer, is_correct
from stages.runtime.suites.bench import Bench, greedy
from stages.runtime.suites.config import ReasoningConfig
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash

VERSION = 1


def run(bench: Bench, config: ReasoningConfig) -> SuiteResult:
    """``reasoning/<task>``, ``reasoning/all`` and ``reasoning/answered``, the share that gave any final answer."""
    rows = questions(bench.inputs["tasks"], config.questions)
    prompts = bench.prompts("reasoning", [(row["id"], row["prompt"]) for row in rows], config.max_new_tokens)
    kept = {prompt.id for prompt in prompts}
    rows = [row for row in rows if row["id"] in kept]
    replies = bench.replies(prompts, config.max_new_tokens)
    # The text leaves specials out: one within an answer must not make it exact.
    right = [float(reply.is_clean and is_correct(reply.text, row)) for reply, row in zip(replies, rows, strict=True)]
    answered = [float(extract_answer(reply.text) is not None) for reply in replies]
    ids, decoding = [row["id"] for row in rows], greedy(config.max_new_tokens)
    sheet = ScoreSheet("reasoning", VERSION, content_hash(rows), {}, decoding)
    tasks = [row["task"] for row in rows]
    for task in sorted(set(tasks)):
        of_task = Items(ids, right).only([one == task for one in tasks])
        sheet.add(f"reasoning/{task}", of_task, unit="share", better="higher", n_unit="questions", part="task")
    sheet.add("reasoning/all", Items(ids, right), unit="share", better="higher", n_unit="questions")
    sheet.add("reasoning/answered", Items(ids, answered), unit="share", better="higher", n_unit="questions")
    return sheet.result()


def questions(tasks_dir: Path, per_task: int | None) -> list[Mapping[str, Any]]:
    """The first held-out questions of each task."""
    taken: Counter[str] = Counter()
    kept = []
    with (tasks_dir / "heldout.jsonl").open("rb") as lines:
        for line in lines:
            row = json.loads(line)
            taken[row["task"]] += 1
            if per_task is None or taken[row["task"]] <= per_task:
                kept.append(row)
    return kept
