"""What is quantised and what is adapted, as a recipe says it, and what of that does not fit a model. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from model.projections import matching, nearest, projections
from model.spec import ModelSpec
from stages.base import ConfigError, Fault, Section
from stages.runtime import ds_config

HEAD = ("lm_head", "embed_tokens")
ISLANDS = ("A_log", "D", "dt_bias", "gate_bias")


class AdapterConfig(Section):
    """A low-rank adapter: W x becomes (W + (alpha / rank) B A) x, with B and A trained and W frozen."""

    method: Literal["lora", "dora"] = "lora"
    """LoRA (Hu et al. 2021, arXiv:2106.09685); DoRA trains the length of each output's weights besides (2402.09353)."""
    rank: int = Field(8, ge=1, le=2**16)
    """Rows of A and columns of B; at most the narrower side of every target."""
    alpha: int = Field(16, ge=1, le=1_000_000)
    """Scale of the adapter, times rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are dropped in training."""
    targets: list[str] | None = Field(None, min_length=1)
    """Projections that get an adapter, by name or any dotted part of one (``in_proj``, ``mlp``, ``layers.3``); none
    means every projection of the blocks."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Further modules that are trained whole and in fp32, named likewise: norms, ``conv1d``, an untied embedding or
    head."""


class QuantisationConfig(Section):
    """How the frozen projections are stored: NF4, four bits a weight (Dettmers et al. 2023, arXiv:2305.14314)."""

    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share a scale: fewer are more faithful and take more bytes."""
    double_quant: bool = True
    """Whether the scales are themselves stored in eight bits."""


def target_names(spec: ModelSpec, adapter: AdapterConfig) -> list[str]:
    """Full names of the projections that get an adapter, in the model's order; faults must have been asked before."""
    names = projections(spec)
    if adapter.targets is None:
        return list(names)
    chosen = {name for part in adapter.targets for name in matching(names, part)}
    return [name for name in names if name in chosen]


def saved_names(spec: ModelSpec, adapter: AdapterConfig) -> list[str]:
    """Full names of the modules that are trained whole, in the model's order; faults must have been asked before."""
    names = saveable(spec)
    chosen = {name for part in adapter.modules_to_save for name in matching(names, part)}
    return [name for name in names if name in chosen]


def saveable(spec: ModelSpec) -> list[str]:
    """Full names of the modules that hold weights and are no projection, a tied embedding and head left out."""
    found = [] if spec.tie_embeddings else ["model.embed_tokens"]
    for index, mixer in enumerate(spec.layer_mixers):
        own = {"mamba2": ["conv1d", "norm"], "gla": ["norm"]}.get(mixer.mixer, [])
        own = own + (["q_norm", "k_norm"] if getattr(mixer, "qk_norm", False) else [])
        block = f"model.layers.{index}"
        found += [f"{block}.mixer_norm", *(f"{block}.mixer.{name}" for name in own), f"{block}.mlp_norm"]
    return [*found, "model.norm"] + ([] if spec.tie_embeddings else ["lm_head"])


def adapter_parameters(spec: ModelSpec, adapter: AdapterConfig) -> int:
    """Parameters of A and B, and DoRA's lengths; modules trained whole are not counted."""
    sizes = projections(spec)
    magnitudes = adapter.method == "dora"
    return sum(
        adapter.rank * (d_in + d_out) + magnitudes * d_out
        for d_in, d_out in (sizes[name] for name in target_names(spec, adapter))
    )


def adapter_faults(spec: ModelSpec, adapter: AdapterConfig) -> list[Fault]:
    """Unknown targets with the nearest names, islands, head and convolution, ranks that are none, saved modules."""
    faults = [fault for part in adapter.targets or [] for fault in _target_faults(spec, part)]
    faults += [fault for name in adapter.modules_to_save for fault in _saved_faults(spec, name)]
    sizes = projections(spec)
    narrow = {name: min(sizes[name]) for name in target_names(spec, adapter)}
    name = min(narrow, key=lambda key: narrow[key], default="")
    if narrow and adapter.rank > narrow[name]:
        message = f"must be at most {narrow[name]}, the narrower side of {name}; got {adapter.rank}"
        faults.append(Fault("adapter.rank", f"{message}; set {narrow[name]} or less, or other targets"))
    return faults


def engine_faults(deepspeed: str) -> list[Fault]:
    """ZeRO-3, which partitions weights and cannot cut a four-bit one with its scales apart."""
    try:
        stage = ds_config.zero_stage(ds_config.engine_facts(deepspeed))
    except ConfigError:
        return []  # Said by the faults of every training stage.
    if stage < 3:
        return []
    message = f"must be zero0, zero1 or zero2: four-bit weights cannot be partitioned by ZeRO-3; got {deepspeed}"
    return [Fault("deepspeed", f"{message}; set zero2 (the frozen base takes half a byte a weight on each device)")]


def optimizer_faults(optimizer: Any) -> list[Fault]:
    """Optimizers for whole matrices, of which an adapter trains none: its state is small, its factors are narrow."""
    if optimizer.kind == "adamw":
        return []
    return [Fault("optimizer", f"must be adamw where adapters are trained; got {optimizer.kind}; remove it")]


def _target_faults(spec: ModelSpec, part: str) -> list[Fault]:
    names = projections(spec)
    if matching(names, part):
        return []
    last = part.rpartition(".")[2]
    if last in HEAD:
        way = "put it into adapter.modules_to_save" if not spec.tie_embeddings else "leave it out: it is tied"
        reason = f"must be a projection of the blocks; got {part}, whose weight the loss reads by itself; {way}"
    elif last == "conv1d":
        reason = f"must be a linear projection; got {part}, a grouped convolution; put it into adapter.modules_to_save"
    elif last in ISLANDS:
        reason = f"must be a linear projection; got {part}, a parameter of the recurrence, which stays frozen in fp32"
        reason += "; leave it out"
    else:
        near = ", ".join(nearest(names, part))
        reason = f"must be a projection of this model; got {part}; did you mean {near}? One of {_words(names)}"
    return [Fault("adapter.targets", reason)]


def _saved_faults(spec: ModelSpec, part: str) -> list[Fault]:
    present = saveable(spec)
    if matching(present, part):
        return []
    if part.rpartition(".")[2] in HEAD:
        way = "untie them (model.tie_embeddings: false, from pretraining on), or leave it out"
        reason = f"cannot hold {part}: embedding and head are tied, and a merged model would untie them; {way}"
    elif matching(projections(spec), part):
        reason = f"cannot hold {part}, which is quantised; put it into adapter.targets"
    else:
        near = ", ".join(nearest(present, part))
        reason = f"must name modules of this model that are no projections; got {part}; did you mean {near}? "
        reason += f"One of {_words(present)}"
    return [Fault("adapter.modules_to_save", reason)]


def _words(names: Iterable[str]) -> str:
    words: dict[str, Any] = {}
    for name in names:
        words[next(word for word in reversed(name.split(".")) if not word.isdigit())] = None
    return ", ".join(words)
