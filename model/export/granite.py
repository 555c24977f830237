"""A chimera-shaped model as transformers' GraniteMoeHybrid without experts, which llama.cpp runs as ``granitehybrid``.

Both are the same arithmetic under other names: Mamba-2 with one set of sizes, rotary attention without gate, norm or
window, SwiGLU whose gate and up projections lie in one matrix.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from model.spec import AttentionSpec, Mamba2Spec, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GraniteMoeHybridConfig


def granite_faults(spec: ModelSpec) -> list[str]:
    """Everything about ``spec`` that GraniteMoeHybrid has no form for; empty where it has one."""
    faults = []
    for word, mixer in spec.mixers.items():
        if isinstance(mixer, AttentionSpec):
            faults += [f"mixers.{word}.{fault}" for fault in _attention_faults(mixer, spec.d_model)]
        elif isinstance(mixer, Mamba2Spec):
            faults += [f"mixers.{word}.{fault}" for fault in _mamba_faults(mixer)]
        else:
            faults.append(f"mixers.{word}.mixer must be mamba2 or attention; got {mixer.mixer!r}; set mamba2")
    for kind in (Mamba2Spec, AttentionSpec):
        faults += _one_set_faults(spec, kind)
    return faults


def granite_config(spec: ModelSpec, **token_ids: int | None) -> GraniteMoeHybridConfig:
    """The GraniteMoeHybridConfig of the same model; ``token_ids`` are ``bos_``, ``eos_`` and ``pad_token_id``.

    Raises:
        ValueError: naming every field of ``spec`` that the architecture cannot express.
    """
    from transformers import GraniteMoeHybridConfig

    faults = granite_faults(spec)
    if faults:
        raise ValueError("; ".join(faults))
    kinds = {"mamba2": "linear_attention", "attention": "full_attention"}
    fields: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "shared_intermediate_size": spec.d_ff,
        "num_hidden_layers": spec.n_layers,
        "layer_types": [kinds[mixer.mixer] for mixer in spec.layer_mixers],
        "max_position_embeddings": spec.max_seq_len,
        "initializer_range": spec.initializer_range,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    }
    # The library's own defaults for the ids are 1 and 2, which mean nothing here.
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | token_ids
    return GraniteMoeHybridConfig(**fields, **_attention_fields(spec), **_mamba_fields(spec), **dict[str, Any](ids))


def granite_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a ``HybridForCausalLM`` under GraniteMoeHybrid's names; tensors are shared, not copied, except the
    joined gate and up projections (2 d_ff, d_model).

    Raises:
        ValueError: as ``granite_config``.
    """
    import torch

    spec: ModelSpec = model.config.spec  # type: ignore[union-attr, assignment]
    faults = granite_faults(spec)
    if faults:
        raise ValueError("; ".join(faults))
    ours = model.state_dict()
    theirs = {}
    for name, tensor in ours.items():
        if name.endswith("mlp.gate_proj.weight"):
            up = ours[name.replace("gate_proj", "up_proj")]
            theirs[_granite_name(name, spec)] = torch.cat([tensor, up])
        elif not name.endswith("mlp.up_proj.weight"):
            theirs[_granite_name(name, spec)] = tensor
    return theirs


def _granite_name(name: str, spec: ModelSpec) -> str:
    """``model.layers.3.mixer.q_proj.weight`` gives ``model.layers.3.self_attn.q_proj.weight``."""
    if not name.startswith("model.layers."):
        return name
    _, _, index, part, *rest = name.split(".")
    room = "self_attn" if isinstance(spec.layer_mixers[int(index)], AttentionSpec) else "mamba"
    norms = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    parts = {"mixer": room, "mlp": "shared_mlp"} | norms
    if part == "mlp":
        rest[0] = {"gate_proj": "input_linear", "down_proj": "output_linear"}[rest[0]]
    return ".".join(["model.layers", index, parts[part], *rest])


def _attention_fields(spec: ModelSpec) -> dict[str, Any]:
    mixer = next((m for m in spec.mixers.values() if isinstance(m, AttentionSpec)), None)
    if mixer is None:
        return {"num_attention_heads": 1, "position_embedding_type": "rope"}
    return {
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads,
        "attention_multiplier": 1 / math.sqrt(mixer.head_dim),
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rope_theta},
    }


def _mamba_fields(spec: ModelSpec) -> dict[str, Any]:
    mixer = next((m for m in spec.mixers.values() if isinstance(m, Mamba2Spec)), None)
    if mixer is None:
        return {"mamba_n_heads": 1, "mamba_expand": 1}
    return {
        "mamba_n_heads": mixer.expand * spec.d_model // mixer.head_dim,
        "mamba_d_head": mixer.head_dim,
        "mamba_n_groups": mixer.n_groups,
        "mamba_d_state": mixer.d_state,
        "mamba_d_conv": mixer.d_conv,
        "mamba_expand": mixer.expand,
        "mamba_chunk_size": mixer.chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def _attention_faults(mixer: AttentionSpec, d_model: int) -> list[str]:
    faults = []
    for name in ("output_gate", "qk_norm"):
        if getattr(mixer, name):
            faults.append(f"{name} must be false; got true; set false")
    if mixer.window is not None:
        faults.append(f"window must be absent; got {mixer.window}; set null, and global_tokens 0")
    if mixer.n_heads * mixer.head_dim != d_model:
        # The library derives the head's width from these two and gives it no field of its own.
        faults.append(
            f"head_dim must be d_model / n_heads = {d_model / mixer.n_heads:g}; got {mixer.head_dim}; "
            "set n_heads and head_dim so that their product is d_model"
        )
    return faults


def _mamba_faults(mixer: Mamba2Spec) -> list[str]:
    # transformers 5.17 normalises all groups together, 5.23 and llama.cpp each by itself: the same file, two models.
    if mixer.n_groups == 1:
        return []
    return [f"n_groups must be 1, since readers disagree on the norm of several; got {mixer.n_groups}; set 1"]


def _one_set_faults(spec: ModelSpec, kind: type[Mamba2Spec] | type[AttentionSpec]) -> list[str]:
    """The architecture has one set of sizes a kind of mixer; chunk size and backend change no result."""
    words = [word for word, mixer in spec.mixers.items() if isinstance(mixer, kind)]
    sizes = [spec.mixers[word].model_dump(exclude={"chunk_size", "backend"}) for word in words]
    return [
        f"mixers.{word} must have the sizes of mixers.{words[0]}; got {name} {size[name]!r} and {sizes[0][name]!r}; "
        f"set {sizes[0][name]!r}"
        for word, size in zip(words[1:], sizes[1:], strict=True)
        for name in size
        if size[name] != sizes[0][name]
    ]
