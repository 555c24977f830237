"""Muon: momentum of a matrix, made orthogonal (Jordan et al. 2024), at the size of AdamW's updates (arXiv:2502.16982).

M = mu M + G;  U = G + mu M;  W = W - lr (0.2 sqrt(max(rows, columns)) orthogonal(U) + weight_decay W)
"""

from __future__ import annotations

import math
from typing import Any

import torch

from stages.runtime.flat import Layout
from stages.runtime.optimizer_base import SplitOptimizer

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of X = a X + b (X X^T) X + c (X X^T)^2 X, chosen for the steepest rise of small singular values."""
UPDATE_RMS = 0.2
"""Root mean square of an update over lr, what AdamW's is found to be (Liu et al. 2025, section 2.2)."""


class Muon(SplitOptimizer):
    """Muon for groups with ``"own": True``, AdamW for the others.

    Under ZeRO-1/2 the momentum is sharded like any state. A rank makes the matrices of its partition orthogonal; those
    that a boundary cuts, at most one between two ranks, are put together first, and updated by each rank in its part.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, **kwargs: Any) -> None:
        super().__init__([{**group, "momentum": momentum} for group in groups], **kwargs)

    def update(
        self,
        group: dict[str, Any],
        state: dict[str, Any],
        flat: torch.Tensor,
        gradients: list[torch.Tensor],
        layout: Layout,
    ) -> None:
        """See ``SplitOptimizer``; ``gradients`` become the updates before they are made orthogonal."""
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(flat)
        decay = group["momentum"]
        parts = zip(layout.pieces, layout.split(flat), layout.split(state["momentum"]), gradients, strict=True)
        for piece, weight, momentum, gradient in parts:
            torch.add(gradient, momentum, alpha=decay, out=momentum)
            matrix = layout.full(piece, gradient.add_(momentum, alpha=decay))
            if matrix is None:
                continue
            change = orthogonal(matrix).reshape(-1)[piece.start : piece.start + piece.numel]
            weight.add_(change, alpha=-group["lr"] * UPDATE_RMS * math.sqrt(max(piece.shape)))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly U V^T of ``matrix`` = U S V^T, by five Newton-Schulz iterations; bf16 on a GPU, else fp32.

    Singular values come out between about 0.7 and 1.2, and those of nearly nothing smaller. Zeros stay zeros.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = torch.empty_like(wide, dtype=torch.bfloat16 if matrix.is_cuda else torch.float32)
    # The norm bounds the largest singular value; it is taken before anything is rounded.
    torch.div(wide, wide.norm() + 1e-20, out=x)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        # Sums are rounded once, with their products, and cost no reading of their own.
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
