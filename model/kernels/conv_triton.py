"""Our Triton kernels for Mamba-2's convolution: causal, depthwise, with bias and SiLU, forward and backward.

B batch, T time, C channels, K taps (2 to 4).

    p_t = b + sum_j w_j x_(t - K + 1 + j) over inputs of t's document;  y_t = p_t sigmoid(p_t)

A program takes a block of channels and walks along a stretch of tokens with the last three inputs in registers, so each
value is read once from memory, but for the three tokens at a stretch's ends. Tokens are taken four at a time, and those
to come are on their way meanwhile. Backward computes p again. Sums of weights' gradients go stretch by stretch, then
over stretches in one fixed order: the same bits each time.
"""

# mypy: allow-untyped-defs
# A kernel's arguments are whatever Triton makes of tensors and numbers.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.sigmoid_triton import sigmoid

MOST_TAPS = 4
FORWARD_STRETCH, BACKWARD_STRETCH = 64, 128
"""Tokens a program walks along."""
BLOCK = 256
"""Channels a program holds."""
WARPS = 2
STAGES = 3
"""Groups of four tokens in flight: two are on their way to shared memory while one is computed."""


def conv_silu_forward(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, valid: Tensor | None) -> Tensor:
    """y (B, T, C), contiguous and in x's dtype.

    ``x`` (B, T, C) with channels side by side and rows anywhere; ``weight`` (C, K), ``bias`` (C,); ``seq_idx`` (B, T)
    document numbers or none; ``valid`` (B, T) false at padding, which counts as zero input, or none.
    """
    batch, time, channels = x.shape
    out = x.new_empty(batch, time, channels)
    conv_silu_kernel[_grid(x, FORWARD_STRETCH)](
        x, weight.contiguous(), bias, seq_idx, valid, out, time, channels, x.stride(0), x.stride(1),
        taps=weight.shape[1], stretch=FORWARD_STRETCH, block=BLOCK, stages=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out


def conv_silu_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    seq_idx: Tensor | None,
    valid: Tensor | None,
    d_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradient by x into ``d_x`` (B, T, C), rows anywhere; return those by weight (C, K) and bias (C,), fp32.

    ``d_out`` (B, T, C) is the gradient by y; the rest is as in ``conv_silu_forward``.
    """
    (batch, time, channels), taps = x.shape, weight.shape[1]
    grid = _grid(x, BACKWARD_STRETCH)
    partial = x.new_empty(batch * grid[1], taps + 1, channels, dtype=torch.float32)
    conv_silu_backward_kernel[grid](
        d_out, x, weight.contiguous(), bias, seq_idx, valid, d_x, partial, time, channels,
        d_out.stride(0), d_out.stride(1), x.stride(0), x.stride(1), d_x.stride(0), d_x.stride(1),
        taps=taps, stretch=BACKWARD_STRETCH, block=BLOCK, stages=STAGES, num_warps=WARPS,
    )  # fmt: skip
    total = partial.sum(0)
    return total[:taps].t().contiguous(), total[taps].clone()


def _grid(x: Tensor, stretch: int) -> tuple[int, int, int]:
    batch, time, channels = x.shape
    return triton.cdiv(channels, BLOCK), triton.cdiv(time, stretch), batch


@triton.jit
def _tap(weight, channel, inside, taps: tl.constexpr, before: tl.constexpr):
    """Weights of the inputs ``before`` tokens ago; zeros beyond the taps."""
    given = inside & (before < taps)
    return tl.load(weight + channel * taps + taps - 1 - before, mask=given, other=0.0).to(tl.float32)


@triton.jit
def _weights(weight, bias, channel, inside, taps: tl.constexpr):
    """Weights of this token and the three before it, and the bias."""
    taps_back = (
        _tap(weight, channel, inside, taps, 0),
        _tap(weight, channel, inside, taps, 1),
        _tap(weight, channel, inside, taps, 2),
        _tap(weight, channel, inside, taps, 3),
    )
    return taps_back, tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _token(x, valid, t, time, stride, inside):
    """Token ``t`` as stored; zeros outside the row and at padding."""
    there = (t >= 0) & (t < time)
    if valid is not None:
        there = there & (tl.load(valid + t, mask=there, other=0) != 0)
    return tl.load(x + t * stride, mask=inside & there, other=0.0)


@triton.jit
def _four_tokens(x, valid, t, time, stride, inside):
    return (
        _token(x, valid, t, time, stride, inside),
        _token(x, valid, t + 1, time, stride, inside),
        _token(x, valid, t + 2, time, stride, inside),
        _token(x, valid, t + 3, time, stride, inside),
    )


@triton.jit
def _three_before(x, valid, t, time, stride, inside):
    return (
        _token(x, valid, t - 1, time, stride, inside).to(tl.float32),
        _token(x, valid, t - 2, time, stride, inside).to(tl.float32),
        _token(x, valid, t - 3, time, stride, inside).to(tl.float32),
    )


@triton.jit
def _document(seq_idx, t, time):
    """The number of token ``t``'s document; past either end of the row that of the last token there."""
    return tl.load(seq_idx + tl.minimum(tl.maximum(t, 0), time - 1))


@triton.jit
def _kept(tensor, seq_idx, t, before, time):
    """``tensor`` where token ``t`` and the one ``before`` places back share a document; as it is if none is asked."""
    if seq_idx is not None:
        same = _document(seq_idx, t, time) == _document(seq_idx, t - before, time)
        tensor = tl.where(same, tensor, 0.0)
    return tensor


@triton.jit
def _forward_four(past, given, w, start, seq_idx, out, t, time, channels, inside):
    """Four tokens' results, stored; returns the three inputs before the next."""
    x1, x2, x3 = past
    for j in tl.static_range(4):
        x0 = given[j].to(tl.float32)
        p = start + w[0] * x0 + w[1] * _kept(x1, seq_idx, t + j, 1, time)
        p += w[2] * _kept(x2, seq_idx, t + j, 2, time) + w[3] * _kept(x3, seq_idx, t + j, 3, time)
        tl.store(out + (t + j) * channels, (p * sigmoid(p)).to(out.dtype.element_ty), mask=inside & (t + j < time))
        x3, x2, x1 = x2, x1, x0
    return x1, x2, x3


@triton.jit
def conv_silu_kernel(
    x, weight, bias, seq_idx, valid, out, time, channels, x_batch, x_time,
    taps: tl.constexpr, stretch: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """y of one stretch of one row, one block of channels."""
    channel = tl.program_id(0) * block + tl.arange(0, block)
    inside = channel < channels
    first, row = tl.program_id(1).to(tl.int64) * stretch, tl.program_id(2).to(tl.int64)
    x += row * x_batch + channel
    out += row * time * channels + channel
    if seq_idx is not None:
        seq_idx += row * time
    if valid is not None:
        valid += row * time
    w, start = _weights(weight, bias, channel, inside, taps)
    past = _three_before(x, valid, first, time, x_time, inside)
    for i in tl.range(0, stretch, 4, num_stages=stages):
        t = first + i
        now = _four_tokens(x, valid, t, time, x_time, inside)
        if seq_idx is None:
            past = _forward_four(past, now, w, start, None, out, t, time, channels, inside)
        else:
            # Numbers never fall along a row, so equal ends mean one document.
            if _document(seq_idx, t - 3, time) == _document(seq_idx, t + 3, time):
                past = _forward_four(past, now, w, start, None, out, t, time, channels, inside)
            else:
                past = _forward_four(past, now, w, start, seq_idx, out, t, time, channels, inside)


@triton.jit
def _through_silu(d_y, p):
    gate = sigmoid(p)
    return d_y * gate * (1.0 + p * (1.0 - gate))


@triton.jit
def _store_token(d_x, value, valid, t, first, last, stride, inside):
    """Store token ``t`` if it is one of this program's; nothing flows into padding."""
    ours = (t >= first) & (t < last)
    if valid is not None:
        value = tl.where(tl.load(valid + t, mask=ours, other=0) != 0, value, 0.0)
    tl.store(d_x + t * stride, value.to(d_x.dtype.element_ty), mask=inside & ours)


@triton.jit
def _backward_four(
    past, sums, d_weights, given, d_y, w, start, seq_idx, valid, d_x, t, first, last, time, d_x_time, inside,
    count: tl.constexpr,
):  # fmt: skip
    """``count`` tokens on: the three inputs before the next, what the three tokens before it have gathered of their
    gradients, and the sums for weights and bias."""
    x1, x2, x3 = past
    sum1, sum2, sum3 = sums
    d_w0, d_w1, d_w2, d_w3, d_start = d_weights
    for j in tl.static_range(count):
        x0 = given[j].to(tl.float32)
        y1, y2 = _kept(x1, seq_idx, t + j, 1, time), _kept(x2, seq_idx, t + j, 2, time)
        y3 = _kept(x3, seq_idx, t + j, 3, time)
        p = start + w[0] * x0 + w[1] * y1 + w[2] * y2 + w[3] * y3
        d_p = _through_silu(d_y[j].to(tl.float32), p)
        d_start += d_p
        d_w0 += d_p * x0
        d_w1 += d_p * y1
        d_w2 += d_p * y2
        d_w3 += d_p * y3
        whole = sum3 + w[3] * _kept(d_p, seq_idx, t + j, 3, time)
        sum3 = sum2 + w[2] * _kept(d_p, seq_idx, t + j, 2, time)
        sum2 = sum1 + w[1] * _kept(d_p, seq_idx, t + j, 1, time)
        sum1 = w[0] * d_p
        _store_token(d_x, whole, valid, t + j - 3, first, last, d_x_time, inside)
        x3, x2, x1 = x2, x1, x0
    return (x1, x2, x3), (sum1, sum2, sum3), (d_w0, d_w1, d_w2, d_w3, d_start)


@triton.jit
def conv_silu_backward_kernel(
    d_out, x, weight, bias, seq_idx, valid, d_x, partial, time, channels,
    d_out_batch, d_out_time, x_batch, x_time, d_x_batch, d_x_time,
    taps: tl.constexpr, stretch: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Gradients by x of one stretch of a row, one block of channels, and what the stretch adds to those of weights."""
    channel = tl.program_id(0) * block + tl.arange(0, block)
    inside = channel < channels
    first, row = tl.program_id(1).to(tl.int64) * stretch, tl.program_id(2).to(tl.int64)
    last = tl.minimum(first + stretch, time)
    partial += (row * tl.num_programs(1) + tl.program_id(1)) * (taps + 1) * channels + channel
    x += row * x_batch + channel
    d_out += row * d_out_batch + channel
    d_x += row * d_x_batch + channel
    if seq_idx is not None:
        seq_idx += row * time
    if valid is not None:
        valid += row * time
    w, start = _weights(weight, bias, channel, inside, taps)
    past = _three_before(x, valid, first, time, x_time, inside)
    zero = tl.zeros([block], tl.float32)
    sums, d_weights = (zero, zero, zero), (zero, zero, zero, zero, zero)
    for i in tl.range(0, stretch, 4, num_stages=stages):
        t = first + i
        now = _four_tokens(x, valid, t, time, x_time, inside)
        d_now = _four_tokens(d_out, None, t, time, d_out_time, inside)
        if seq_idx is None:
            past, sums, d_weights = _backward_four(
                past, sums, d_weights, now, d_now, w, start, None, valid, d_x, t, first, last, time, d_x_time, inside, 4
            )
        else:
            # Numbers never fall along a row, so equal ends mean one document.
            if _document(seq_idx, t - 3, time) == _document(seq_idx, t + 3, time):
                past, sums, d_weights = _backward_four(
                    past, sums, d_weights, now, d_now, w, start, None, valid, d_x, t, first, last, time, d_x_time,
                    inside, 4,
                )  # fmt: skip
            else:
                past, sums, d_weights = _backward_four(
                    past, sums, d_weights, now, d_now, w, start, seq_idx, valid, d_x, t, first, last, time, d_x_time,
                    inside, 4,
                )  # fmt: skip

    # Taps in the weight's order, then the bias.
    tl.store(partial + (taps - 1) * channels, d_weights[0], mask=inside)
    tl.store(partial + (taps - 2) * channels, d_weights[1], mask=inside)
    if taps > 2:
        tl.store(partial + (taps - 3) * channels, d_weights[2], mask=inside)
    if taps > 3:
        tl.store(partial + (taps - 4) * channels, d_weights[3], mask=inside)
    tl.store(partial + taps * channels, d_weights[4], mask=inside)
    # The next stretch's first tokens give to our last three.
    now = _four_tokens(x, valid, first + stretch, time, x_time, inside)
    d_now = _four_tokens(d_out, None, first + stretch, time, d_out_time, inside)
    _backward_four(
        past, sums, d_weights, now, d_now, w, start, seq_idx, valid, d_x, first + stretch, first, last, time, d_x_time,
        inside, 3,
    )  # fmt: skip
