"""Linear layers whose three matrix products run in 8-bit floating point (Micikevicius et al. 2022, arXiv:2209.05433).

M rows, K inputs, N outputs.

Scales are dynamic and one a tensor: each operand is multiplied so that its largest magnitude becomes the largest number
of its format, e4m3 for what goes forward and for weights, e5m2 for gradients of outputs. The tensor cores take both
operands with the summed dimension last, so each tensor is cast together with its transpose. Sums are fp32. Parameters
stay as they are, in fp32 under their names: checkpoints, optimizer and hooks see plain linear layers.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from model.layers import ResidualProjection

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNMENT = 16
"""What the tensor cores want rows, inputs and outputs to be multiples of."""
SMALLEST = 1024
"""Inputs and outputs from which a layer's products gain more than its casts cost."""
SMALLEST_AMAX = 1e-12
"""Below this a tensor counts as zero, so that its scale stays finite."""
OPERATORS = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{OPERATORS}::cast_both", mutates_args=())
def cast_both(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` (M, K) scaled to fill ``dtype``: (M, K), turned (K, M), and the factor back (fp32, no dimension)."""
    if x.is_cuda:
        kernels = importlib.import_module(".kernels.cast_triton", __package__)
        narrow, turned, unscale = kernels.cast_both(x.contiguous(), dtype, SMALLEST_AMAX)
        return narrow, turned, unscale
    limit = torch.finfo(dtype).max
    amax = x.abs().amax().float().clamp(min=SMALLEST_AMAX)
    narrow = (x.float() * (limit / amax)).clamp(-limit, limit).to(dtype)
    return narrow, narrow.t().clone(memory_format=torch.contiguous_format), amax / limit


@cast_both.register_fake
def _cast_shapes(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    turned = x.new_empty(x.shape[::-1], dtype=dtype)
    return x.new_empty(x.shape, dtype=dtype), turned, x.new_empty((), dtype=torch.float32)


class _Products(torch.autograd.Function):
    """y = x W^T, dx = dy W, dW = dy^T x, each of two operands in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` (M, K) and ``weight`` (N, K) in one precision to (M, N) in it."""
        x_narrow, x_turned, x_unscale = cast_both(x, FORWARD)
        w_narrow, w_turned, w_unscale = cast_both(weight, FORWARD)
        ctx.save_for_backward(x_turned, w_turned, x_unscale, w_unscale)
        return _product(x_narrow, w_narrow, x_unscale, w_unscale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by both, summed without shortcuts."""
        x_turned, w_turned, x_unscale, w_unscale = ctx.saved_tensors
        dtype = d_outputs[0].dtype
        narrow, turned, unscale = cast_both(d_outputs[0], BACKWARD)
        d_x = _product(narrow, w_turned, unscale, w_unscale, dtype, fast=False)
        return d_x, _product(turned, x_turned, unscale, x_unscale, dtype, fast=False)


class Float8Linear(nn.Linear):
    """A linear layer that trains by 8-bit products. Without gradients, and in evaluation, it is the layer it was."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N), in autocast's dtype where that is on.

        Raises:
            ValueError: if the rows are no multiple of 16, or on a GPU not in half precision.
        """
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        kind = x.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = x.reshape(-1, self.in_features).to(narrow)
        if rows.shape[0] % ALIGNMENT:
            raise ValueError(
                f"micro_batch_size x seq_len must be a multiple of {ALIGNMENT} in fp8; got {rows.shape[0]} rows; "
                f"set seq_len to a multiple of {ALIGNMENT}, or precision: bf16"
            )
        if x.is_cuda and narrow.itemsize != 2:
            raise ValueError(f"fp8 must train under autocast in half precision; got {narrow}; set precision: bf16")
        y = _Products.apply(rows, self.weight.to(narrow))
        y = y if self.bias is None else y + self.bias.to(narrow)
        return y.unflatten(0, x.shape[:-1])


class Float8ResidualProjection(Float8Linear, ResidualProjection):
    """A projection to the residual stream, in 8 bits."""


TAKEN: dict[type[nn.Linear], type[nn.Linear]] = {nn.Linear: Float8Linear, ResidualProjection: Float8ResidualProjection}
"""Layers that can be taken, and what they become; subclasses of other libraries are left alone."""


def takes(inputs: int, outputs: int) -> bool:
    """Whether a layer of these sizes is worth 8 bits and can be had in them."""
    return min(inputs, outputs) >= SMALLEST and inputs % ALIGNMENT == outputs % ALIGNMENT == 0


def convert_to_fp8(blocks: nn.Module) -> list[str]:
    """Let every large linear layer inside ``blocks`` train in 8 bits, in place; returns the names of those."""
    taken = []
    for name, module in blocks.named_modules():
        if type(module) in TAKEN and takes(module.in_features, module.out_features):
            module.__class__ = TAKEN[type(module)]
            taken.append(name)
    return taken


def _product(
    rows: Tensor, columns: Tensor, row_unscale: Tensor, column_unscale: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """``rows`` (M, K) times ``columns`` (N, K) transposed, brought back to their scale, in ``dtype``.

    ``fast`` sums with the tensor cores' fewer bits.
    """
    if not rows.is_cuda:
        return ((rows.float() @ columns.float().t()) * (row_unscale * column_unscale)).to(dtype)
    return torch._scaled_mm(rows, columns.t(), row_unscale, column_unscale, out_dtype=dtype, use_fast_accum=fast)
