"""The norm of gradients and the factor that clips them, to the last bit as DeepSpeed has them."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def sum_of_squares(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements, fp32, shape (), of ``gradients``, one or more, of one device.

    DeepSpeed's arithmetic, in which every tensor's norm is taken in fp64, without its fp64 copy of every tensor: where
    the device has a kernel for many tensors, it accumulates in fp64 as it reads.
    """
    tensors = list(gradients)
    held = [gradient for gradient in tensors if gradient.numel()]
    if not held:
        return tensors[0].new_zeros((), dtype=torch.float32)
    norms = torch.stack(torch._foreach_norm(held, 2, dtype=torch.float64))
    return norms.square().sum().float()


def clipping_factor(norm: float, limit: float) -> float:
    """What DeepSpeed multiplies gradients of that norm by, to the last bit; ``limit`` 0 is none. Always 1 or less."""
    if limit == 0.0:
        return 1.0
    excess = (torch.tensor(norm) + 1e-6) / limit
    return float(1.0 / excess.clamp(min=1.0))
