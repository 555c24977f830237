"""AdamW over the pieces of a flat tensor in one launch, by Triton. Imported where it runs.

Each element of weight, both moments and gradient is read once, and each of the first three written once. Nothing
depends on the order of programs. Arithmetic is fp32, rounded as IEEE has it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stages.runtime.adamw import Pieces, Rule
from stages.runtime.flat import Layout, Piece

STRETCH = 1024
"""Elements of a program; with ``WARPS`` the fastest of seven plans on an H200, 9.2 ms for 1.36B parameters."""
WARPS = 8


@triton.jit
def adamw_kernel(
    weight: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    gradients: tl.tensor,
    owners: tl.tensor,
    pieces: tl.tensor,
    factor: tl.tensor,
    decay: tl.tensor,
    rise1: tl.tensor,
    rise2: tl.tensor,
    size: tl.tensor,
    root: tl.tensor,
    eps: tl.tensor,
    stretch: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    """One stretch of one piece. ``gradients`` (pieces,) are addresses; ``pieces`` (pieces, 3) tell where each begins in
    ``weight``, its elements and its first program; ``owners`` (programs,) tell the piece of each program.

    ``decay`` is lr times weight decay, ``rise1`` and ``rise2`` are 1 - beta, ``size`` is lr / (1 - beta1^t) and
    ``root`` sqrt(1 - beta2^t).
    """
    owner = tl.load(owners + tl.program_id(0))
    begin = tl.load(pieces + 3 * owner)
    numel = tl.load(pieces + 3 * owner + 1)
    gradient = tl.load(gradients + owner).to(tl.pointer_type(tl.float32))
    if aligned:
        begin = tl.multiple_of(begin, 4)
        numel = tl.multiple_of(numel, 4)
        gradient = tl.multiple_of(gradient, 16)
    offset = (tl.program_id(0) - tl.load(pieces + 3 * owner + 2)) * stretch + tl.arange(0, stretch)
    inside = offset < numel
    g = factor * tl.load(gradient + offset, mask=inside, other=0.0)
    w = tl.load(weight + begin + offset, mask=inside, other=0.0)
    m = tl.load(first + begin + offset, mask=inside, other=0.0)
    v = tl.load(second + begin + offset, mask=inside, other=0.0)
    m += rise1 * (g - m)
    v += rise2 * (g * g - v)
    w -= decay * w
    w -= size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(weight + begin + offset, w, mask=inside)
    tl.store(first + begin + offset, m, mask=inside)
    tl.store(second + begin + offset, v, mask=inside)


def update(
    flat: torch.Tensor, first: torch.Tensor, second: torch.Tensor, layout: Layout, pieces: Pieces, rule: Rule
) -> None:
    """One step of ``flat``, ``first`` and ``second``, all 1-D and fp32."""
    owners, table, programs, aligned = _plan(layout.pieces, flat.device)
    if not programs:  # What lies on this rank of a small group may be padding alone.
        return
    aligned = aligned and pieces.are_aligned and all(base.data_ptr() % 16 == 0 for base in (flat, first, second))
    adamw_kernel[(programs,)](
        flat, first, second, pieces.addresses, owners, table, rule.factor, rule.lr * rule.weight_decay,
        1 - rule.beta1, 1 - rule.beta2, rule.lr / (1 - rule.beta1**rule.updates),
        math.sqrt(1 - rule.beta2**rule.updates), rule.eps, STRETCH, aligned, num_warps=WARPS,
    )  # fmt: skip


class Plan(NamedTuple):
    """Tables of ``adamw_kernel`` on a device, its programs, and whether four elements of a piece begin together."""

    owners: torch.Tensor
    pieces: torch.Tensor
    programs: int
    aligned: bool


@functools.lru_cache(maxsize=16)
def _plan(pieces: tuple[Piece, ...], device: torch.device) -> Plan:
    counts = torch.tensor([-(-piece.numel // STRETCH) for piece in pieces])
    firsts = counts.cumsum(0) - counts
    rows = [(piece.at, piece.numel, first) for piece, first in zip(pieces, firsts.tolist(), strict=True)]
    owners = torch.repeat_interleave(torch.arange(len(pieces), dtype=torch.int32), counts)
    aligned = all(piece.at % 4 == 0 and piece.numel % 4 == 0 for piece in pieces)
    return Plan(owners.to(device), torch.tensor(rows, dtype=torch.int64).to(device), len(owners), aligned)
