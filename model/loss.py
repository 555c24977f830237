"""Cross-entropy of next tokens without keeping fp32 copies of all logits.

N tokens, D d_model, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The label of a token that is not scored."""
CHUNK_ELEMENTS = 2**22
"""Logits held in fp32 at a time."""


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
    size = _chunk_tokens(logits.shape[-1])
    total = logits.new_zeros((), dtype=torch.float32)
    for part, goal in zip(logits.split(size), targets.split(size), strict=True):
        if part.dtype == torch.float32 or not torch.is_grad_enabled():
            total = total + _summed(part, goal)
        else:
            total = total + checkpoint(_summed, part, goal, use_reentrant=False)
    return total


class LMHead(nn.Linear):
    """The projection to the vocabulary, which can also give the loss without the logits."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (..., V); with ``targets`` (N,) the summed NLL of ``hidden`` (N, D) instead, in nats, fp32.

        Taking the loss inside this module's forward lets ZeRO-3 gather the weight for it.
        """
        if targets is None:
            return super().forward(hidden)
        if torch.is_grad_enabled():
            loss: Tensor = _FusedLoss.apply(hidden, self.weight, targets)
            return loss
        return _loss_and_gradients(hidden, self.weight, targets, wanted=False)[0]


class _FusedLoss(torch.autograd.Function):
    """NLL of softmax(W h), gradients taken chunk by chunk during the forward pass: dh = (p - y) W, dW = (p - y)^T h."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Sum over the chunks; the gradients wait for the scale that ``backward`` brings."""
        total, d_hidden, d_weight = _loss_and_gradients(hidden, weight, targets, wanted=True)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor, Tensor, None]:
        """Scale the waiting gradients."""
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * scale[0].to(d_hidden.dtype), d_weight * scale[0].to(d_weight.dtype), None


def _loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, *, wanted: bool) -> tuple[Tensor, ...]:
    size = _chunk_tokens(weight.shape[0])
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = hidden.new_zeros((), dtype=wide)
    d_weight = torch.zeros_like(weight, dtype=wide) if wanted else total
    d_hidden = torch.empty_like(hidden) if wanted else total
    start = 0
    for part, goal in zip(hidden.split(size), targets.split(size), strict=True):
        logits = functional.linear(part, weight)
        log_probabilities = torch.log_softmax(logits.to(wide), -1)
        scored = goal != IGNORED
        index = goal.clamp(min=0)[:, None]
        total = total - (log_probabilities.gather(1, index)[:, 0] * scored).sum()
        if wanted:
            error = log_probabilities.exp_()
            error.scatter_add_(1, index, error.new_full((1, 1), -1.0).expand_as(index))
            error = error.mul_(scored[:, None]).to(logits.dtype)
            d_hidden[start : start + size] = (error @ weight.to(error.dtype)).to(hidden.dtype)
            d_weight += error.T @ part.to(error.dtype)
        start += size
    return total, d_hidden, d_weight.to(weight.dtype)


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")


def _chunk_tokens(vocab_size: int) -> int:
    return max(64, CHUNK_ELEMENTS // vocab_size)
