"""One evaluation: each suite in turn, its result kept in a file, and then the three files of the output.

Nothing of time, place or machine is written, so that two evaluations of one model are equal byte for byte (TRAPS M2),
on one rank or many: the suites run on every rank alike and the bench deals the work out; rank 0 alone keeps files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from data.fetch import fetch_package
from stages.base import ConfigError, Fault, StageContext, StageResult, StopRequested
from stages.runtime import distributed, rng
from stages.runtime.artifact import read_record
from stages.runtime.manifest import sealed_digest
from stages.runtime.suites.bench import Bench, few_threads, open_bench
from stages.runtime.suites.harness_local import file_input
from stages.runtime.suites.intervals import reason
from stages.runtime.suites.registry import SUITES
from stages.runtime.suites.scores import CONFIDENCE, SuiteResult, content_hash

FORMAT = 1
_SHOWN_PARTS = {("language", "bpb"), ("language", "safety")}
"""Parts that the summary shows beside the whole."""
SCORES_FILE, ITEMS_FILE, SAMPLES_FILE = "scores.json", "items.json", "samples.json"


def evaluate_model(context: StageContext) -> StageResult:
    """Run the chosen suites and write the output; finished suites of an interrupted run are taken from ``work``.

    Raises:
        StopRequested: between two suites of several ranks, when any of them was asked to stop.
        ConfigError: before any suite is run, with all that any of them would refuse of its files and sets.
        RuntimeError: for a suite that draws from a generator that is not its own.
    """
    config = context.config
    chosen = config.suites.chosen()
    if distributed.world_size() > 1:
        distributed.init_process_group()
    if distributed.rank() == 0:
        context.output.mkdir(parents=True, exist_ok=True)
        context.work.mkdir(parents=True, exist_ok=True)
    digests = {field: sealed_digest(context.parent_output(field)) for field in context.parents}
    inputs = {field: context.parent_output(field) for field in context.parents} | _files(config, context.cache)
    found: dict[str, dict[str, Any]] = {}
    with rng.undisturbed(), _stoppable(context.directory) as stop_if_asked:
        bench = open_bench(
            context.parent_output("from_"),
            batch_size=config.batch_size,
            precision=config.precision,
            inputs=inputs,
            digest=context.parent_digest("from_") or digests["from_"],
        )
        _check(bench, chosen)
        with few_threads(bench.model):
            for name, section in chosen.items():
                stop_if_asked()
                stamp = content_hash([SUITES[name].version, section.model_dump(mode="json"), context.key, digests])
                found[name] = _result(name, context.work, stamp, functools.partial(SUITES[name].run, bench, section))
    if distributed.rank() > 0:
        return StageResult({})
    return _write(context, found, digests["from_"])


def _check(bench: Bench, chosen: Mapping[str, Any]) -> None:
    """What the suites refuse is told before hours are spent on those that come first."""
    faults: list[Fault] = []
    for name, section in chosen.items():
        check = SUITES[name].check
        try:
            if check is not None:
                check(bench, section)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)


def _files(config: Any, cache: Path) -> dict[str, Path]:
    """Where the harness's local tasks lie; a package is fetched once."""
    tasks = config.suites.harness.files if config.suites.harness else ()
    return {
        file_input(task): Path(task.path) if task.type == "file" else fetch_package(task.package, cache) / task.member
        for task in tasks
    }


@contextlib.contextmanager
def _stoppable(directory: Path) -> Iterator[Callable[[], None]]:
    """A call that raises ``StopRequested`` on all ranks together; one rank alone is stopped by its signal's handler."""
    if distributed.world_size() == 1:
        yield lambda: None
        return
    with distributed.StopWatch(directory) as watch:

        def stop_if_asked() -> None:
            if watch.agreed():
                raise StopRequested(watch.reason)

        yield stop_if_asked


