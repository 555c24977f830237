"""Linear layers whose three matrix products run in 8-bit floating point (Micikevicius et al. 2022, arXiv:2209.05433).

M rows, K inputs, N outputs; of the head T tokens, D inputs, V outputs.

Scales are dynamic and one a tensor: each operand is multiplied so that its largest magnitude becomes the largest number
of its format, e4m3 for what goes forward and for weights, e5m2 for gradients of outputs. The tensor cores take both
operands with the summed dimension last, so each tensor is cast together with its transpose. Sums are fp32. Parameters
stay as they are, in fp32 under their names: checkpoints, optimizer and hooks see plain linear layers.

The head's logits stay a product in half precision, so its loss is as exact as without; its two gradients are products
in 8 bits. What they come from, softmax - one-hot, never exceeds 1, so its scale is known without a search.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.activations import FP8_LOGIT_ELEMENTS, FP8_TURNED_ELEMENTS
from model.layers import ResidualProjection
from model.loss import FEWEST_ELEMENTS, IGNORED, FusedLoss, LMHead, autocast_dtype, wide_errors

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNMENT = 16
"""What the tensor cores want sizes to be multiples of; outputs that are none are filled up with zeros."""
SMALLEST = 1024
"""Inputs and outputs from which a layer's products gain more than its casts cost."""
SMALLEST_AMAX = 1e-12
"""Below this a tensor counts as zero, so that its scale stays finite."""
SEGMENT = 64
"""Neighbours whose largest magnitude is sought first: a compiler's kernel does so at the speed of memory."""
ERROR_SCALE = 2.0**15
"""Of softmax - one-hot: 1 comes to more than half of the largest number of e5m2, and 2**-31 to its smallest."""
LOGIT_ELEMENTS = {"cuda": FP8_LOGIT_ELEMENTS}
"""Logits that the head holds at a time, by kind of device."""
TURNED_ELEMENTS = {"cuda": FP8_TURNED_ELEMENTS}
"""Their gradients that it holds at a time, turned, for one product; each more is another sum as large as the weight."""
TILE = 128
"""Chunks have a multiple of so many tokens: products run fast, and there are two shapes at most."""
OPERATORS = re.sub(r"\W", "_", __name__)


