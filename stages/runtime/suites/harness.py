"""lm-evaluation-harness through its Python API, with our own model behind its interface.

A task made from this recipe's own sets is named ``*_local``: it is no published benchmark and must not pass for one.
The harness is imported when the suite runs, since that takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from numbers import Real
from typing import Any

from data.facts import read_facts
from stages.runtime.suites.bench import Bench, greedy
from stages.runtime.suites.config import DEFAULT_NEW_TOKENS, HarnessConfig
from stages.runtime.suites.reasoning import questions
from stages.runtime.suites.scores import WILSON, Items, ScoreSheet, SuiteResult, content_hash, wilson

VERSION = 1
INTERVAL = "value and 1.96 standard errors of the harness, 95%"
_RESAMPLES = 100
"""For metrics that are no means; the standard error of a mean needs none."""
_FEWSHOT_SEED = 1234
"""The harness's own default."""
_Z = 1.959963984540054


def run(bench: Bench, config: HarnessConfig) -> SuiteResult:
    """``harness/<task>/<metric>`` for every metric that a task reports with a standard error."""
    local = {name: _LOCAL[name](bench, config) for name in config.local}
    with _quiet():
        found = _evaluated(bench, [*local.values(), *config.tasks], config)
    settings = {"lm_eval": version("lm_eval")}
    # A group of tasks has a result and no samples: it is an average, and none is wanted (TRAPS M5).
    sheets = [_sheet(name, found, settings) for name in found["results"] if name in found["samples"]]
    return SuiteResult(
        [score for sheet in sheets for score in sheet.scores],
        {name: items for sheet in sheets for name, items in sheet.items.items()},
    )


def _evaluated(bench: Bench, tasks: list[Any], config: HarnessConfig) -> Mapping[str, Any]:
    """What the harness says of ``tasks``, configurations or names.

    ``evaluate`` and not ``simple_evaluate``, which does the same and then runs pip to list the environment.
    """
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    from stages.runtime.suites.harness_model import HarnessModel

    # Reading the index of thousands of published tasks takes seconds; configurations of our own need none of it.
    loaded = TaskManager(include_defaults=bool(config.tasks)).load(tasks)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    found = evaluate(
        lm=HarnessModel(bench), task_dict=loaded, limit=config.limit, bootstrap_iters=_RESAMPLES, log_samples=True
    )
    assert found is not None, "the harness gives its results to rank 0, and there is no other"
    return found


def facts_task(bench: Bench, config: HarnessConfig) -> dict[str, Any]:
    """The contrastive facts as multiple choice by likelihood."""
    rows = [
        {"id": fact["id"], "prompt": fact["prompt"], "choices": [fact["correct"], *fact["distractors"]]}
        for fact in read_facts(bench.inputs["facts"])
    ]
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    asked = {"doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0, "target_delimiter": " "}
    return {**_task("facts_local", rows), **asked, "output_type": "multiple_choice", "metric_list": metrics}


def tasks_task(bench: Bench, config: HarnessConfig) -> dict[str, Any]:
    """The held-out questions, put as a user's message, with the answer that stands at the reply's end."""
    rows = [
        {"id": row["id"], "question": row["prompt"][-1]["content"], "answer": row["answer"]}
        for row in questions(bench.inputs["tasks"], None)
    ]
    return {
        **_task("tasks_local", rows),
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": config.max_new_tokens, "as_chat": True},
        "filter_list": [{
            "name": "final_answer",
            "filter": [
                {"function": "regex", "regex_pattern": r"(?s:.*)Answer:\s*([^\n]+?)\s*$", "group_select": -1},
                {"function": "take_first"},
            ],
        }],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


_LOCAL = {"facts_local": facts_task, "tasks_local": tasks_task}


def _task(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return {"task": name, "custom_dataset": dataset, "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1}}


def _sheet(task: str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> ScoreSheet:
    """The scores of one task: every metric with a standard error, by its filter where it has more than one."""
    samples, results, described = found["samples"][task], found["results"][task], found["configs"][task]
    sheet = ScoreSheet(
        "harness", VERSION, content_hash([sample["doc"] for sample in samples]), settings, _decoding(described)
    )
    keys = [key for key in results if isinstance(results.get(key.replace(",", "_stderr,")), float)]
    metrics = [key.partition(",")[0] for key in keys]
    for key, metric in zip(keys, metrics, strict=True):
        chosen = key.partition(",")[2]
        mine = [sample for sample in samples if sample["filter"] == chosen and metric in sample]
        name = f"harness/{task}/{metric}" + (f"/{chosen}" if metrics.count(metric) > 1 else "")
        if items := mean_items(mine, metric, results[key]):
            sheet.items[name] = items
        error, higher = results[f"{metric}_stderr,{chosen}"], found["higher_is_better"][task][metric]
        _put(sheet, name, len(mine), results[key], error, higher)
    return sheet


def mean_items(samples: list[Mapping[str, Any]], metric: str, value: float) -> Items | None:
    """What each question contributed to ``value``; none where that is no mean of theirs, such as a perplexity."""
    numbers = [sample[metric] for sample in samples]
    if not numbers or not all(isinstance(one, Real) for one in numbers):
        return None
    ids = [str(sample["doc"].get("id", sample["doc_id"])) for sample in samples]
    items = Items(ids, [float(one) for one in numbers])
    return items if math.isclose(items.value(), value, rel_tol=1e-6, abs_tol=1e-12) else None


def _put(sheet: ScoreSheet, name: str, n: int, value: float, error: float, higher: bool) -> None:
    """A share of yes and no gets the interval that all our shares have; the harness's own error stands beside it."""
    items = sheet.items.get(name)
    is_share = items is not None and set(items.numerator) <= {0.0, 1.0}
    interval = (value - _Z * error, value + _Z * error)
    if items is not None and is_share:
        interval = wilson(round(sum(items.numerator)), n)
    # The error is the model's own: among the settings it would keep every two models from being compared.
    sheet.put(
        name, float(value), n, interval, f"{WILSON if is_share else INTERVAL}; standard error {error:.6g}",
        unit="share" if is_share else "score", better="higher" if higher else "lower", n_unit="questions",
    )  # fmt: skip


def _decoding(described: Mapping[str, Any]) -> dict[str, Any] | None:
    if described["output_type"] != "generate_until":
        return None
    return greedy(int((described.get("generation_kwargs") or {}).get("max_gen_toks", DEFAULT_NEW_TOKENS)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's progress bars, log lines and third-party warnings out of the stage's log."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