def _result(name: str, work: Path, stamp: str, run: Callable[[], SuiteResult]) -> dict[str, Any]:
    """The suite's result as plain data, kept from before where the question was the same; collective."""
    path, started = work / f"{name}.json", time.monotonic()
    kept = distributed.on_rank_zero(lambda: _kept(path, stamp))
    if kept is not None:
        _say(f"{name}: kept from before")
        return kept
    before = rng.capture()
    found = run()
    if not _is_equal(before, rng.capture()):
        raise RuntimeError(
            f"suite {name} must draw from generators of its own; it moved a global one, so that its result would "
            "depend on what ran before; give it a seeded generator"
        )
    # Through JSON, so that a kept result and a new one are the same data.
    result = json.loads(json.dumps(found.plain()))
    distributed.on_rank_zero(lambda: _keep(path, {"stamp": stamp, "result": result}))
    _say(f"{name}: {time.monotonic() - started:.1f} s")
    return dict(result)


def _kept(path: Path, stamp: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    return dict(stored["result"]) if stored["stamp"] == stamp else None


def _keep(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)


def _is_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two captured states are the same bits; a draw that does not wait is NaN in both."""
    return one.keys() == other.keys() and all(
        torch.equal(torch.nan_to_num(value), torch.nan_to_num(other[name])) for name, value in one.items()
    )


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, flush=True)


def _write(context: StageContext, found: Mapping[str, Mapping[str, Any]], digest: str | None) -> StageResult:
    scores = [score for result in found.values() for score in result["scores"]]
    samples = [sample for result in found.values() for sample in result["samples"]]
    parent = read_record(context.parents["from_"]) or {}
    not_run = [name for name in SUITES if name not in found]
    content = {
        "format": FORMAT,
        "stage": parent.get("stage"),
        "key": parent.get("key"),
        # As it was when it was loaded: a longer run's output may lie there by now.
        "digest": digest,
        "confidence": CONFIDENCE,
        "settings": {"batch_size": context.config.batch_size, "precision": context.config.precision},
        "scores": scores,
        "not_run": dict.fromkeys(not_run, "not among the recipe's suites"),
    }
    prompts = [[sample["id"], sample["prompt"], sample["decoding"]] for sample in samples]
    _dump(context.output / SCORES_FILE, content)
    _dump(
        context.output / ITEMS_FILE, {name: one for result in found.values() for name, one in result["items"].items()}
    )
    _dump(context.output / SAMPLES_FILE, {"format": FORMAT, "set_hash": content_hash(prompts), "samples": samples})
    metrics = _metrics(scores)
    if metrics:
        context.tracker.log("scores", 0, metrics)
    return StageResult(metrics, summary(content, samples))


def _metrics(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Values by name; the held-out set's hash goes with bits per byte (TRAPS M3)."""
    hashes = {score["set_hash"] for score in scores if score["suite"] == "bpb"}
    values: dict[str, Any] = {score["name"]: score["value"] for score in scores}
    return values | ({"heldout_hash": hashes.pop()} if hashes else {})


def summary(content: Mapping[str, Any], samples: list[dict[str, Any]]) -> list[str]:
    """One screen: a line a score with its interval and n, finer parts left to the files, and the greedy samples."""
    model = f"{content['stage']}-{str(content['key'])[:8]}"
    lines = [f"{'score of ' + model:<34} {'value':>9}  {'95% interval':<19} {'unit':<15} {'n':>5}"]
    for score in content["scores"]:
        if not (score["part"] in (None, "difficulty", "task") or (score["part"], score["suite"]) in _SHOWN_PARTS):
            continue
        interval = score["interval"]
        shown = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "none"
        why = "" if interval else f" ({reason(score['method'])})"
        tail = f"{score['unit']:<15} {score['n']:>5} {score['n_unit']}{why}"
        lines.append(f"{score['name']:<34} {score['value']:>9.4f}  {shown:<19} {tail}")
    for sample in samples:
        if sample["decoding"]["temperature"] == 0:
            text = " ".join(sample["completion"].split())
            lines.append(f"{sample['prompt'][-1]['content']} -> {text[:90]}")
    return lines


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
