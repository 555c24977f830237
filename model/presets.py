"""Model sizes by name. A name with a size in it is a claim, and a test holds it to the exact count.

chimera keeps to what llama.cpp runs as ``granitehybrid``; hybrid gates its attention; helix is mostly gated linear
attention with a sliding window. The ``nano`` sizes have the same shapes for laptops; ``hybrid_3b`` and ``hybrid_7b``
are for planning.
"""

from __future__ import annotations

import difflib
from typing import Any

from model.spec import ModelSpec

MAMBA2: dict[str, Any] = {
    "mixer": "mamba2",
    "d_state": 128,
    "head_dim": 64,
    "expand": 2,
    "d_conv": 4,
    "n_groups": 1,
}


def _attention(n_heads: int, n_kv_heads: int, head_dim: int = 128, **extra: Any) -> dict[str, Any]:
    return {"mixer": "attention", "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, **extra}


def _gla(n_heads: int, head_dim: int = 128) -> dict[str, Any]:
    return {"mixer": "gla", "n_heads": n_heads, "head_k_dim": head_dim, "head_v_dim": head_dim}


def _chimera(layers: str, attention: dict[str, Any], **dims: Any) -> ModelSpec:
    mixers = {"mamba2": MAMBA2, "attention": attention}
    return ModelSpec.model_validate({"layers": layers, "mixers": mixers, "tie_embeddings": True, **dims})


def _hybrid(layers: str, n_heads: int, n_kv_heads: int, head_dim: int = 128, **dims: Any) -> ModelSpec:
    mixers = {"mamba2": MAMBA2, "gated": _attention(n_heads, n_kv_heads, head_dim, output_gate=True)}
    return ModelSpec.model_validate({"layers": layers, "mixers": mixers, "tie_embeddings": False, **dims})


def _helix(layers: str, gla: dict[str, Any], local: dict[str, Any], **dims: Any) -> ModelSpec:
    mixers = {"mamba2": MAMBA2, "gla": gla, "local": local}
    return ModelSpec.model_validate({"layers": layers, "mixers": mixers, "tie_embeddings": True, **dims})


PRESETS: dict[str, ModelSpec] = {
    "chimera_700m": _chimera(
        "(4*mamba2 1*attention)*4", _attention(12, 4), d_model=1536, d_ff=4096, vocab_size=40960, max_seq_len=4096
    ),
    "hybrid_1b3": _hybrid("(3*mamba2 1*gated)*6", 16, 4, d_model=2048, d_ff=4096, vocab_size=50304, max_seq_len=4096),
    "helix_900m": _helix(
        "((1*mamba2 3*gla 1*local)*2 1*mamba2 2*gla 1*local)*2",
        _gla(10),
        _attention(10, 10, qk_norm=True, window=1024, global_tokens=32),
        d_model=1280,
        d_ff=3584,
        vocab_size=200_000,
        max_seq_len=4096,
    ),
    "hybrid_3b": _hybrid("(3*mamba2 1*gated)*8", 20, 4, d_model=2560, d_ff=6656, vocab_size=50304, max_seq_len=4096),
    "hybrid_7b": _hybrid("(3*mamba2 1*gated)*8", 32, 8, d_model=4096, d_ff=9216, vocab_size=50304, max_seq_len=4096),
    "nano_chimera": _chimera(
        "4*mamba2 1*attention", _attention(4, 2, 64), d_model=256, d_ff=512, vocab_size=4096, max_seq_len=512
    ),
    "nano_hybrid": _hybrid("3*mamba2 1*gated", 4, 2, 64, d_model=256, d_ff=512, vocab_size=4096, max_seq_len=512),
    "nano_helix": _helix(
        "1*mamba2 3*gla 1*local",
        _gla(4, 64),
        _attention(4, 4, 64, qk_norm=True, window=64, global_tokens=4),
        d_model=256,
        d_ff=512,
        vocab_size=4096,
        max_seq_len=512,
    ),
}


def preset(name: str) -> ModelSpec:
    """The model that ``name`` stands for.

    Raises:
        ValueError: if there is none, naming the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
    raise ValueError(f"preset must be one of {sorted(PRESETS)}; got {name!r}; set {near[0]!r}, the nearest")
