"""lm-evaluation-harness through its Python API, with our own model behind its interface.

Published tasks are fetched from the hub by name; those of ``harness_local`` need none. The harness is imported when the
suite runs, since that takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from numbers import Real
from typing import Any

from stages.base import ConfigError, Fault
from stages.runtime import rng
from stages.runtime.suites.bench import Bench, greedy
from stages.runtime.suites.config import DEFAULT_NEW_TOKENS, HarnessConfig
from stages.runtime.suites.harness_local import local_tasks
from stages.runtime.suites.published import FIELD, task_manager, unknown
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash, interval_of

VERSION = 2
INTERVAL = "value and 1.96 standard errors of the harness, 95%"
_RESAMPLES = 100
"""For metrics that are no means; the standard error of a mean needs none."""
_FEWSHOT_SEED = 1234
"""The harness's own default."""
_Z = 1.959963984540054


def check(bench: Bench, config: HarnessConfig) -> None:
    """Read every file and find every published task before any suite is run.

    Raises:
        ConfigError: as ``run`` does, of the tasks.
    """
    local = local_tasks(bench, config)
    if config.tasks:
        with _quiet(), rng.undisturbed():
            load_tasks(task_manager(published=True), local, config.tasks)


def run(bench: Bench, config: HarnessConfig) -> SuiteResult:
    """``harness/<task>/<metric>`` for every metric with a standard error or with items that reproduce it.

    Raises:
        ConfigError: for a task that the harness does not know or the hub does not give, and for faulty files.
    """
    local = local_tasks(bench, config)
    # The harness and its tasks draw from the global generators: always from the same place, and put back.
    with _quiet(), rng.undisturbed():
        rng.seed_all(_FEWSHOT_SEED)
        found = _evaluated(bench, local, config)
    settings = {"lm_eval": version("lm_eval")}
    licences = {task.name: {"licence": task.licence} for task in config.files}
    # A group of tasks has a result and no samples: it is an average, and none is wanted (TRAPS M5).
    sheets = [
        _sheet(name, found, settings | licences.get(name, {})) for name in found["results"] if name in found["samples"]
    ]
    return SuiteResult(
        [score for sheet in sheets for score in sheet.scores],
        {name: items for sheet in sheets for name, items in sheet.items.items()},
    )


def _evaluated(bench: Bench, local: list[dict[str, Any]], config: HarnessConfig) -> Mapping[str, Any]:
    """What the harness says of the ``local`` configurations and of the tasks that ``config`` names.

    ``evaluate`` and not ``simple_evaluate``, which does the same and then runs pip to list the environment. Every rank
    asks the same; the bench deals the rows out.
    """
    from lm_eval import evaluate

    from stages.runtime.suites.harness_model import HarnessModel

    loaded = load_tasks(task_manager(published=bool(config.tasks)), local, config.tasks)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    found = evaluate(
        lm=HarnessModel(bench), task_dict=loaded, limit=config.limit, bootstrap_iters=_RESAMPLES, log_samples=True
    )
    assert found is not None, "the harness gives its results to rank 0, and there is no other"
    return found


def load_tasks(manager: Any, local: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Tasks ready to run, the ``local`` configurations and the published ones called ``names``.

    Raises:
        ConfigError: with every name that the harness does not know, or whose data cannot be had.
    """
    faults = unknown(names, manager.all_tasks)
    if faults:
        raise ConfigError(faults)
    try:
        return dict(manager.load([*local, *names]))
    except OSError as error:
        message = (
            f"must be had from the hub; {', '.join(names)} cannot be: {str(error).splitlines()[0]}; run with a "
            "network, or give a local copy in harness.files, under a name that ends in _local"
        )
        raise ConfigError(Fault(FIELD, message)) from error


def _sheet(task: str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> ScoreSheet:
    """The scores of one task: every metric with a standard error, by its filter where it has more than one."""
    samples, results, described = found["samples"][task], found["results"][task], found["configs"][task]
    sheet = ScoreSheet(
        "harness", VERSION, content_hash([sample["doc"] for sample in samples]), settings, _decoding(described)
    )
    keys = [key for key, value in results.items() if "," in key and "_stderr," not in key and isinstance(value, float)]
    metrics = [key.partition(",")[0] for key in keys]
    for key, metric in zip(keys, metrics, strict=True):
        chosen = key.partition(",")[2]
        mine = [sample for sample in samples if sample["filter"] == chosen and metric in sample]
        name = f"harness/{task}/{metric}" + (f"/{chosen}" if metrics.count(metric) > 1 else "")
        items, error = items_of(mine, metric, results[key]), results.get(f"{metric}_stderr,{chosen}")
        if items is not None:
            sheet.items[name] = items
        elif not isinstance(error, float):
            continue
        _put(sheet, name, len(mine), results[key], error, found["higher_is_better"][task][metric])
    return sheet


def items_of(samples: list[Mapping[str, Any]], metric: str, value: float) -> Items | None:
    """What each question contributed to ``value``; none where that is no mean of theirs, such as a perplexity.

    Bits per byte come as pairs of log-likelihood and bytes, and are the ratio of their sums.
    """
    contributed = [sample[metric] for sample in samples]
    ids = [str(sample["doc"].get("id", sample["doc_id"])) for sample in samples]
    if contributed and all(isinstance(one, Real) for one in contributed):
        items = Items(ids, [float(one) for one in contributed])
    elif contributed and metric == "bits_per_byte":
        items = Items(ids, [-one[0] / math.log(2) for one in contributed], [float(one[1]) for one in contributed])
    else:
        return None
    return items if math.isclose(items.value(), value, rel_tol=1e-6, abs_tol=1e-12) else None


def _put(sheet: ScoreSheet, name: str, n: int, value: float, error: Any, higher: bool) -> None:
    """What has items gets the interval that all our scores have; the harness's own error stands beside it."""
    items = sheet.items.get(name)
    is_share = items is not None and items.denominator is None and set(items.numerator) <= {0.0, 1.0}
    unit = "bits_per_byte" if items is not None and items.denominator is not None else "share" if is_share else "score"
    # What bits are told of is read, not asked.
    n_unit = "documents" if unit == "bits_per_byte" else "questions"
    # The error is the model's own: among the settings it would keep every two models from being compared.
    own = f"; standard error {error:.6g}" if isinstance(error, float) else ""
    if items is not None:
        interval, method = interval_of(items, unit, n_unit)
    else:
        interval, method = (value - _Z * error, value + _Z * error), INTERVAL
    sheet.put(
        name, float(value), n, interval, method if interval is None else method + own,
        unit=unit, better="higher" if higher else "lower", n_unit=n_unit,
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