def cast_both(x: Tensor, dtype: torch.dtype, *, by_rows: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` (M, K) scaled to fill ``dtype``: (M, K), turned (K, M), and the factor back (fp32, no dimension).

    Both are filled up with zeros to the next multiples of 16. The largest magnitude of each row is left to a compiler,
    which takes it in the pass that makes ``x``: reading ``x`` once more for it would cost half as much as the cast.
    It can where that pass goes ``by_rows``, as a norm does, or else by neighbours; results are the same.
    """
    magnitudes = x.abs()
    if not by_rows and x.shape[1] % SEGMENT == 0:
        magnitudes = magnitudes.unflatten(-1, (-1, SEGMENT)).amax(-1)
    narrow, turned, unscale = cast_by(x, magnitudes.amax(-1), dtype)
    return narrow, turned, unscale


@torch.library.custom_op(f"{OPERATORS}::cast_by", mutates_args=())
def cast_by(x: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What ``cast_both`` gives, from ``x`` and the largest magnitude of each of its rows (M,).

    Those are in x's dtype: a compiler takes them before ``x`` is rounded, and rounded alike they are those of ``x``.
    """
    if x.is_cuda:
        kernels = importlib.import_module(".kernels.cast_triton", __package__)
        sizes = padded(x.shape[0]), padded(x.shape[1])
        narrow, turned, unscale = kernels.cast_by(x.contiguous(), magnitudes, dtype, SMALLEST_AMAX, *sizes)
        return narrow, turned, unscale
    limit = torch.finfo(dtype).max
    amax = magnitudes.amax().float().clamp(min=SMALLEST_AMAX)
    (rows, columns), (wide_rows, wide_columns) = x.shape, map(padded, x.shape)
    scaled = (x.float() * (limit / amax)).clamp(-limit, limit)
    narrow = functional.pad(scaled, (0, wide_columns - columns, 0, wide_rows - rows)).to(dtype)
    return narrow, narrow.t().clone(memory_format=torch.contiguous_format), amax / limit


@cast_by.register_fake
def _cast_shapes(x: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = map(padded, x.shape)
    narrow, turned = (x.new_empty(shape, dtype=dtype) for shape in ((rows, columns), (columns, rows)))
    return narrow, turned, x.new_empty((), dtype=torch.float32)


def padded(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Products(torch.autograd.Function):
    """y = x W^T, dx = dy W, dW = dy^T x, each of two operands in 8 bits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, w_narrow: Tensor, w_turned: Tensor, w_unscale: Tensor, after_norm: bool
    ) -> Tensor:
        """``x`` (M, K) to (M, N) in its precision by the cast of ``weight`` (N, K), whose gradient is as wide as it."""
        x_narrow, x_turned, x_unscale = cast_both(x, FORWARD, by_rows=after_norm)
        ctx.save_for_backward(x_turned, w_turned, x_unscale, w_unscale)
        ctx.weight_dtype, ctx.after_norm = weight.dtype, after_norm
        return _product(x_narrow, w_narrow, x_unscale, w_unscale, x.dtype, fast=True)[:, : weight.shape[0]]

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by both, summed without shortcuts."""
        x_turned, w_turned, x_unscale, w_unscale = ctx.saved_tensors
        d_y = d_outputs[0]
        narrow, turned, unscale = cast_both(d_y, BACKWARD, by_rows=not ctx.after_norm)
        d_x = _product(narrow, w_turned, unscale, w_unscale, d_y.dtype, fast=False)
        d_weight = _product(turned, x_turned, unscale, x_unscale, ctx.weight_dtype, fast=False)
        return d_x, d_weight[: d_y.shape[1]], None, None, None, None


class CastsWeight(nn.Linear):
    """A linear layer that casts its weight to 8 bits."""

    kept: tuple[Tensor, ...] | None = None
    """The weight's cast, while ``keep_casts`` is in force."""

    def cast(self, narrow: torch.dtype) -> tuple[Tensor, ...]:
        """The weight in 8 bits, rounded to ``narrow`` before."""
        return cast_both(self.weight.detach().to(narrow), FORWARD)


class Float8Linear(CastsWeight):
    """A linear layer that trains by 8-bit products. Without gradients, and in evaluation, it is the layer it was."""

    after_norm = True
    """Whether a norm makes its input, as before a projection from the residual stream, or the gradient of its output,
    as after one to it: which pass may take magnitudes by rows."""

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
        _require_half(rows)
        y = _Products.apply(rows, self.weight, *(self.kept or self.cast(narrow)), self.after_norm)
        y = y if self.bias is None else y + self.bias.to(narrow)
        return y.unflatten(0, x.shape[:-1])


class Float8ResidualProjection(Float8Linear, ResidualProjection):
    """A projection to the residual stream, in 8 bits."""

    after_norm = False


class Float8LMHead(CastsWeight, LMHead):
    """A head whose gradients are 8-bit products. Its logits, and its loss in evaluation, are what they were."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or with ``targets`` (T,) the summed NLL of ``hidden`` (T, D), as ``LMHead`` gives them.

        Raises:
            ValueError: on a GPU not in half precision.
        """
        if targets is None or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(hidden, targets)
        gradients = functools.partial(_loss_and_gradients, cast=self.kept)
        loss: Tensor = FusedLoss.apply(hidden, self.weight, targets, gradients)
        return loss

    def cast(self, narrow: torch.dtype) -> tuple[Tensor, ...]:
        """The weight turned, in 8 bits, and the factor back."""
        return _cast_turned(self.weight.detach().to(narrow))


def keep_casts(model: nn.Module, narrow: torch.dtype) -> None:
    """Cast all weights once for the calls until ``drop_casts``, which must come before any weight changes.

    Two bytes a weight, for a step of several micro-batches, which would each cast them anew.
    """
    for module in model.modules():
        if isinstance(module, CastsWeight) and module.kept is None:
            module.kept = module.cast(narrow)


def drop_casts(model: nn.Module) -> None:
    """Let every call cast its weight again."""
    for module in model.modules():
        if isinstance(module, CastsWeight):
            module.kept = None


TAKEN: dict[type[nn.Linear], type[nn.Linear]] = {
    nn.Linear: Float8Linear,
    ResidualProjection: Float8ResidualProjection,
    LMHead: Float8LMHead,
}
"""Layers that can be taken, and what they become; subclasses of other libraries are left alone."""


def takes(inputs: int, outputs: int) -> bool:
    """Whether a layer of these sizes is worth 8 bits and can be had in them."""
    return min(inputs, outputs) >= SMALLEST and inputs % ALIGNMENT == 0


def convert_to_fp8(model: nn.Module) -> list[str]:
    """Let every large linear layer inside ``model`` train in 8 bits, in place; returns the names of those."""
    taken = []
    for name, module in model.named_modules():
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


def _require_half(x: Tensor) -> None:
    if x.is_cuda and x.element_size() != 2:
        raise ValueError(f"fp8 must train under autocast in half precision; got {x.dtype}; set precision: bf16")


def _cast_turned(x: Tensor) -> tuple[Tensor, ...]:
    """``x`` (M, K) as (K, M) in 8 bits, and the factor back. One pass takes magnitudes: no compiler fuses them here."""
    return cast_by(x, torch.linalg.vector_norm(x, math.inf, dim=-1), FORWARD)[1:]


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, cast: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL and its gradients by ``hidden`` (T, D) and by ``weight`` (V, D), which is summed in fp32.

    ``cast`` is what ``Float8LMHead.cast`` gives of the weight, where it is there already.
    """
    narrow = autocast_dtype(weight)
    rows, matrix = hidden.to(narrow), weight.to(narrow)
    _require_half(rows)
    with torch.autocast(rows.device.type, enabled=False):  # or fp32 products on the CPU would be rounded
        nll, d_hidden, d_weight = _summed(rows, matrix, targets, *(cast or _cast_turned(matrix)))
    return nll, d_hidden.to(hidden.dtype), d_weight.to(weight.dtype)


def _summed(
    rows: Tensor, matrix: Tensor, targets: Tensor, w_turned: Tensor, w_unscale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL, dh and dW (fp32), chunk by chunk; dW stretch by stretch."""
    unscale = torch.full_like(w_unscale, 1 / ERROR_SCALE)
    nll, d_rows, d_weight = unscale.new_zeros(()), torch.empty_like(rows), unscale.new_zeros(matrix.shape[1])
    size, stretch = _head_tokens(rows, matrix.shape[0])
    for start in range(0, rows.shape[0], stretch):
        part, d_part, goals = (whole[start : start + stretch] for whole in (rows, d_rows, targets))
        # What each chunk's errors are, turned, lies side by side: (V, tokens of the stretch).
        turned = rows.new_empty(matrix.shape[0], padded(part.shape[0]), dtype=BACKWARD)
        for at in range(0, part.shape[0], size):
            chunk = slice(at, at + size)
            more, error = _errors(functional.linear(part[chunk], matrix), goals[chunk], turned[:, chunk])
            nll += more
            d_part[chunk] = _product(error, w_turned, unscale, w_unscale, rows.dtype, fast=False)
            del error  # before the next chunk's logits
        h_turned, h_unscale = _cast_turned(part)
        product = _product(turned, h_turned, unscale, h_unscale, torch.float32, fast=False)
        d_weight = product.add_(d_weight) if start else product
        del turned  # before the next stretch's
    return nll, d_rows, d_weight


def _errors(logits: Tensor, goals: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
    """Summed NLL of ``logits`` (T, V), and (softmax - one-hot) ERROR_SCALE in 8 bits, filled up (T, V or more).

    The latter is also written, turned, to ``turned`` (V, T or more).
    """
    wide = padded(logits.shape[1])
    if logits.is_cuda:
        kernels = importlib.import_module(".kernels.loss_triton", __package__)
        nll, narrow = kernels.errors(logits, goals, turned, wide, ERROR_SCALE, IGNORED)
        return nll, narrow
    nll, error = wide_errors(logits, goals)
    rows, columns = logits.shape
    filled = functional.pad(error * ERROR_SCALE, (0, wide - columns, 0, turned.shape[1] - rows)).to(BACKWARD)
    turned.copy_(filled[:, :columns].t())
    return nll, filled[:rows]


def _head_tokens(rows: Tensor, vocab_size: int) -> tuple[int, int]:
    """Tokens of a chunk and of a stretch of chunks: those of ``rows`` (T, D) in equal parts of whole tiles."""
    limits = (limit.get(rows.device.type, FEWEST_ELEMENTS) // vocab_size for limit in (LOGIT_ELEMENTS, TURNED_ELEMENTS))
    (most, at_once), n_tokens = (max(TILE, limit) for limit in limits), max(1, rows.shape[0])
    size = -(-n_tokens // (TILE * -(-n_tokens // most))) * TILE
    n_stretches = -(-n_tokens // (max(1, at_once // size) * size))
    return size, -(-n_tokens // (size * n_stretches)) * size
