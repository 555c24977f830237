"""ZeRO-1 without copies: weights are their own master copy, gradients are reduced and used where autograd put them.

DeepSpeed 0.19 copies every gradient into a bucket and into one flat tensor, clips that in a pass of its own, keeps a
clone of the weights that a rank updates, and copies it back; all of it costs memory and time alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed

from stages.runtime import flat
from stages.runtime.adamw import Pieces
from stages.runtime.clipping import clipping_factor, sum_of_squares
from stages.runtime.reduction import Reduction, Share


def take_over(zero: Any, parameters: Iterable[torch.Tensor]) -> None:
    """Put this file's step in place of that of ``zero``, DeepSpeed's optimizer of ZeRO-1 without off-loading.

    ``parameters`` are the model's, in its order.
    """
    ZeroOne(zero, parameters)


class ZeroOne:
    """What happens to gradients and weights from the last backward pass of a step on; ``zero`` holds the tensors.

    Gradients of earlier micro-steps add up in autograd's own tensors. In the last one they are averaged over ranks
    bucket by bucket, on NCCL's stream, as they come (``overlap_comm``) or once all are there.
    """

    def __init__(self, zero: Any, parameters: Iterable[torch.Tensor]) -> None:
        self._zero = zero
        self._group = zero.dp_process_group
        self._rank, self._ranks = distributed.get_rank(self._group), distributed.get_world_size(self._group)
        self._norm = torch.zeros(())
        self._pieces: dict[int, Pieces] = {}
        self._share_weights()
        shares = _shares(zero, self._ranks)
        self._reduction = Reduction(
            # Backward passes come from the last layer to the first, and to a tied embedding at the very end.
            [parameter for parameter in reversed(list(parameters)) if id(parameter) in shares],
            size=zero.reduce_bucket_size,
            group=self._group,
            shares=None if zero.use_multi_rank_bucket_allreduce else shares,
        )
        zero.process_gradients, zero.reduce_gradients, zero.step = self._take, self._reduce, self._step
        zero._get_groups_without_padding = self._saved_groups

    def _share_weights(self) -> None:
        """Let weights, fp32 already, be what the optimizer updates; DeepSpeed clones them as it must where not."""
        zero = self._zero
        for master, parts in zip(
            zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
        ):
            assert parts[self._rank].dtype == master.dtype, "weights are fp32"
            master.data = parts[self._rank].data
        # Views of the clones were handed out, which would keep them.
        zero._link_all_hp_params()

    def _saved_groups(self, masters: list[torch.Tensor]) -> list[torch.Tensor]:
        """What a checkpoint has of ``masters``. A slice would be written with all that it is a slice of."""
        lean = [
            master.detach()[: master.numel() - padding]
            for master, padding in zip(masters, self._zero.groups_padding, strict=True)
        ]
        return lean if self._ranks == 1 else [part.to("cpu", copy=True) for part in lean]

    def _take(self, parameter: torch.Tensor, group: int) -> None:
        """Autograd is done with the gradient of ``parameter`` for this micro-step."""
        if self._zero.overlap_comm and self._zero.is_gradient_accumulation_boundary():
            self._reduction.ready(parameter)

    def _reduce(self, pipeline_parallel: bool = False) -> None:
        """The last backward pass of a step is over; all that comes before the verdict is queued without a wait."""
        self._reduction.finish()
        groups = {}
        for master, members in zip(
            self._zero.single_partition_of_fp32_groups, self._zero.round_robin_bit16_groups, strict=True
        ):
            rows = [member.grad.view(-1) for member in members]
            layout = self._zero.optimizer.layouts[id(master)]
            groups[id(master)] = [
                row[piece.start : piece.start + piece.numel] for row, piece in zip(rows, layout.pieces, strict=True)
            ]
        self._norm = self._global_norm(groups.values())
        self._pieces = {key: Pieces(rows, self._norm.device) for key, rows in groups.items()}

    def _global_norm(self, groups: Iterable[list[torch.Tensor]]) -> torch.Tensor:
        """L2 norm of the mean gradient over ranks, the same on each; infinite where it is not finite."""
        squares = torch.stack([sum_of_squares(rows) for rows in groups])
        if self._ranks > 1:
            distributed.all_reduce(squares, group=self._group)
        norms = squares.sqrt()
        return torch.where(norms.isfinite().all(), torch.linalg.vector_norm(norms), torch.inf)

    def _step(self, closure: Any = None) -> None:
        """DeepSpeed's step: a norm that is not finite leaves it out, clipping, update; it lets gradients go after."""
        zero, pieces = self._zero, self._pieces
        self._pieces = {}
        zero._global_grad_norm = self._norm
        norm = float(self._norm)
        zero.overflow = not norm < float("inf")
        if zero.overflow:
            return
        zero.optimizer.factor, zero.optimizer.pieces = clipping_factor(norm, zero.clip_grad), pieces
        try:
            zero.optimizer.step()
        finally:
            zero.optimizer.pieces = {}
        self._gather()

    def _gather(self) -> None:
        """Bring the updated weights of all ranks together, in place."""
        from deepspeed import comm  # Knows what torch calls it.

        if self._ranks > 1:
            for whole, parts in zip(
                self._zero.bit16_groups_flat, self._zero.parallel_partitioned_bit16_groups, strict=True
            ):
                comm.all_gather_into_tensor(whole, parts[self._rank], self._group)


def _shares(zero: Any, ranks: int) -> dict[int, list[Share]]:
    """By the id of every parameter that is trained, which rank updates which part of it."""
    found: dict[int, list[Share]] = {}
    for members, offsets, size in zip(
        zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, zero.partition_size, strict=True
    ):
        shapes = [tuple(member.shape) for member in members]
        for rank in range(ranks):
            layout = flat.partition(shapes, offsets, int(size), rank)
            for member, piece in zip(members, layout.pieces, strict=True):
                shares = found.setdefault(id(member), [])
                if piece.numel:
                    shares.append(Share(rank, piece.start, piece.numel))
    return found
