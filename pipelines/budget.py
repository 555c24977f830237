"""``--plan``: what a pretraining takes: tokens, beside those that laws want, hours, money, epochs of the data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import cost, scaling
from model.presets import PRESETS
from model.spec import ModelSpec
from stages.base import without_operational

if TYPE_CHECKING:
    from pipelines.chain import Node

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KIND = "pretrain"
_OURS, _SCOPE = "pedigree", "step"


def budget(
    node: Node, devices: int, price_per_gpu_hour: float | None, results: Path = RESULTS
) -> dict[str, Any] | None:
    """The budget of a pretraining stage as plain data, none of other stages.

    ``wanted_tokens`` (by law; none of a warm start, which the laws do not speak of), ``hours`` (none where no result in
    ``results`` is of this model) and ``epochs`` (none until the data are tokenized).
    """
    job = node.job
    if job.kind != KIND or job.model is None:
        return None
    config: Any = job.config
    tokens = int(node.stage.plan(config, job.model, devices)["tokens"])
    parameters = cost.count_parameters(job.model).total
    return {
        "parameters": parameters,
        "tokens": tokens,
        "wanted_tokens": scaling.wanted_tokens(parameters) if config.from_ is None else None,
        "hours": hours(job.model, tokens, devices, price_per_gpu_hour, results, precision=config.precision),
        "epochs": epochs(config, job.parents["data"].path, tokens),
    }


def hours(
    model: ModelSpec,
    tokens: int,
    devices: int,
    price_per_gpu_hour: float | None,
    results: Path = RESULTS,
    *,
    precision: str = "bf16",
) -> dict[str, Any] | None:
    """Hours from our own measurement of a whole training step of this very model in ``precision`` on one device.

    More devices are taken to be so many times as fast; what they say to each other costs time that nobody measured, so
    that the figure is a projection, and a lower bound.
    """
    for path in sorted(results.glob("throughput_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["rows"]:
            whole = (row.get("implementation"), row.get("scope"), row.get("precision")) == (_OURS, _SCOPE, precision)
            if whole and _is_of(row["preset"], model):
                found = tokens / row["tokens_per_s"] / devices / 3600
                priced = None if price_per_gpu_hour is None else round(found * devices * price_per_gpu_hour, 2)
                return {
                    "hours": round(found, 3),
                    "devices": devices,
                    "gpu": content["hardware"]["gpus"][0],
                    "tokens_per_s_of_one": row["tokens_per_s"],
                    "measured_at": {name: row[name] for name in ("micro_batch_size", "seq_len", "precision")},
                    "measurement": path.name,
                    "is_projection": devices > 1,
                    "price_per_gpu_hour": price_per_gpu_hour,
                    "cost": priced,
                }
    return None


def _is_of(preset: str, model: ModelSpec) -> bool:
    return preset in PRESETS and without_operational(PRESETS[preset]) == without_operational(model)


def epochs(config: Any, data: Path, tokens: int) -> dict[str, Any] | None:
    """Passes over each source, and what all the tokens are worth as fresh ones; none where nothing is tokenized."""
    from data.errors import DataError
    from stages.runtime import mixture_settings

    path = data / "output" / "tokens.json"
    if not path.is_file():
        return None
    sources = [source for source in json.loads(path.read_bytes())["sources"] if source.get("train", {}).get("tokens")]
    if not sources:
        return None
    unique = {source["name"]: int(source["train"]["tokens"]) for source in sources}
    mixture, step_tokens = mixture_settings.mixture(config), tokens // config.max_steps
    try:
        phases = mixture.shares(sources, unique, step_tokens)
    except DataError:
        # The stage itself refuses these words or this cap, and says why.
        return None
    edges = [min(phase.from_step, config.max_steps) for phase in mixture.phases] + [config.max_steps]
    trained = dict.fromkeys(unique, 0.0)
    for (start, end), shares in zip(itertools.pairwise(edges), phases, strict=True):
        for name, share in shares.items():
            trained[name] += share * step_tokens * (end - start)
    worth = sum(scaling.effective_tokens(unique[name], trained[name]) for name in unique)
    return {
        "unique_tokens": sum(unique.values()),
        "by_source": {name: round(trained[name] / unique[name], 3) for name in unique},
        "worth_tokens": round(worth),
        "tokens_in_nearly_free_epochs": scaling.NEARLY_FREE_EPOCHS * sum(unique.values()),
    }


def budget_lines(found: Mapping[str, Any]) -> list[str]:
    """A budget for a person."""
    tokens, parameters = found["tokens"], found["parameters"]
    lines = [f"trains on {_count(tokens)} tokens, {tokens / parameters:.1f} a parameter"]
    if found["wanted_tokens"]:
        laws = ", ".join(f"{_count(count)} ({name})" for name, count in found["wanted_tokens"].items())
        lines.append(f"laws of Transformers want {laws}")
    lines += [_hours_line(found["hours"]), *_epochs_lines(found["epochs"], tokens)]
    return lines


def _hours_line(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "hours: nobody measured this model here; python benchmarks/throughput.py says how fast it trains"
    at = found["measured_at"]
    speed = (
        f"{found['tokens_per_s_of_one']:,} tokens/s on one, micro-batch {at['micro_batch_size']}, sequences of "
        f"{at['seq_len']}, {at['precision']}"
    )
    line = f"{found['hours']:,.1f} hours on {found['devices']} {found['gpu']} (measured: {speed}"
    line += f"; times {found['devices']} is a projection, communication left out)" if found["is_projection"] else ")"
    return line if found["cost"] is None else f"{line}, cost {found['cost']:,.2f} at {found['price_per_gpu_hour']:g}"


def _epochs_lines(found: Mapping[str, Any] | None, tokens: int) -> list[str]:
    if found is None:
        return []
    most = sorted(found["by_source"].items(), key=lambda item: -item[1])[:3]
    passes = ", ".join(f"{name} {count:.2f}" for name, count in most)
    unique, free = found["unique_tokens"], _count(found["tokens_in_nearly_free_epochs"])
    worth = f"worth {_count(found['worth_tokens'])} fresh ones"
    return [
        f"data hold {_count(unique)} tokens, {tokens / unique:.2f} epochs ({passes}): {worth}; "
        f"{scaling.NEARLY_FREE_EPOCHS} epochs, nearly as good as new, would be {free}"
    ]


def _count(value: float) -> str:
    for unit, name in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if value >= unit:
            return f"{value / unit:.2f}{name}"
    return f"{value:,.0f}"
