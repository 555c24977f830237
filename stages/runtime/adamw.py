"""AdamW on a flat tensor whose gradient was never joined: one update over all pieces (arXiv:1711.05101, algorithm 2).

g = factor g;  w -= lr decay w;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
w -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stages.runtime.flat import Layout


class Pieces:
    """A flat tensor's gradient in the order of its layout's pieces, each a contiguous tensor of a parameter's shape.

    Where Triton will read them, their addresses are on the way to ``device`` once this returns.
    """

    def __init__(self, gradients: Sequence[torch.Tensor], device: torch.device) -> None:
        self.gradients = list(gradients)
        self.addresses: torch.Tensor | None = None
        if uses_triton(device):
            addresses = [gradient.data_ptr() for gradient in gradients]
            self.are_aligned = all(address % 16 == 0 for address in addresses)
            # From pageable memory the copy would wait for all work before it.
            table = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
            self.addresses = table.to(device, non_blocking=True)

    def rows(self) -> list[torch.Tensor]:
        """The gradients, 1-D."""
        return [gradient.view(-1) for gradient in self.gradients]


@functools.cache
def uses_triton(device: torch.device) -> bool:
    """Whether the update is Triton's there."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


class Rule(NamedTuple):
    """The numbers of one step: ``updates`` is t, from 1 on; ``factor`` is what clipping makes of every gradient."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    updates: float
    factor: float


def empty_state(flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of ``flat`` before its first step, as torch's fused AdamW makes it."""
    step = torch.zeros((), dtype=torch.float32, device=flat.device)
    return {"step": step, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}


def update(flat: torch.Tensor, state: dict[str, Any], layout: Layout, pieces: Pieces, rule: Rule) -> None:
    """One step of ``flat``, fp32, and its moments in ``state``; ``pieces`` may be used up.

    Torch's own kernel, or on a GPU Triton's: it multiplies by ``factor`` as it reads, where torch needs a pass of its
    own over all gradients.
    """
    if pieces.addresses is not None:
        from stages.runtime import adamw_triton

        adamw_triton.update(flat, state["exp_avg"], state["exp_avg_sq"], layout, pieces, rule)
    else:
        update_by_torch(flat, state, layout, pieces, rule)


def update_by_torch(flat: torch.Tensor, state: dict[str, Any], layout: Layout, pieces: Pieces, rule: Rule) -> None:
    """``update`` by torch's fused kernel."""
    gradients = pieces.rows()
    if rule.factor != 1.0:
        torch._foreach_mul_(gradients, rule.factor)
    weights, first, second = map(layout.split, (flat, state["exp_avg"], state["exp_avg_sq"]))
    torch._fused_adamw_(
        weights, gradients, first, second, [], [state["step"]] * len(weights), lr=rule.lr, beta1=rule.beta1,
        beta2=rule.beta2, weight_decay=rule.weight_decay, eps=rule.eps, amsgrad=False, maximize=False,
    )  # fmt: skip
