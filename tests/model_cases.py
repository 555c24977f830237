"""Tiny models for the model tests: one for every mixer of ``MIXERS``, built from field names alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from model.boundaries import Layout, resolve_layout
from model.config import HybridConfig
from model.lm import HybridForCausalLM
from model.mixers import MIXERS, Mixer
from model.spec import MixerSpec, ModelSpec

D_MODEL, VOCAB = 32, 61
SMALL = {
    "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_state": 6, "head_k_dim": 8, "head_v_dim": 12, "chunk_size": 16,
}  # fmt: skip
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "mamba2": {"groups": {"n_groups": 4}},
    "gla": {"low_rank_fast_gates": {"gate_rank": 4, "gate_normalizer": 1.0}},
    "attention": {
        "gated_qk_norm": {"output_gate": True, "qk_norm": True},
        "window_globals": {"window": 5, "global_tokens": 2},
    },
}


@dataclass(frozen=True)
class Case:
    """One configured mixer and the name that a test shows for it."""

    name: str
    spec: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def _small_spec(name: str) -> dict[str, Any]:
    union = get_args(get_args(MixerSpec)[0])
    kind = next(kind for kind in union if name in get_args(kind.model_fields["mixer"].annotation))
    return {"mixer": name} | {field: SMALL[field] for field in kind.model_fields if field in SMALL}


CASES = [Case(name, _small_spec(name)) for name in MIXERS] + [
    Case(f"{name}-{variant}", _small_spec(name) | extra)
    for name in MIXERS
    for variant, extra in VARIANTS.get(name, {}).items()
]
HYBRID: dict[str, dict[str, Any]] = {case.name.replace("-", "_"): case.spec for case in CASES}


def tiny_spec(case: Case | None = None, **changes: Any) -> ModelSpec:
    """Two layers of ``case``, or one layer of every case."""
    mixers = HYBRID if case is None else {"it": case.spec}
    layers = list(mixers) if case is None else "2*it"
    fields = {"d_model": D_MODEL, "d_ff": 48, "vocab_size": VOCAB, "max_seq_len": 128}
    return ModelSpec(**(fields | {"layers": layers, "mixers": mixers} | changes))


def tiny_config(case: Case | None = None, **changes: Any) -> HybridConfig:
    """``tiny_spec`` with end token 0 and padding 1."""
    return HybridConfig.from_spec(tiny_spec(case, **changes), eos_token_id=0, pad_token_id=1)


def tiny_model(case: Case | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model whose weights are large enough that gates, scores and steps really differ from token to token."""
    torch.manual_seed(seed)
    model: Any = HybridForCausalLM(tiny_config(case, **changes))
    model = model.to(dtype).eval()
    enlarge(model)
    return model


def enlarge(module: torch.nn.Module) -> None:
    """Redraw every matrix so that a unit input gives outputs of about unit size."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5)


def tiny_mixer(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
    """One mixer on its own."""
    spec = tiny_spec(case)
    torch.manual_seed(seed)
    block = tiny_model(case, dtype, seed).model.layers[0]
    assert spec.layer_mixers[0] == block.mixer.spec
    return block.mixer


def layout_of(batch: int, time: int, **described: Any) -> Layout:
    """``resolve_layout`` on the CPU."""
    return resolve_layout(batch, time, torch.device("cpu"), **described)


def packed_ids(lengths: list[int], batch: int = 1) -> Tensor:
    """``[2, 3]`` gives ``[[0, 0, 1, 1, 1]]``."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return row.expand(batch, -1)


def tokens(batch: int, time: int, seed: int = 1) -> Tensor:
    """Random ids that are neither end token nor padding."""
    return torch.randint(2, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Rounding of a sum of ``terms`` products of unit size: four standard deviations, through layers of gain 10."""
    return 4 * 10 * terms**0.5 * torch.finfo(dtype).eps


def relative_gap(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    scale = wanted.detach().abs().max().clamp(min=1e-30)
    return float((got.detach() - wanted.detach()).abs().max() / scale)


def recompute(model: Any, settings: dict[str, Any] | None = None) -> None:
    """Switch activation checkpointing on, under the name that this version of transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(settings)
