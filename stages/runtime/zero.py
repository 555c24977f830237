"""What our optimizers and our clock need of DeepSpeed's ZeRO-1/2, put in place once its engine stands.

DeepSpeed 0.19's class is reached into here, in ``zero_one`` and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from stages.runtime import flat, zero_one
from stages.runtime.clipping import clipping_factor, sum_of_squares
from stages.runtime.optimizer_base import GatedAdamW


def support(optimizer: type[GatedAdamW]) -> None:
    """Put our optimizer on DeepSpeed's list of those that it shards."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if optimizer not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)


def attach(engine: Any, optimizer: GatedAdamW) -> None:
    """Tell ``optimizer`` what lies where in its flat tensors, and spare ``engine`` work that changes no number."""
    if engine.zero_optimization_stage() not in (1, 2):
        return
    zero = engine.optimizer
    optimizer.layouts = layouts(zero)
    if zero.cpu_offload:
        return
    if zero.partition_gradients:
        zero.get_grad_norm_direct = functools.partial(grad_norm, group=zero.dp_process_group)
        zero.unscale_and_clip_grads = functools.partial(_clip, zero)
    else:
        zero_one.take_over(zero, engine.module.parameters())


def layouts(zero: Any) -> dict[int, flat.Layout]:
    """By the id of each group's flat tensor, which parameters lie where in it on this rank."""
    found = {}
    for index, tensor in enumerate(zero.single_partition_of_fp32_groups):
        group = zero.real_dp_process_group[index]
        found[id(tensor)] = flat.partition(
            [tuple(parameter.shape) for parameter in zero.round_robin_bit16_groups[index]],
            zero.round_robin_bit16_offsets[index],
            int(zero.partition_size[index]),
            torch.distributed.get_rank(group),
            group,
        )
    return found


def grad_norm(gradients: Iterable[torch.Tensor], parameters: Any, norm_type: float = 2, *, group: Any) -> torch.Tensor:
    """L2 norm of one group's gradients over all ranks of ``group``, the same on each; -1 where it is not finite.

    ``parameters``, of which ``gradients`` may hold a part, are not needed without model parallelism.
    """
    assert norm_type == 2, "no other norm is clipped by"
    total = sum_of_squares(gradients)
    torch.distributed.all_reduce(total, group=group)
    norm = total.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


def _clip(zero: Any, gradients: Iterable[torch.Tensor], norm: torch.Tensor) -> None:
    """Clip ``gradients`` as DeepSpeed does, but for its pass that multiplies by one. The loss of fp32 has no scale."""
    factor = clipping_factor(float(norm), zero.clip_grad)
    if factor != 1.0:
        torch._foreach_mul_(list(gradients), factor)
