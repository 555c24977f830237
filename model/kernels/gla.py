"""Gated linear attention on CUDA: flash-linear-attention's Triton kernels as torch operators.

B batch, T time, H heads, K head_k_dim, V head_v_dim, n documents, Q tokens a chunk.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor

GLA_OPERATORS = re.sub(r"\W", "_", __name__)
"""Namespace of the operators; this file's own, since a copy of it may live in the same process."""
GLA_CHUNK_TOKENS = 64


def gla_by_fla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor | None, scale: float) -> Tensor:
    """S_t = diag(exp(log_decay_t)) S_(t-1) + k_t v_t^T, o_t = scale S_t^T q_t, from a zero state at each document.

    ``q`` and ``k`` (B, T, H, K), ``v`` (B, T, H, V) in half precision, ``log_decay`` (B, T, H, K) in fp32, ``edges``
    (n + 1,) of documents in the rows laid end to end, or none where each row is one. States are carried in fp32.
    """
    if edges is None:
        return gla_scan(q, k, v, log_decay, None, scale)[0]
    flat = [part.flatten(0, 1)[None] for part in (q, k, v, log_decay)]
    return gla_scan(*flat, edges, scale)[0].view(v.shape)


@torch.library.custom_op(f"{GLA_OPERATORS}::gla_scan", mutates_args=(), device_types="cuda")
def gla_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``gla_by_fla``'s o (B, T, H, V), with what its gradients need: sums of log decays and scores within chunks."""
    gla = importlib.import_module("fla.ops.gla.chunk")
    parts = [part.contiguous() for part in (q, k, v, log_decay)]
    with torch.cuda.device(q.device):
        sums, scores, _, _, o = gla.chunk_gla_fwd(
            *parts,
            g_cumsum=None,
            scale=scale,
            initial_state=None,
            output_final_state=False,
            cu_seqlens=edges,
            chunk_size=GLA_CHUNK_TOKENS,
            chunk_indices=_chunk_indices(edges),
        )
    return o, sums, scores


@gla_scan.register_fake
def _gla_scan_shapes(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = q.new_empty(*q.shape[:3], GLA_CHUNK_TOKENS, dtype=torch.float32)
    return v.new_empty(v.shape), log_decay.new_empty(log_decay.shape), scores


@torch.library.custom_op(f"{GLA_OPERATORS}::gla_scan_gradients", mutates_args=(), device_types="cuda")
def gla_scan_gradients(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, scores: Tensor, edges: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``gla_scan``'s o by q, k, v and log_decay; states are computed again instead of being kept."""
    gla = importlib.import_module("fla.ops.gla.chunk")
    q, k, v, d_o = (part.contiguous() for part in (q, k, v, d_o))
    with torch.cuda.device(q.device):
        d_q, d_k, d_v, d_decay, _ = gla.chunk_gla_bwd(
            q=q,
            k=k,
            v=v,
            g=None,
            g_cumsum=sums,
            scale=scale,
            initial_state=None,
            h=None,
            A=scores,
            do=d_o,
            dht=None,
            cu_seqlens=edges,
            chunk_size=GLA_CHUNK_TOKENS,
            chunk_indices=_chunk_indices(edges),
        )
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_decay.to(sums.dtype)


@gla_scan_gradients.register_fake
def _gla_scan_gradient_shapes(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, scores: Tensor, edges: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v, d_decay = (part.new_empty(part.shape) for part in (q, k, v, sums))
    return d_q, d_k, d_v, d_decay


def _keep_gla(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, edges, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1], output[2], edges)


def _gla_backward(ctx: Any, d_o: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, sums, scores, edges = ctx.saved_tensors
    return *gla_scan_gradients(d_o, q, k, v, sums, scores, edges, ctx.scale), None, None


gla_scan.register_autograd(_gla_backward, setup_context=_keep_gla)


def _chunk_indices(edges: Tensor | None) -> Tensor | None:
    """Which chunk of which document each program takes; the library keeps the last few by the identity of ``edges``."""
    if edges is None:
        return None
    chunks: Tensor = importlib.import_module("fla.ops.utils.index").prepare_chunk_indices(edges, GLA_CHUNK_TOKENS)
    return chunks
