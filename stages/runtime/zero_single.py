"""ZeRO-1 on one rank, where nothing is sharded: weights are their own master copy, gradients are used as they came.

DeepSpeed there copies every gradient into one flat tensor, clips that in a pass of its own, keeps a clone of the
weights, updates it and copies it back; all of it costs memory and time alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from stages.runtime.adamw import Pieces


def take_over(zero: Any) -> None:
    """Put this file's step in place of that of ``zero``, DeepSpeed's optimizer of ZeRO-1 without off-loading."""
    _share_weights(zero)
    zero.reduce_gradients = functools.partial(_reduce_nothing, zero)
    # Nothing goes through its buckets, which are made anew for each backward pass.
    zero.contiguous_gradients = False
    zero.step = functools.partial(_step, zero)


def _share_weights(zero: Any) -> None:
    """Let weights, fp32 already, be what the optimizer updates; DeepSpeed clones them as it must where they are not.

    Checkpoints hold what they held: each file has the weights, or the master copy, as a tensor of its own.
    """
    for master, (whole,) in zip(
        zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
    ):
        assert whole.dtype == master.dtype, "weights are fp32"
        master.data = whole.data
    # Views of the clones were handed out, which would keep them.
    zero._link_all_hp_params()


def _reduce_nothing(zero: Any, pipeline_parallel: bool = False) -> None:
    """Take gradients as they are: one rank's mean is its own, and two copies of each would be made for it."""
    zero.overlapping_partition_gradients_reduce_epilogue()


def _step(zero: Any, closure: Any = None) -> None:
    """DeepSpeed's step: norm, a step left out where it is not finite, clipping, update, gradients let go."""
    zero.micro_step_id = -1
    zero._global_grad_norm = zero.scaled_global_norm()
    # The host has time for this now: reading the norm waits for the backward pass.
    pieces = _pieces(zero)
    norm = float(zero._global_grad_norm)
    zero.overflow = not 0 <= norm < float("inf")
    if not zero.overflow:
        zero.optimizer.factor, zero.optimizer.pieces = clipping_factor(norm, zero.clip_grad), pieces
        try:
            zero.optimizer.step()
        finally:
            zero.optimizer.pieces = {}
    for held in (zero.averaged_gradients, zero.all_grad_tensors):
        held.update(dict.fromkeys(held))


def _pieces(zero: Any) -> dict[int, Pieces]:
    """Each group's gradients without the padding that DeepSpeed puts at its end."""
    found = {}
    for index, master in enumerate(zero.single_partition_of_fp32_groups):
        layout = zero.optimizer.layouts[id(master)]
        gradients = zero.averaged_gradients[index][: len(layout.pieces)]
        found[id(master)] = Pieces([gradient.contiguous() for gradient in gradients], master.device)
    return found


def clipping_factor(norm: float, limit: float) -> float:
    """What DeepSpeed multiplies gradients of that norm by, to the last bit; ``limit`` 0 is none. Always 1 or less."""
    if limit == 0.0:
        return 1.0
    excess = (torch.tensor(norm) + 1e-6) / limit
    return float(1.0 / excess.clamp(min=1.0))
