"""Attention without a mask in memory: cuDNN's kernel for rows of one document, flash attention over document edges,
PyTorch's own or the flash-attn package's (Dao 2023, arXiv:2307.08691).

B batch, T time, H query heads, J key and value heads, P head_dim, n documents.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of ``q`` (B, H, T, P) over ``k`` and ``v`` (B, J, T, P) by cuDNN alone."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        shared = q.shape[1] != k.shape[1]
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, window: int | None) -> Tensor:
    """Causal attention within documents, and within ``window`` tokens where one is given.

    ``q`` (B, H, T, P), ``k`` and ``v`` (B, J, T, P), ``edges`` (n + 1,) int32 of the documents in the rows laid end to
    end. Returns (B, H, T, P).
    """
    batch, heads, time, _ = q.shape
    k, v = (part.repeat_interleave(heads // part.shape[1], 1) for part in (k, v))
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # (B T, H, P)
    o = varlen_attn(q, k, v, edges, edges, time, time, window_size=(_behind(window, time), 0))
    assert isinstance(o, Tensor)
    return o.unflatten(0, (batch, time)).transpose(1, 2)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, window: int | None) -> Tensor:
    """What ``attend_varlen`` gives, by the flash-attn package, which shares keys and values among heads itself."""
    try:  # A flattened model's loader asks for every package that is imported outside of such a block.
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(f"backend flash_attn needs a flash-attn that loads; {error}; set backend: auto") from error

    batch, _, time, _ = q.shape
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # (B T, H or J, P)
    seen = (_behind(window, time), 0)
    o: Tensor = flash_attn_varlen_func(q, k, v, edges, edges, time, time, causal=True, window_size=seen)
    return o.unflatten(0, (batch, time)).transpose(1, 2)


def _behind(window: int | None, time: int) -> int:
    """How many tokens before itself a query sees; -1 for all."""
    return -1 if window is None or window > time else window - 1
