"""Small layers that blocks and mixers share: norms, SwiGLU, rotary positions, the causal convolution.

B batch, T time, D d_model, C channels, K taps, H heads, P head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.boundaries import Layout


def at_least_fp32(tensor: Tensor) -> Tensor:
    """``tensor`` in fp32, or as it is where it is fp64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis, in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of ``x``, keeping its dtype."""
        with torch.autocast(x.device.type, enabled=False):
            wide = at_least_fp32(x)
            return functional.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm of y * silu(z), separately within each of ``n_groups`` equal groups, in fp32 (Mamba-2's norm)."""

    def __init__(self, width: int, n_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.n_groups = n_groups
        self.eps = eps

    def forward(
        self, y: Tensor, z: Tensor | None = None, kernel: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """``y`` and ``z`` (..., width); the result has z's dtype, since y may be wider than the stream.

        A ``kernel`` of y and the weight in fp32 takes the call whatever ``y`` is, without ``z``, and returns what it
        likes: being called in here lets ZeRO-3 gather the weight for it.
        """
        if kernel is not None:
            return kernel(y, self.weight.float())
        assert z is not None, "only a kernel does without z"
        with torch.autocast(y.device.type, enabled=False):
            gated = at_least_fp32(y) * functional.silu(at_least_fp32(z))
            grouped = gated.unflatten(-1, (self.n_groups, -1))
            normed = functional.rms_norm(grouped, grouped.shape[-1:], None, self.eps).flatten(-2)
            return (normed * self.weight).to(z.dtype)


class ResidualProjection(nn.Linear):
    """A projection without bias whose result is added to the residual stream; two a layer, so they start narrower."""

    def __init__(self, d_in: int, d_model: int) -> None:
        super().__init__(d_in, d_model, bias=False)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = ResidualProjection(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.compiler.is_compiling():
            # Backward computes the product again where it reads both factors anyway: a write more, a d_ff kept less.
            return self.down_proj(checkpoint(_gated, gate, up, use_reentrant=False, preserve_rng_state=False))
        return self.down_proj(_gated(gate, up))


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, (B, T, P) each, in fp32 (Su et al. 2021, arXiv:2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * theta**-exponents
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + P/2) of ``x`` (B, T, H, P) by its angle: the half-rotation layout of Hugging Face."""
    low, high = x.chunk(2, -1)
    turned = x * cos[:, :, None] + torch.cat([-high, low], -1) * sin[:, :, None]
    return turned.to(x.dtype)


class CausalConv(nn.Module):
    """Causal depthwise convolution with bias: y_t = b + sum_j w_j x_(t - K + 1 + j), within one document.

    ``weight`` is (C, 1, K), as ``nn.Conv1d`` has it.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        past: Tensor | None = None,
        kernel: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Convolve ``x`` (B, T, C) after ``past`` (B, K - 1, C), the inputs before it (zeros where none).

        Returns the result and the last K - 1 inputs, which are the next call's ``past``. Padding counts as zero input.
        A ``kernel`` of x, weights (C, K) and bias, both in fp32, takes a call without a past, sees to padding itself,
        and returns what it likes: being called in here lets ZeRO-3 gather the weights for it.
        """
        taps, time = self.weight.shape[-1], x.shape[1]
        if kernel is not None:
            assert past is None, "a kernel starts from nothing"
            return kernel(x, self.weight.float()[:, 0], self.bias.float()), x[:, time - taps + 1 :]
        if layout.valid is not None:
            x = x * layout.valid[:, :, None].to(x.dtype)
        start = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if past is None else past.to(x.dtype)
        padded = torch.cat([start, x], 1)  # (B, K - 1 + T, C)
        weight = self.weight.to(x.dtype)
        y = torch.addcmul(self.bias.to(x.dtype), x, weight[:, 0, -1])
        for shift in range(1, taps):
            before = padded[:, taps - 1 - shift : taps - 1 - shift + time]
            same = layout.same_document(shift)
            if same is not None:
                before = before * same[:, :, None].to(x.dtype)
            y = torch.addcmul(y, before, weight[:, 0, -1 - shift])
        return y, padded[:, time:]

    def extra_repr(self) -> str:
        """Channels and taps, for ``print(model)``."""
        return f"{self.weight.shape[0]}, taps={self.weight.shape[-1]}"
