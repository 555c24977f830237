"""Cross-entropy of next tokens without keeping fp32 copies of all logits.

N tokens, D d_model, V vocab_size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The label of a token that is not scored."""
CHUNK_ELEMENTS = {"cuda": 2**29}
"""Logits held at a time, by kind of device: large products where they run fast, and little memory elsewhere."""
FEWEST_ELEMENTS = 2**22
Errors = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From logits (N, V) and targets (N,): their summed NLL in nats, and its gradient by the logits in their dtype."""


def shifted_labels(labels: Tensor) -> Tensor:
    """The label of each position's next token; the last position has none. ``[5, 6, 7]`` gives ``[6, 7, -100]``."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def mean_nll(total: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """``total`` over ``num_items_in_batch``, or over the scored targets where it is not given (0 without any)."""
    if num_items_in_batch is None:
        return total / (targets != IGNORED).sum().clamp(min=1)
    count = num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def nll_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood, nats, in fp32: ``logits`` (N, V), ``targets`` (N,).

    A chunk's fp32 copy is made again in the backward pass instead of being kept.
    """
    size = _chunk_tokens(logits)
    total = logits.new_zeros((), dtype=torch.float32)
    for part, goal in zip(logits.split(size), targets.split(size), strict=True):
        if part.dtype == torch.float32 or not torch.is_grad_enabled():
            total = total + _summed(part, goal)
        else:
            total = total + checkpoint(_summed, part, goal, use_reentrant=False)
    return total


class LMHead(nn.Linear):
    """The projection to the vocabulary, which can also give the loss without the logits."""

    errors: Errors

    def __init__(self, d_model: int, vocab_size: int, bias: bool = False) -> None:
        super().__init__(d_model, vocab_size, bias=bias)
        self.errors = _errors

    def compile_loss(self, backend: str = "inductor") -> None:
        """Compile what the loss does between its matrix products, which then reads each logit twice, writes it once."""
        self.errors = torch.compile(_errors_as_one, fullgraph=True, dynamic=False, backend=backend)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (..., V); with ``targets`` (N,) the summed NLL of ``hidden`` (N, D) instead, in nats, fp32.

        Taking the loss inside this module's forward lets ZeRO-3 gather the weight for it.
        """
        if targets is None:
            return super().forward(hidden)
        if torch.is_grad_enabled():
            gradients = functools.partial(_loss_and_gradients, errors=self.errors, wanted=True)
            loss: Tensor = FusedLoss.apply(hidden, self.weight, targets, gradients)
            return loss
        return _loss_and_gradients(hidden, self.weight, targets, self.errors, wanted=False)[0]


class FusedLoss(torch.autograd.Function):
    """NLL of softmax(W h), gradients taken chunk by chunk during the forward pass: dh = (p - y) W, dW = (p - y)^T h."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
    ) -> Tensor:
        """Sum over the chunks, by ``gradients``; those wait for the scale that ``backward`` brings."""
        total, d_hidden, d_weight = gradients(hidden, weight, targets)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale the waiting gradients."""
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * scale[0].to(d_hidden.dtype), d_weight * scale[0].to(d_weight.dtype), None, None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, errors: Errors, *, wanted: bool
) -> tuple[Tensor, ...]:
    """NLL, and where ``wanted`` its gradients by ``hidden`` and by ``weight``, which is summed in fp32 at least."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # Autocast would cast the weight again for every chunk.
    narrow = autocast_dtype(weight)
    rows, matrix = hidden.to(narrow), weight.to(narrow)
    total = hidden.new_zeros((), dtype=wide)
    d_weight = torch.zeros_like(weight, dtype=wide) if wanted else total
    d_hidden = torch.empty_like(rows) if wanted else total
    start, size = 0, _chunk_tokens(rows, weight.shape[0])
    for part, goal in zip(rows.split(size), targets.split(size), strict=True):
        nll, error = errors(functional.linear(part, matrix), goal)
        total = total + nll
        if wanted:
            d_hidden[start : start + size] = error @ matrix
            _add_product(d_weight, error, part)
        start += size
    return total, d_hidden.to(hidden.dtype), d_weight.to(weight.dtype)


def _add_product(total: Tensor, error: Tensor, rows: Tensor) -> None:
    """total += error^T rows, without rounding the product to half precision where the device can do without."""
    if error.is_cuda and error.dtype != total.dtype:
        # The product adds to the sum itself, which a separate addition would read and write once more.
        torch.addmm(total, error.T, rows, out_dtype=total.dtype, out=total)
    else:
        total += error.T @ rows


def _errors(logits: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """``Errors`` in place, with one fp32 copy of the logits: (p - y) where a token is scored, zero elsewhere."""
    nll, error = wide_errors(logits, goal)
    return nll, error.to(logits.dtype)


def wide_errors(logits: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """``Errors`` whose gradient is not rounded to half precision."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    error = torch.log_softmax(wide, -1)
    scored, index = goal != IGNORED, goal.clamp(min=0)[:, None]
    nll = -(error.gather(1, index)[:, 0] * scored).sum()
    error = error.exp_()
    error.scatter_add_(1, index, error.new_full((1, 1), -1.0).expand_as(index))
    return nll, error.mul_(scored[:, None])


def _errors_as_one(logits: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """What ``_errors`` gives, written so that a compiler fuses it: no operation in place, no scatter."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_sum = torch.logsumexp(wide, -1, keepdim=True)
    scored, index = goal != IGNORED, goal.clamp(min=0)[:, None]
    nll = ((log_sum - wide.gather(1, index))[:, 0] * scored).sum()
    aim = torch.arange(logits.shape[1], device=logits.device) == index
    return nll, (((wide - log_sum).exp() - aim.to(wide.dtype)) * scored[:, None]).to(logits.dtype)


def autocast_dtype(weight: Tensor) -> torch.dtype:
    """What a product with ``weight`` is computed in."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")


def _chunk_tokens(rows: Tensor, vocab_size: int | None = None) -> int:
    """Tokens whose logits are held together: ``rows`` (N, V or D) in equal parts, as far as the limit allows."""
    limit = CHUNK_ELEMENTS.get(rows.device.type, FEWEST_ELEMENTS) // (vocab_size or rows.shape[-1])
    if rows.device.type != "cuda":
        return max(64, limit)
    # Equal parts of whole tiles: a compiled chunk has one shape, or two.
    parts = -(-rows.shape[0] // max(128, limit))
    return max(128, -(-rows.shape[0] // (128 * max(1, parts))) * 128)
