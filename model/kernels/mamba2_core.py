"""All of Mamba-2 between its projections on CUDA, as one torch operator over our own Triton kernels.

B batch, T time, I d_inner = H heads of P, G groups, N d_state; the operator's input holds z (I), x (I), B (G N),
C (G N) and dt (H) side by side, as the input projection leaves them: E = 2 I + 2 G N + H.

    x, B, C = silu(conv(x, B, C));  step = softplus(dt + dt_bias)
    S_t = exp(step_t rate) S_(t-1) + step_t x_t B_t^T;  y_t = S_t C_t + skip x_t;  out = norm(y silu(z))

Kernels read their parts where they lie and write their parts of the one gradient (B, T, E), so nothing is sliced out or
joined. For backward it keeps its input and y; what the convolution and softplus give is computed again, which costs
less than holding it.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor

MAMBA2_OPERATORS = re.sub(r"\W", "_", __name__)
"""Namespace of the operators; this file's own, since a copy of it may live in the same process."""


@torch.library.custom_op(f"{MAMBA2_OPERATORS}::mamba2_core", mutates_args=())
def mamba2_core(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    rate: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    seq_idx: Tensor | None,
    valid: Tensor | None,
    head_dim: int,
    d_state: int,
    n_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The normed rows (B, T, I), and y (B, T, I) before the norm, which is kept for backward and carries no gradient.

    ``zxbcdt`` (B, T, E) in half precision with channels side by side; in fp32 ``conv_weight`` (I + 2 G N, K),
    ``conv_bias``, ``dt_bias``, ``rate`` and ``skip`` (H,), ``norm_weight`` (I,); ``seq_idx`` (B, T) int32 document
    numbers or none; ``valid`` (B, T) bool, false at padding, or none.
    """
    parts = _Parts(zxbcdt, norm_weight.shape[0], n_groups * d_state)
    xbc = _room("conv_triton").conv_silu_forward(parts.xbc, conv_weight, conv_bias, seq_idx, valid)
    step = _room("steps_triton").steps_forward(parts.dt, dt_bias, valid)
    scanned = _heads(xbc, norm_weight.shape[0], head_dim, n_groups, d_state)
    y = _room("ssd_triton").ssd_forward(scanned[0], step, rate, scanned[1], scanned[2], skip, seq_idx).flatten(2)
    return _room("gated_norm_triton").gated_norm_forward(y, parts.z, norm_weight, n_groups, eps), y


@mamba2_core.register_fake
def _core_shapes(zxbcdt: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    norm_weight = others[5]
    shape = (*zxbcdt.shape[:2], norm_weight.shape[0])
    return zxbcdt.new_empty(shape), zxbcdt.new_empty(shape)


@torch.library.custom_op(f"{MAMBA2_OPERATORS}::mamba2_core_gradients", mutates_args=())
def mamba2_core_gradients(
    d_out: Tensor,
    y: Tensor,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    rate: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    seq_idx: Tensor | None,
    valid: Tensor | None,
    head_dim: int,
    d_state: int,
    n_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the normed rows by ``mamba2_core``'s first seven arguments; all but the first in fp32."""
    d_inner, width = norm_weight.shape[0], n_groups * d_state
    d_zxbcdt = zxbcdt.new_empty(zxbcdt.shape)
    parts, into = _Parts(zxbcdt, d_inner, width), _Parts(d_zxbcdt, d_inner, width)
    conv, steps, norm = _room("conv_triton"), _room("steps_triton"), _room("gated_norm_triton")

    d_y, d_norm = norm.gated_norm_backward(d_out.contiguous(), y, parts.z, norm_weight, n_groups, eps, into.z)
    xbc = conv.conv_silu_forward(parts.xbc, conv_weight, conv_bias, seq_idx, valid)
    step = steps.steps_forward(parts.dt, dt_bias, valid)
    d_xbc = torch.empty_like(xbc)
    x, b, c = _heads(xbc, d_inner, head_dim, n_groups, d_state)
    d_step, d_rate, d_skip = _room("ssd_triton").ssd_backward(
        d_y.view(x.shape), x, step, rate, b, c, skip, seq_idx, *_heads(d_xbc, d_inner, head_dim, n_groups, d_state)
    )
    d_dt_bias = steps.steps_backward(d_step, parts.dt, dt_bias, valid, into.dt)
    d_conv, d_conv_bias = conv.conv_silu_backward(d_xbc, parts.xbc, conv_weight, conv_bias, seq_idx, valid, into.xbc)
    # An operator's results may share no memory, as the scan's sums do.
    return d_zxbcdt, d_conv, d_conv_bias, d_dt_bias, d_rate.clone(), d_skip.clone(), d_norm


@mamba2_core_gradients.register_fake
def _core_gradient_shapes(d_out: Tensor, y: Tensor, zxbcdt: Tensor, *others: Any) -> tuple[Tensor, ...]:
    wide = [tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in others[:6]]
    return zxbcdt.new_empty(zxbcdt.shape), *wide


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.head_dim, ctx.d_state, ctx.n_groups, ctx.eps = inputs
    # No gradient comes by y, and no zeros need stand for it.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, d_out: Tensor, d_y: Tensor | None) -> tuple[Tensor | None, ...]:
    sizes = (ctx.head_dim, ctx.d_state, ctx.n_groups, ctx.eps)
    found = mamba2_core_gradients(d_out, *ctx.saved_tensors, *sizes)
    return *found, None, None, None, None, None, None


mamba2_core.register_autograd(_backward, setup_context=_keep)


class _Parts:
    """The parts of (B, T, E) as they lie side by side: ``z`` (B, T, I), ``xbc`` (B, T, I + 2 G N), ``dt`` (B, T, H)."""

    def __init__(self, joined: Tensor, d_inner: int, width: int) -> None:
        heads = joined.shape[-1] - 2 * d_inner - 2 * width
        self.z, self.xbc, self.dt = joined.split([d_inner, d_inner + 2 * width, heads], -1)


def _heads(xbc: Tensor, d_inner: int, head_dim: int, n_groups: int, d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of x (B, T, H, P), B and C (B, T, G, N)."""
    x, b, c = xbc.split([d_inner, n_groups * d_state, n_groups * d_state], -1)
    b, c = (part.unflatten(-1, (n_groups, d_state)) for part in (b, c))
    return x.unflatten(-1, (-1, head_dim)), b, c


def _room(name: str) -> Any:
    """One of the files beside this one that need Triton, so that this one imports anywhere."""
    return importlib.import_module(f".{name}", __package__)
