"""Starting from a parent's weights: what must fit, and which learning rate is allowed (TRAPS T1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.shards import read_info
from model.spec import ModelSpec
from stages.base import Fault, StageContext, without_operational
from stages.runtime.artifact import finished_of, read_record
from stages.runtime.schedule import lr_at
from stages.runtime.training_config import TrainingConfig

FREE_FIELDS = ("max_seq_len", "initializer_range")
"""Fields of the model that may differ from the parent's: they change no weight's meaning."""
BASELINE_TOLERANCE = 2e-3
"""Share by which a parent's score may differ when it is measured again: rounding in bf16 on other kernels."""


def parent_metrics(parent: Path) -> dict[str, Any]:
    """Metrics in the parent's ``stage.json``; empty where there is none."""
    record = finished_of(read_record(parent), parent)
    return dict(record.get("metrics") or {}) if record else {}


def parent_faults(config: Any, spec: ModelSpec, parents: Mapping[str, Path]) -> list[Fault]:
    """What of the finished parents (``data``, ``from_`` or both) does not fit ``config`` and ``spec``; no torch."""
    info = read_info(parents["data"] / "output") if "data" in parents else None
    faults = []
    if info is not None:
        try:
            info.check_model(spec.vocab_size)
        except ValueError as error:
            faults.append(Fault("data", str(error)))
    if "from_" in parents:
        output = parents["from_"] / "output"
        faults += learning_rate_faults(config, parent_metrics(parents["from_"]).get("final_lr"))
        faults += model_faults(spec, spec_of(output))
        faults += [] if info is None else tokenizer_faults(output, info.tokenizer_digest)
    return faults


def start_line(config: Any, parent: Path | None) -> str:
    """Where a run starts; on a warm start the parent's final learning rate beside the own peak."""
    if parent is None:
        return "from scratch"
    line = f"warm start: parent's final lr {_rate(parent_metrics(parent).get('final_lr'))}, own peak lr {config.lr:.3g}"
    return f"{line}, rewarm" if config.rewarm else line


def baseline_note(config: Any, parent: Path, values: Mapping[str, Any], score: str) -> str:
    """What is odd about the measurement before the first step; empty where nothing is, or nothing can be compared.

    The weights are the parent's, so where it was measured on the same set in the same way, ``score`` must be what its
    ``stage.json`` has: the number is checked before anything is held against it.
    """
    record = finished_of(read_record(parent), parent) or {}
    metrics, theirs = record.get("metrics") or {}, record.get("config") or {}
    way = {name: getattr(config, name, None) for name in ("kind", "seq_len", "max_length", "precision")}
    same_way = all(theirs.get(name) == value for name, value in way.items())
    if not same_way or metrics.get("heldout_hash") != values["heldout_hash"] or score not in metrics:
        return ""
    own, expected = values[score], metrics[score]
    if abs(own - expected) <= BASELINE_TOLERANCE * abs(expected):
        return ""
    return (
        f"step 0 has {score} {own:.4f} where the parent ended at {expected:.4f} on the same held-out set: the weights "
        "that were loaded, or the code that computes, are not the parent's; find out before trusting this run"
    )


def check_baseline(context: StageContext, values: Mapping[str, Any], score: str) -> None:
    """Alert the operator where ``baseline_note`` finds something odd."""
    note = baseline_note(context.config, context.parents["from_"], values, score)
    if note:
        context.tracker.alert(note)


def learning_rate_faults(config: Any, parent_lr: float | None) -> list[Fault]:
    """A peak above the parent's final rate, or a rate that is unknown, unless ``rewarm`` is set (TRAPS T1)."""
    # The tolerance is for a rate that went through text, not for a warm-up.
    if config.rewarm or (parent_lr is not None and config.lr <= parent_lr * (1 + 1e-6)):
        return []
    shown = _rate(parent_lr)
    message = f"must be at most the parent's final lr {shown} on a warm start; got {config.lr:g}"
    return [Fault("lr", f"{message}; set less, or rewarm: true")]


def planned_rate_faults(config: Any, parent: Any) -> list[Fault]:
    """The same against a ``parent`` that is yet to be trained, whose last rate its config says."""
    if not isinstance(parent, TrainingConfig):
        return []
    last = lr_at(
        parent.max_steps - 1, parent.schedule, lr=parent.lr, max_steps=parent.max_steps,
        min_lr_ratio=parent.min_lr_ratio,
    )  # fmt: skip
    return learning_rate_faults(config, last)


def model_faults(spec: ModelSpec, parent_spec: ModelSpec) -> list[Fault]:
    """One fault for each field that gives the parent's weights another meaning."""
    own, theirs = _meaning(spec), _meaning(parent_spec)
    return [
        Fault("from", f"model.{name} must be the parent's {theirs.get(name)}; got {own.get(name)}; set the parent's")
        for name in sorted(own.keys() | theirs.keys())
        if own.get(name) != theirs.get(name)
    ]


def tokenizer_faults(parent_output: Path, data_digest: str) -> list[Fault]:
    """A parent that was trained with another tokenizer or chat template than the data's, or that carries none."""
    path = parent_output / "info.json"
    digest = json.loads(path.read_bytes()).get("digest") if path.is_file() else None
    if digest == data_digest:
        return []
    return [
        Fault("from", f"must carry the data's tokenizer {data_digest[:12]}; got {str(digest)[:12]}; tokenize with it")
    ]


def spec_of(output: Path) -> ModelSpec:
    """The model section that a finished model's ``config.json`` stands for."""
    plain = json.loads((output / "config.json").read_bytes())
    return ModelSpec.model_validate({name: plain[name] for name in ModelSpec.model_fields if name in plain})


def _rate(lr: float | None) -> str:
    return "unknown" if lr is None else f"{lr:.3g}"


def _meaning(spec: ModelSpec) -> dict[str, Any]:
    plain = spec.model_dump(exclude=set(FREE_FIELDS) | {"layers", "mixers"})
    for number, mixer in enumerate(spec.layer_mixers):
        # What says how to compute and never what is marked so in the spec.
        for name, value in without_operational(mixer).items():
            plain[f"layers[{number}].{name}"] = value
    return plain
