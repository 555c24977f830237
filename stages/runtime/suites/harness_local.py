"""Tasks of the harness that need no hub: from this recipe's own sets, from files, and from what the harness ships.

Each is named ``*_local``: it is no published benchmark, or a copy or a part of one, and must not pass for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.facts import read_facts
from data.questions import read_mmlu_examples
from data.tokenizer import decode_bytes
from stages.base import ConfigError
from stages.runtime.suites import bpb
from stages.runtime.suites.bench import Bench
from stages.runtime.suites.config import BpbConfig, HarnessConfig, LocalTaskBase
from stages.runtime.suites.question_files import file_faults, task_questions
from stages.runtime.suites.reasoning import questions

Task = dict[str, Any]
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
"""What counts as the final answer of a reply to a question whose answer is a number: the last one in it."""
_MEAN = {"aggregation": "mean", "higher_is_better": True}


def local_tasks(bench: Bench, config: HarnessConfig) -> list[Task]:
    """Configurations for the harness of everything local.

    Raises:
        ConfigError: for files that hold no questions.
    """
    faults = list(file_faults(config, {task.name: bench.inputs[file_input(task)] for task in config.files}))
    if faults:
        raise ConfigError(faults)
    made = [_LOCAL[name](bench, config) for name in config.local]
    return made + [file_task(task, bench.inputs[file_input(task)]) for task in config.files]


def file_input(task: LocalTaskBase) -> str:
    """The name by which ``Bench.inputs`` has a task's file."""
    return f"harness/{task.name}"


def facts_task(bench: Bench, config: HarnessConfig) -> Task:
    """The contrastive facts as multiple choice by likelihood, with wrong endings of the same kind."""
    rows = [
        {"id": fact["id"], "question": fact["prompt"], "right": 0,
         "choices": [fact["correct"], *fact["distractors"]["medium"]]}
        for fact in read_facts(bench.inputs["facts"])
    ]  # fmt: skip
    return _choice("facts_local", rows)


def tasks_task(bench: Bench, config: HarnessConfig) -> Task:
    """The held-out questions, put as a user's message, with the answer that stands at the reply's end."""
    rows = [
        {"id": row["id"], "question": row["prompt"][-1]["content"], "answer": row["answer"]}
        for row in questions(bench.inputs["tasks"], None)
    ]
    pattern = r"(?s:.*)Answer:\s*([^\n]+?)\s*$"
    return _answer("tasks_local", rows, config.max_new_tokens, pattern)


def heldout_task(bench: Bench, config: HarnessConfig) -> Task:
    """Held-out documents whole, for the harness's own bits per byte (see ``docs/evaluation.md`` for the difference)."""
    chosen = BpbConfig(documents=config.heldout_documents, document_tokens=None)
    rows = [
        {"id": document.id, "question": "", "text": decode_bytes(bench.tokenizer, document.ids).decode()}
        for document in bpb.chosen(bench.inputs["data"], chosen)
    ]
    metrics = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    return {
        **_task("heldout_local", rows), "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{text}}", "metric_list": metrics,
    }  # fmt: skip


def mmlu_dev_task(language: str) -> Callable[[Bench, HarnessConfig], Task]:
    """MMLU's development questions in ``language`` that the harness ships as examples; they are not MMLU."""

    def make(bench: Bench, config: HarnessConfig) -> Task:
        import lm_eval

        name = "mmlu_dev_local" if language == "en" else f"mmlu_dev_{language}_local"
        return _choice(name, read_mmlu_examples(Path(lm_eval.__file__).parent / "tasks", language))

    return make


def file_task(task: LocalTaskBase, path: Path) -> Task:
    """A task of one's own file, or of a pinned package's.

    Raises:
        DataError: for a file that holds no questions.
    """
    rows = task_questions(task, path)
    if task.kind == "choice":
        return _choice(task.name, rows)
    # Signs by which a number is only written otherwise do not make it another one.
    ignored = {"regexes_to_ignore": [",", r"\$", r"\.$"]}
    return _answer(task.name, rows, task.max_new_tokens, f"({NUMBER})", **ignored)


_LOCAL: dict[str, Callable[[Bench, HarnessConfig], Task]] = {
    "facts_local": facts_task,
    "tasks_local": tasks_task,
    "heldout_local": heldout_task,
    "mmlu_dev_local": mmlu_dev_task("en"),
    "mmlu_dev_de_local": mmlu_dev_task("de"),
    "mmlu_dev_hi_local": mmlu_dev_task("hi"),
}


def _task(name: str, rows: list[Task]) -> Task:
    def dataset(**_: Any) -> Mapping[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return {"task": name, "custom_dataset": dataset, "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1}}


def _choice(name: str, rows: list[Task]) -> Task:
    asked = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}"}
    metrics = [{"metric": metric, **_MEAN} for metric in ("acc", "acc_norm")]
    return {
        **_task(name, rows), **asked, "target_delimiter": " ", "output_type": "multiple_choice", "metric_list": metrics,
    }  # fmt: skip


def _answer(name: str, rows: list[Task], max_new_tokens: int, pattern: str, **compared: Any) -> Task:
    """A user's message; of the reply the last match of ``pattern`` is compared."""
    steps = [{"function": "regex", "regex_pattern": pattern, "group_select": -1}, {"function": "take_first"}]
    return {
        **_task(name, rows),
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": max_new_tokens, "as_chat": True},
        "filter_list": [{"name": "final_answer", "filter": steps}],
        "metric_list": [{"metric": "exact_match", **_MEAN, **compared}],
    }
