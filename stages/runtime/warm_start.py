"""Starting from a parent's weights: what must fit, and which learning rate is allowed (TRAPS T1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.spec import ModelSpec
from stages.base import ConfigError, Fault
from stages.runtime.artifact import read_record

FREE_FIELDS = ("max_seq_len", "initializer_range")
"""Fields of the model that may differ from the parent's: they change no weight's meaning."""
FREE_MIXER_FIELDS = ("chunk_size", "backend")


def parent_metrics(parent: Path) -> dict[str, Any]:
    """Metrics in the parent's ``stage.json``; empty where there is none."""
    record = read_record(parent)
    return dict(record.get("metrics") or {}) if record else {}


def check_learning_rate(lr: float, parent_lr: float | None, *, rewarm: bool) -> str:
    """The line that shows both rates, or a refusal.

    Raises:
        ConfigError: when the peak is above the parent's final rate, or that is unknown, and ``rewarm`` is not set.
    """
    shown = "unknown" if parent_lr is None else f"{parent_lr:.3g}"
    line = f"warm start: parent's final lr {shown}, own peak lr {lr:.3g}"
    # The tolerance is for a rate that went through text, not for a warm-up.
    if rewarm or (parent_lr is not None and lr <= parent_lr * (1 + 1e-6)):
        return f"{line}, rewarm" if rewarm else line
    raise ConfigError(
        Fault(
            "lr",
            f"must be at most the parent's final lr {shown} on a warm start; got {lr:g}; set less, or rewarm: true",
        )
    )


def check_model(spec: ModelSpec, parent_spec: ModelSpec) -> None:
    """Refuse a model section that gives the parent's weights another meaning.

    Raises:
        ConfigError: one fault a field that differs.
    """
    own, theirs = _meaning(spec), _meaning(parent_spec)
    faults = [
        Fault("from", f"model.{name} must be the parent's {theirs.get(name)}; got {own.get(name)}; set the parent's")
        for name in sorted(own.keys() | theirs.keys())
        if own.get(name) != theirs.get(name)
    ]
    if faults:
        raise ConfigError(faults)


def check_tokenizer(parent_output: Path, data_digest: str) -> None:
    """Refuse a parent that was trained with another tokenizer than the data's.

    Raises:
        ConfigError: when the digests differ or the parent carries none.
    """
    path = parent_output / "info.json"
    digest = json.loads(path.read_bytes()).get("digest") if path.is_file() else None
    if digest != data_digest:
        message = f"must carry the data's tokenizer {data_digest[:12]}; got {str(digest)[:12]}; tokenize with it"
        raise ConfigError(Fault("from", message))


def _meaning(spec: ModelSpec) -> dict[str, Any]:
    plain = spec.model_dump(exclude=set(FREE_FIELDS) | {"layers", "mixers"})
    for number, mixer in enumerate(spec.layer_mixers):
        for name, value in mixer.model_dump(exclude=set(FREE_MIXER_FIELDS)).items():
            plain[f"layers[{number}].{name}"] = value
    return plain
