"""Mamba-2's convolution and scan on CUDA: causal-conv1d's kernel and mamba-ssm's Triton kernels, as torch operators.

B batch, T time, C channels, K taps, H heads, P head_dim, G groups, N d_state.

As operators with shapes and gradients of their own they stand inside a compiled block without breaking it. The packages
are looked up when an operator first runs, so that this file imports anywhere.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor

SSD_OPERATORS = re.sub(r"\W", "_", __name__)
"""Namespace of the operators; this file's own, since a copy of it may live in the same process."""


@torch.library.custom_op(f"{SSD_OPERATORS}::conv_silu", mutates_args=(), device_types="cuda")
def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """silu(b + sum_j w_j x_(t - K + 1 + j)) within one document, as ``layers.CausalConv`` and SiLU give it.

    ``x`` (B, T, C) in half precision, ``weight`` (C, K) and ``bias`` (C,) in fp32, ``seq_idx`` (B, T) int32 or none.
    """
    x, out = _channels_last(x), x.new_empty(x.shape)
    conv = importlib.import_module("causal_conv1d_cuda")
    conv.causal_conv1d_fwd(_turned(x), weight, bias, seq_idx, None, _turned(out), None, True)
    return out


@conv_silu.register_fake
def _conv_silu_shape(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(f"{SSD_OPERATORS}::conv_silu_gradients", mutates_args=(), device_types="cuda")
def conv_silu_gradients(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``conv_silu``: (B, T, C), and (C, K) and (C,) summed in fp32."""
    x, d_out = _channels_last(x), _channels_last(d_out)
    d_x = x.new_empty(x.shape)
    d_weight, d_bias = torch.zeros_like(weight, dtype=torch.float32), torch.zeros_like(bias, dtype=torch.float32)
    conv = importlib.import_module("causal_conv1d_cuda")
    turned = (_turned(x), weight, bias, _turned(d_out), seq_idx, None, None, _turned(d_x))
    conv.causal_conv1d_bwd(*turned, d_weight, d_bias, None, True)
    return d_x, d_weight, d_bias


@conv_silu_gradients.register_fake
def _conv_silu_gradient_shapes(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float32
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=wide), bias.new_empty(bias.shape, dtype=wide)


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _conv_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, seq_idx = ctx.saved_tensors
    d_x, d_weight, d_bias = conv_silu_gradients(d_out, x, weight, bias, seq_idx)
    return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None


conv_silu.register_autograd(_conv_backward, setup_context=_keep_conv)


@torch.library.custom_op(f"{SSD_OPERATORS}::ssd_scan", mutates_args=(), device_types="cuda")
def ssd_scan(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, seq_idx: Tensor | None, chunk_size: int
) -> Tensor:
    """S_t = exp(step_t rate) S_(t-1) + step_t x_t B_t^T, y_t = S_t C_t + skip x_t, from a zero state at each document.

    ``x`` (B, T, H, P), ``b`` and ``c`` (B, T, G, N) in half precision; ``step`` (B, T, H), ``rate`` and ``skip`` (H,)
    in fp32; ``seq_idx`` (B, T) int32 or none. States are carried in fp32. Returns y (B, T, H, P).
    """
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    y, *_ = scan._mamba_chunk_scan_combined_fwd(x, step, rate, b, c, chunk_size, D=skip, seq_idx=seq_idx)
    return y


@ssd_scan.register_fake
def _ssd_scan_shape(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, seq_idx: Tensor | None, chunk_size: int
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(f"{SSD_OPERATORS}::ssd_scan_gradients", mutates_args=(), device_types="cuda")
def ssd_scan_gradients(
    d_y: Tensor,
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    y: Tensor,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``ssd_scan`` by its first six arguments; states are computed again instead of being kept."""
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    d_x, d_step, d_rate, d_b, d_c, d_skip, *_ = scan._mamba_chunk_scan_combined_bwd(
        d_y.contiguous(), x, step, rate, b, c, y, chunk_size, D=skip, seq_idx=seq_idx
    )
    return d_x.contiguous(), d_step.contiguous(), d_rate, d_b.contiguous(), d_c.contiguous(), d_skip


@ssd_scan_gradients.register_fake
def _ssd_scan_gradient_shapes(
    d_y: Tensor,
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    y: Tensor,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_x, d_step, d_rate, d_b, d_c, d_skip = (part.new_empty(part.shape) for part in (x, step, rate, b, c, skip))
    return d_x, d_step, d_rate, d_b, d_c, d_skip


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output)


def _scan_backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, step, rate, b, c, skip, seq_idx, y = ctx.saved_tensors
    gradients = ssd_scan_gradients(d_y, x, step, rate, b, c, skip, y, seq_idx, ctx.chunk_size)
    return *gradients, None, None


ssd_scan.register_autograd(_scan_backward, setup_context=_keep_scan)


def _channels_last(x: Tensor) -> Tensor:
    """``x`` (B, T, C) as the kernel reads it: channels side by side, rows that start at multiples of 16 bytes."""
    aligned = x.storage_offset() % 8 == 0 and all(stride % 8 == 0 for stride in x.stride()[:2])
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


def _turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2)
