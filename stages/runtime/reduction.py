"""Gradients averaged over ranks where autograd put them, in buckets that leave while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import distributed


class Share(NamedTuple):
    """What rank ``owner`` of a group updates of a parameter: its elements ``[start:start + numel]``."""

    owner: int
    start: int
    numel: int


class Reduction:
    """The means over the ranks of ``group`` of the gradients of ``parameters``, in place.

    Buckets are cut once from ``parameters``, which stand in the order in which a backward pass is thought to come to
    them, and leave in that order alone: whatever order autograd has, and whichever gradients a rank has none of, all
    ranks send the same ones next.

    Args:
        size: elements of a bucket; a larger parameter is one of its own.
        shares: by the id of a parameter, who needs which part of its mean. Each part is then sent to its owner alone;
            what this rank does not own is lost. Without it every rank gets every mean.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        *,
        size: int,
        group: Any,
        shares: Mapping[int, Sequence[Share]] | None = None,
    ) -> None:
        self.buckets = bucketed(parameters, size)
        self._group, self._shares = group, shares
        self._ranks = distributed.get_world_size(group)
        self._bucket_of = {id(member): n for n, bucket in enumerate(self.buckets) for member in bucket}
        self._begin()

    def ready(self, parameter: torch.Tensor) -> None:
        """The gradient of ``parameter`` is whole: send its bucket once that is full and those before it are sent."""
        bucket = self._bucket_of[id(parameter)]
        self._missing[bucket] -= 1
        assert self._missing[bucket] >= 0, "a gradient is computed once in a backward pass"
        while self._sent < len(self.buckets) and not self._missing[self._sent]:
            self._send()

    def finish(self) -> None:
        """Send what is left and wait; on a GPU its stream waits, and the host goes on.

        Every parameter has a gradient then, zeros where it was not used.
        """
        while self._sent < len(self.buckets):
            self._send()
        for work in self._works:
            work.wait()
        if self._works and not _averages(self.buckets[0][0]):
            members = [member for bucket in self.buckets for member in bucket]
            torch._foreach_div_([member.grad for member in members if member.grad is not None], self._ranks)
        self._begin()

    def _begin(self) -> None:
        self._missing = [len(bucket) for bucket in self.buckets]
        self._sent = 0
        # They keep the tensors that are on the way.
        self._works: list[Any] = []

    def _send(self) -> None:
        bucket = self.buckets[self._sent]
        self._sent += 1
        gradients = []
        for parameter in bucket:
            # Torch lays gradients out as their parameters, which are contiguous; nothing else may be sent in place.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            parameter.grad = gradient
            gradients.append(gradient)
        if self._ranks == 1:
            return
        if self._shares is None:
            self._works += _all_reduced(gradients, self._group)
        else:
            pieces = [
                (share.owner, gradient.view(-1)[share.start : share.start + share.numel])
                for parameter, gradient in zip(bucket, gradients, strict=True)
                for share in self._shares[id(parameter)]
            ]
            self._works += _reduced(pieces, self._group)


def bucketed(parameters: Iterable[torch.Tensor], size: int) -> list[list[torch.Tensor]]:
    """``parameters`` in order, as many together as have no more than ``size`` elements, and at least one."""
    found: list[list[torch.Tensor]] = []
    room = 0
    for parameter in parameters:
        if not found or parameter.numel() > room:
            found.append([])
            room = size
        found[-1].append(parameter)
        room -= parameter.numel()
    return found


def _averages(tensor: torch.Tensor) -> bool:
    """Whether the backend of ``tensor``'s device has means: NCCL divides as it reads, gloo only sums."""
    return tensor.is_cuda


def _operation(tensor: torch.Tensor) -> Any:
    return distributed.ReduceOp.AVG if _averages(tensor) else distributed.ReduceOp.SUM


def _all_reduced(tensors: Sequence[torch.Tensor], group: Any) -> list[Any]:
    """Works that reduce ``tensors``: one launch of NCCL's; gloo joins and parts them on the host."""
    with distributed._coalescing_manager(group, async_ops=True) as sent:
        for tensor in tensors:
            distributed.all_reduce(tensor, _operation(tensor), group=group)
    return list(sent.works)


def _reduced(pieces: Sequence[tuple[int, torch.Tensor]], group: Any) -> list[Any]:
    """Works that reduce each piece to its owner: one launch of NCCL's, a call a piece on gloo."""
    first = pieces[0][1]
    together = distributed._coalescing_manager(group, first.device, async_ops=True) if first.is_cuda else nullcontext()
    with together as sent:
        works = [
            distributed.reduce(piece, op=_operation(piece), group=group, group_dst=owner, async_op=True)
            for owner, piece in pieces
        ]
    return works if sent is None else list(sent.works)
