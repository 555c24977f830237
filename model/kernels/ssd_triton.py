"""Our own Mamba-2 scan in Triton: forward and backward pass, dense and packed, the same bits on every run.

B batch, T time, H heads, P head_dim, G groups, N d_state, C chunks, Q tokens a chunk, K blocks of heads.

The chunked form of Dao and Gu 2024 (arXiv:2405.21060, section 6), cut differently: the forward pass is one kernel in
which a program walks one head's chunks with the fp32 state in registers, so that no state travels through memory; the
backward pass walks them again in both directions for the states and their gradients, then takes all chunks at once,
many heads a program, since heads of a group share B and C. Triton is looked up at the first call.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.kernels.tiles import Tiles


@dataclass(frozen=True)
class Plan:
    """The kernels' tiles for one head_dim and d_state, and tokens a chunk, forward and backward.

    Fixed, since the lengths decide the rounding.
    """

    scan: Tiles = field(default=Tiles())
    states: Tiles = field(default=Tiles(stages=4))
    between: Tiles = field(default=Tiles(warps=8, stages=4))
    within: Tiles = field(default=Tiles())
    size: int = 64
    backward_size: int = 64
    heads_per_block: int = 32


def plan_for(head_dim: int, d_state: int) -> Plan:
    """Tiles that fit one Hopper multiprocessor's registers and shared memory; for 64 and 128 the fastest measured."""
    if head_dim <= 64 and d_state <= 128:
        return Plan()
    return Plan(states=Tiles(), between=Tiles(warps=8, stages=1), within=Tiles(stages=1))


