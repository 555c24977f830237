"""Our own gated linear attention in Triton: forward and backward pass, dense and packed, the same bits on every run.

B batch, T time, H heads, K head_k_dim, V head_v_dim, D documents, C chunks, Q tokens a chunk.

The chunked form of Yang et al. 2023 (arXiv:2312.06635, section 4). Documents are cut into chunks of their own. Within a
chunk every pair of tokens is weighed through a border between the two, so that no decay is a ratio that could overflow,
and all pairs through borders of one depth are one product on tensor cores. Tile sizes are fixed: nothing is tuned when
a run starts.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.kernels.tiles import Tiles

CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Plan:
    """The kernels' tiles, the fastest measured on Hopper, and tokens a chunk, a power of two.

    Fixed, since the lengths decide the rounding.
    """

    sums: Tiles = field(default=Tiles(stages=1))
    states: Tiles = field(default=Tiles(width=32, stages=1))
    outputs: Tiles = field(default=Tiles(stages=1))
    values: Tiles = field(default=Tiles(stages=1))
    keys: Tiles = field(default=Tiles(width=64, stages=1))
    size: int = CHUNK_TOKENS
    wide_reach: int = 120
    """How strong a chunk's decay may be, as a power of two, for pairs by ratios in a dtype with fp32's exponents."""

    def reach(self, dtype: torch.dtype) -> int:
        """``wide_reach``, or what leaves fp16's few exponents room for queries and keys."""
        return 12 if dtype == torch.float16 else self.wide_reach


def gla_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor | None, scale: float, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """S_t = diag(exp(log_decay_t)) S_(t-1) + k_t v_t^T, o_t = scale S_t^T q_t, from a zero state at each document.

    ``q`` and ``k`` (B, T, H, K), ``v`` (B, T, H, V) in half precision, ``log_decay`` (B, T, H, K) in fp32, zero or
    below; ``edges`` (D + 1,) int32 of documents in the rows laid end to end, or none for one document a row. All
    contiguous, K and V powers of two.

    Returns o (B, T, H, V), and for backward the running sums of decays (B, T, H, K) and the scores (B, T, H, Q).
    """
    plan = plan or Plan()
    with torch.cuda.device_of(q):
        pass_ = _Pass(plan, q, v, edges)
        sums = torch.empty_like(log_decay)
        pass_.kernels.gla_sums_kernel[pass_.grid](
            log_decay, sums, pass_.spans, pass_.heads, **pass_.keys_and_size, **plan.sums.options
        )
        states = pass_.states(k, v, sums, scale, backward=False)
        o, scores = torch.empty_like(v), q.new_empty(*q.shape[:3], plan.size)
        for strong in (False, True):
            pass_.kernels.gla_outputs_kernel[pass_.grid](
                *(q, k, v, sums, states, pass_.spans, o, scores, scale, pass_.heads),
                **pass_.sizes,
                **pass_.pairs,
                strong=strong,
                **plan.outputs.options,
            )
    return o, sums, scores


def gla_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    scores: Tensor,
    edges: Tensor | None,
    scale: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by q, k, v and log_decay from o's; ``sums`` and ``scores`` are ``gla_forward``'s."""
    plan = plan or Plan()
    with torch.cuda.device_of(q):
        pass_ = _Pass(plan, q, v, edges)
        kernels = importlib.import_module("model.kernels.gla_triton_backward")
        before = pass_.states(k, v, sums, scale, backward=False)
        d_after = pass_.states(q, d_o, sums, scale, backward=True)
        d_v, d_scores = torch.empty_like(v), torch.empty_like(scores)
        kernels.gla_values_kernel[pass_.grid](
            *(d_o, k, v, sums, d_after, pass_.spans, scores, d_v, d_scores, scale, pass_.heads),
            **pass_.sizes,
            **plan.values.options,
        )
        d_q, d_k, d_decay = torch.empty_like(q), torch.empty_like(k), torch.empty_like(sums)
        width = min(plan.keys.width, q.shape[-1])
        for strong in (False, True):
            kernels.gla_keys_kernel[(*pass_.grid, q.shape[-1] // width)](
                *(d_o, q, k, v, sums, before, d_after, pass_.spans, d_scores, d_q, d_k, d_decay, scale, pass_.heads),
                **pass_.sizes,
                **pass_.pairs,
                strong=strong,
                width=width,
                **plan.keys.options,
            )
    return d_q, d_k, d_v, d_decay


class _Pass:
    """What both passes share: the chunks, sizes, and the walk that makes states."""

    def __init__(self, plan: Plan, q: Tensor, v: Tensor, edges: Tensor | None) -> None:
        (batch, time, self.heads, head_k), head_v = q.shape, v.shape[-1]
        tokens, self.plan = batch * time, plan
        if edges is None:
            edges = torch.arange(0, tokens + 1, time, dtype=torch.int32, device=q.device)
        self.documents = edges.numel() - 1
        # A document's last chunk may hold a single token: so many chunks at most.
        self.chunks = min(tokens, tokens // plan.size + self.documents)
        self.kernels = importlib.import_module("model.kernels.gla_triton_forward")
        self.spans = torch.empty(self.chunks, 2, dtype=torch.int32, device=q.device)
        self.firsts = torch.empty(self.documents + 1, dtype=torch.int32, device=q.device)
        width = 1 << self.documents.bit_length()
        self.kernels.gla_chunks_kernel[(self.documents + 1,)](
            edges, self.spans, self.firsts, self.chunks, size=plan.size, n_edges=edges.numel(), width=width
        )
        self.grid = (self.chunks, self.heads)
        self.keys_and_size = {"head_k": head_k, "size": plan.size}
        self.sizes = {**self.keys_and_size, "head_v": head_v}
        self.pairs = {"levels": plan.size.bit_length() - 1, "reach": plan.reach(q.dtype)}

    def states(self, k: Tensor, v: Tensor, sums: Tensor, scale: float, backward: bool) -> Tensor:
        """States before each chunk, or the gradients of those after it, (C, H, V, K)."""
        head_k = self.sizes["head_k"]
        width = min(self.plan.states.width, head_k)
        out = k.new_empty(self.chunks, self.heads, self.sizes["head_v"], head_k)
        self.kernels.gla_states_kernel[(self.documents * self.heads * (head_k // width),)](
            *(k, v, sums, self.spans, self.firsts, out, scale, self.heads),
            **self.sizes,
            width=width,
            backward=backward,
            **self.plan.states.options,
        )
        return out
