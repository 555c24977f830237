"""Gated linear attention on CUDA as a torch operator over our own Triton kernels.

B batch, T time, H heads, K head_k_dim, V head_v_dim, D documents, Q tokens a chunk.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor

GLA_CORE_OPERATORS = re.sub(r"\W", "_", __name__)
"""Namespace of the operators; this file's own, since a copy of it may live in the same process."""
GLA_CORE_CHUNK_TOKENS = 64


def gla_by_triton(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor | None, scale: float) -> Tensor:
    """S_t = diag(exp(log_decay_t)) S_(t-1) + k_t v_t^T, o_t = scale S_t^T q_t, from a zero state at each document.

    ``q`` and ``k`` (B, T, H, K), ``v`` (B, T, H, V) in half precision, ``log_decay`` (B, T, H, K) in fp32, ``edges``
    (D + 1,) int32 of documents in the rows laid end to end, or none where each row is one. States are summed in fp32.
    """
    return gla_core(q, k, v, log_decay, edges, scale)[0]


@torch.library.custom_op(f"{GLA_CORE_OPERATORS}::gla_core", mutates_args=())
def gla_core(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``gla_by_triton``'s o (B, T, H, V), with what its gradients need: sums of log decays and scores within chunks."""
    parts = (part.contiguous() for part in (q, k, v, log_decay))
    o, sums, scores = _gla_kernels().gla_forward(*parts, edges, scale)
    return o, sums, scores


@gla_core.register_fake
def _gla_core_shapes(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = q.new_empty(*q.shape[:3], GLA_CORE_CHUNK_TOKENS)
    return v.new_empty(v.shape), log_decay.new_empty(log_decay.shape), scores


@torch.library.custom_op(f"{GLA_CORE_OPERATORS}::gla_core_gradients", mutates_args=())
def gla_core_gradients(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, scores: Tensor, edges: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``gla_core``'s o by q, k, v and log_decay; states are computed again instead of being kept."""
    d_o, q, k, v = (part.contiguous() for part in (d_o, q, k, v))
    d_q, d_k, d_v, d_decay = _gla_kernels().gla_backward(d_o, q, k, v, sums, scores, edges, scale)
    return d_q, d_k, d_v, d_decay


@gla_core_gradients.register_fake
def _gla_core_gradient_shapes(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, scores: Tensor, edges: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v, d_decay = (part.new_empty(part.shape) for part in (q, k, v, sums))
    return d_q, d_k, d_v, d_decay


def _keep_gla_core(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, edges, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(q, k, v, output[1], output[2], edges)


def _gla_core_backward(ctx: Any, d_o: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, sums, scores, edges = ctx.saved_tensors
    return *gla_core_gradients(d_o, q, k, v, sums, scores, edges, ctx.scale), None, None


gla_core.register_autograd(_gla_core_backward, setup_context=_keep_gla_core)


def _gla_kernels() -> Any:
    """The file beside this one that needs Triton, so that this one imports anywhere."""
    return importlib.import_module(".gla_triton", __package__)