def ssd_forward(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    seq_idx: Tensor | None,
    y: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """S_t = exp(step_t rate) S_(t-1) + step_t x_t B_t^T, y_t = S_t C_t + skip x_t, from a zero state at each document.

    ``x`` (B, T, H, P), ``b`` and ``c`` (B, T, G, N) in half precision, each with its last dimension contiguous and
    otherwise strided at will; ``step`` (B, T, H) of zero or more, ``rate`` and ``skip`` (H,) in fp32; ``seq_idx``
    (B, T) int32, or none for one document a row; ``y`` takes the result, else a new tensor does.

    Returns y (B, T, H, P).
    """
    _check(x, b, c, seq_idx)
    (batch, time, heads, head_dim), (groups, d_state) = x.shape, b.shape[2:]
    plan = plan or plan_for(head_dim, d_state)
    y = x.new_empty(x.shape) if y is None else y
    with torch.cuda.device_of(x):
        vectors, document = _prepare(step, rate, seq_idx, plan.size)
        width = min(plan.scan.width, head_dim)
        _kernels("forward").scan_kernel[(batch * heads * (head_dim // width),)](
            *(x, vectors, b, c, skip.contiguous(), document, y, time, vectors.stride(0), heads, heads // groups),
            *(*x.stride()[:3], *b.stride()[:3], *c.stride()[:3], *y.stride()[:3]),
            head_dim=head_dim,
            d_state=d_state,
            size=plan.size,
            width=width,
            packed=seq_idx is not None,
            **plan.scan.options,
        )
    return y


def ssd_backward(
    d_y: Tensor,
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    seq_idx: Tensor | None,
    d_x: Tensor,
    d_b: Tensor,
    d_c: Tensor,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``ssd_forward`` from y's; nothing that the forward pass computed is needed.

    Writes ``d_x`` (B, T, H, P), ``d_b`` and ``d_c`` (B, T, G, N), strided like their tensors may be; returns those of
    step (B, T, H), rate (H,) and skip (H,) in fp32. Takes 4 B C H N P bytes for states meanwhile.
    """
    _check(x, b, c, seq_idx)
    d_y = d_y if d_y.stride(-1) == 1 else d_y.contiguous()
    plan = plan or plan_for(x.shape[-1], b.shape[-1])
    with torch.cuda.device_of(x):
        vectors, document = _prepare(step, rate, seq_idx, plan.backward_size)
        pass_ = _Backward(plan, d_y, x, b, c, vectors, document, seq_idx is not None)
        before, d_after = pass_.states(x, b, backward=False), pass_.states(d_y, c, backward=True)
        pass_.between(before, d_after)
        pass_.within(d_after, skip.contiguous(), d_x)
        pass_.gather_heads(d_b, d_c)
        return pass_.gather_steps(rate.contiguous())


class _Backward:
    """The backward pass's kernels, one a method, in the order of their methods, and the buffers between them."""

    def __init__(
        self,
        plan: Plan,
        d_y: Tensor,
        x: Tensor,
        b: Tensor,
        c: Tensor,
        vectors: Tensor,
        document: Tensor,
        packed: bool,
    ) -> None:
        self.plan, self.d_y, self.x, self.b, self.c = plan, d_y, x, b, c
        self.vectors, self.document = vectors, document
        (self.batch, self.time, self.heads, head_dim), (self.groups, d_state) = x.shape, b.shape[2:]
        self.chunks = vectors.shape[-1] // plan.backward_size
        self.heads_per_block = _divisor(self.heads // self.groups, plan.heads_per_block)
        self.sizes = {"head_dim": head_dim, "d_state": d_state, "size": plan.backward_size, "packed": packed}
        self.counts = (self.time, self.heads, self.heads // self.groups, self.heads_per_block)
        self.grid = (self.heads // self.heads_per_block, self.chunks, self.batch)
        self.kernels = _kernels("backward")
        self.d_bc = vectors.new_empty(2, self.batch, self.grid[0], self.time, d_state)
        self.shares = vectors.new_empty(5, *vectors.shape[1:])
        self.d_through = vectors.new_empty(self.batch, self.chunks, self.heads)

    def states(self, x: Tensor, b: Tensor, backward: bool) -> Tensor:
        """States before each chunk, or the gradients of those after it: (B, C, H, N, P)."""
        head_dim, d_state = self.sizes["head_dim"], self.sizes["d_state"]
        width = min(self.plan.states.width, head_dim)
        out = x.new_empty(self.batch, self.chunks, self.heads, d_state, head_dim)
        self.kernels.states_kernel[(self.batch * self.heads * (head_dim // width),)](
            *(x, self.vectors, b, self.document, out),
            *(self.time, self.vectors.stride(0), self.heads, self.heads // self.groups),
            *(*x.stride()[:3], *b.stride()[:3]),
            **self.sizes,
            width=width,
            backward=backward,
            **self.plan.states.options,
        )
        return out

    def between(self, before: Tensor, d_after: Tensor) -> None:
        """What the states give to B, C and the decays."""
        self.kernels.between_kernel[self.grid](
            *(self.d_y, self.x, self.vectors, self.c, self.document, before, d_after),
            *(self.d_bc, self.shares, self.d_through, *self.counts),
            *(*self.d_y.stride()[:3], *self.x.stride()[:3], *self.c.stride()[:3]),
            **self.sizes,
            **self.plan.between.options,
        )

    def within(self, d_after: Tensor, skip: Tensor, d_x: Tensor) -> None:
        """The gradient of x, and what pairs within a chunk give to the rest."""
        self.kernels.within_kernel[self.grid](
            *(self.d_y, self.x, self.vectors, self.b, self.c, skip, self.document, d_after),
            *(d_x, self.d_bc, self.shares, *self.counts),
            *(*self.d_y.stride()[:3], *self.x.stride()[:3], *self.b.stride()[:3], *self.c.stride()[:3]),
            *d_x.stride()[:3],
            **self.sizes,
            **self.plan.within.options,
        )

    def gather_heads(self, d_b: Tensor, d_c: Tensor) -> None:
        """The gradients of B and C, summed over heads."""
        blocks = self.grid[0]
        self.kernels.gather_heads_kernel[(-(-self.time // 32), self.groups, self.batch)](
            *(self.d_bc, d_b, d_c, self.time, blocks, blocks // self.groups, *d_b.stride()[:3], *d_c.stride()[:3]),
            d_state=self.sizes["d_state"],
            size=32,
        )

    def gather_steps(self, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of step, rate and skip."""
        d_step = self.vectors.new_empty(self.batch, self.time, self.heads)
        d_rate_skip = self.vectors.new_empty(2, self.batch * self.chunks, self.heads)
        self.kernels.gather_steps_kernel[(self.chunks, -(-self.heads // 16), self.batch)](
            *(self.vectors, self.document, self.shares, self.d_through, rate, d_step, d_rate_skip),
            *(self.time, self.heads),
            size=self.sizes["size"],
            width=16,
            packed=self.sizes["packed"],
        )
        d_rate, d_skip = d_rate_skip.sum(1).unbind(0)
        return d_step, d_rate, d_skip


def _prepare(step: Tensor, rate: Tensor, seq_idx: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """What ``prepare_kernel`` makes of steps and documents, in chunks of ``size``."""
    batch, time, heads = step.shape
    chunks = -(-time // size)
    vectors = step.new_empty(3, batch, heads, chunks * size, dtype=torch.float32)
    document = torch.empty(batch, chunks * size, dtype=torch.int32, device=step.device)
    # Without documents any tensor will do: it is not read.
    numbers, strides = (document, (0, 0)) if seq_idx is None else (seq_idx, seq_idx.stride())
    _kernels("forward").prepare_kernel[(chunks, -(-heads // 16), batch)](
        *(step, rate.contiguous(), numbers, vectors, document, time, heads, *step.stride(), *strides),
        size=size,
        width=16,
        packed=seq_idx is not None,
    )
    return vectors, document


def _check(x: Tensor, b: Tensor, c: Tensor, seq_idx: Tensor | None) -> None:
    assert x.stride(-1) == b.stride(-1) == c.stride(-1) == 1, "the last dimension of x, b and c must be contiguous"
    assert b.shape == c.shape, "B and C have one shape"
    assert x.shape[2] % b.shape[2] == 0, "every group has the same number of heads"
    assert seq_idx is None or seq_idx.shape == x.shape[:2], "one document number a token"


def _divisor(number: int, largest: int) -> int:
    """The largest divisor of ``number`` up to ``largest``."""
    return max(size for size in range(1, largest + 1) if number % size == 0)


def _kernels(name: str) -> Any:
    return importlib.import_module(f"model.kernels.ssd_triton_{name}")
