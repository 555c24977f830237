"""Gated linear attention: a decay of its own for every key channel (Yang et al. 2023, arXiv:2312.06635).

B batch, T time, D d_model, H heads, K head_k_dim, V head_v_dim, C chunks, Q tokens a chunk.

Each head computes, with gates alpha_t in (0, 1)^K (section 4.4 of the paper)::

    alpha_t = sigmoid(W_gk x_t + b)^(1 / tau)
    S_t = diag(alpha_t) S_(t-1) + k_t v_t^T              (K, V)
    o_t = S_t^T q_t / sqrt(K);    out = o_proj(norm(o) silu(g))
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model import init
from model.boundaries import Layout
from model.cache import MixerState, RecurrentState
from model.kernels.gla import gla_by_fla
from model.kernels.gla_core import gla_by_triton
from model.kernels.rows import document_edges
from model.layers import ResidualProjection, RMSNorm, at_least_fp32
from model.mixers.contract import Mixer, island, projected
from model.mixers.scan import block_size, carry_states, document_changes, from_chunks, into_chunks
from model.spec import GLASpec, ModelSpec


def gla_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, layout: Layout, initial: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(log_decay_t)) S_(t-1) + k_t v_t^T, o_t = S_t^T q_t, token by token.

    ``q``, ``k`` and ``log_decay`` (B, T, H, K), ``v`` (B, T, H, V), ``initial`` (B, H, K, V) or zeros. Returns o
    (B, T, H, V) and the state after the last token.
    """
    batch, time, heads, width = k.shape
    state = k.new_zeros(batch, heads, width, v.shape[-1]) if initial is None else initial.to(k.dtype)
    outputs = []
    for t, starts in enumerate(document_changes(layout.doc_ids, time)):
        if starts is not None:
            state = torch.where(starts[:, None, None, None], 0.0, state)
        state = log_decay[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 1), state


def gla_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, layout: Layout, initial: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """What ``gla_recurrence`` gives, by matrix products within chunks and a short loop over chunks."""
    time = q.shape[1]
    size = block_size(time, chunk_size)
    masks = layout.chunk_masks(size)
    q, k, v, log_decay = (into_chunks(part, size) for part in (q, k, v, log_decay))  # (B, C, H, Q, K or V)
    scores, since_start, until_end = _scores(q, k, log_decay)
    from_start, to_end, through = since_start.exp(), until_end.exp(), since_start[..., -1, :, None].exp()
    if masks is not None:
        scores = scores * masks.pairs[:, :, None]
        from_start = from_start * masks.head[:, :, None, :, None]
        to_end = to_end * masks.tail[:, :, None, :, None]
        through = through * masks.through[:, :, None, None, None]
    added = (k * to_end).transpose(-1, -2) @ v  # (B, C, H, K, V)
    before, state = carry_states(added, through, initial)
    return from_chunks(scores @ v + (q * from_start) @ before, time), state


def _scores(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (..., Q, Q) of each pair in a chunk, q_i . (k_j * decay from j to i), zero above the diagonal.

    The decay between two tokens does not factor into exp(b_i) exp(-b_j) with b a running sum: the second overflows.
    Blocks are therefore joined two by two: the right one looks at the left one through their border, by the decay since
    the border and until it. Both are sums of log decays, so no exponent is above zero, none is a difference of large
    numbers, and none reaches into another document. Also returns the sums since the chunk's start, and until its end.
    """
    scores = (q * k).sum(-1)[..., None, None]  # (..., Q, 1, 1): blocks of one token
    since = log_decay[..., None, :]  # (..., Q, 1, K): sum from the block's first token to this one, both included
    until = torch.zeros_like(since)  # sum from the token after this one to the block's last
    block = 1
    while scores.shape[-3] > 1:
        (since_left, since_right), (until_left, until_right) = (
            part.unflatten(-3, (-1, 2)).unbind(-3) for part in (since, until)
        )
        queries = q.unflatten(-2, (-1, 2, block)).select(-3, 1) * since_right.exp()
        keys = k.unflatten(-2, (-1, 2, block)).select(-3, 0) * until_left.exp()
        left, right = scores.unflatten(-3, (-1, 2)).unbind(-3)
        lower = torch.cat([queries @ keys.transpose(-1, -2), right], -1)
        scores = torch.cat([functional.pad(left, (0, block)), lower], -2)
        since = torch.cat([since_left, since_right + since_left[..., -1:, :]], -2)
        until = torch.cat([until_left + since_right[..., -1:, :], until_right], -2)
        block *= 2
    return scores.squeeze(-3), since.squeeze(-3), until.squeeze(-3)


def gla_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of ``gla_recurrence``: ``q``, ``k``, ``log_decay`` (B, 1, H, K), ``v`` (B, 1, H, V)."""
    kept = log_decay.squeeze(1).exp()[..., None] * state.to(k.dtype)
    state = torch.addcmul(kept, k.squeeze(1)[..., None], v.squeeze(1)[..., None, :])
    return q.transpose(1, 2).matmul(state).transpose(1, 2), state


class GLA(Mixer):
    """The gated linear attention layer with a full-rank or low-rank vector gate and a swish output gate.

    Kernels take every call without a state: ``triton`` is our own, ``fla`` flash-linear-attention's.
    """

    initialisers: ClassVar = {"gate_bias": init.gate_bias}
    backends: ClassVar = {"torch": gla_chunked, "reference": gla_recurrence}
    kernels: ClassVar = ("triton", "fla")

    def __init__(self, spec: GLASpec, model: ModelSpec) -> None:
        super().__init__(spec, model)
        keys, values = spec.n_heads * spec.head_k_dim, spec.n_heads * spec.head_v_dim
        self.q_proj = nn.Linear(model.d_model, keys, bias=False)
        self.k_proj = nn.Linear(model.d_model, keys, bias=False)
        self.v_proj = nn.Linear(model.d_model, values, bias=False)
        self.gk_proj = _gate_projection(model.d_model, keys, spec.gate_rank)
        self.gate_bias = island(keys)
        self.g_proj = nn.Linear(model.d_model, values, bias=False)
        self.norm = RMSNorm(spec.head_v_dim, model.norm_eps)
        self.o_proj = ResidualProjection(values, model.d_model)

    def new_state(self) -> RecurrentState:
        """An empty memory."""
        return RecurrentState()

    def forward(self, x: Tensor, layout: Layout, state: MixerState | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        assert state is None or isinstance(state, RecurrentState)
        heads = (self.spec.n_heads, -1)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        gate = self.gk_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            kernel = self._kernel_for(q) if state is None else None
            if kernel is not None:
                o = self._by_kernel(kernel, q, k, v, gate, layout)
            else:
                o, mixer_state = self._mix(q, k, v, gate, layout, None if state is None else state.mixer_state)
                if state is not None:
                    state.mixer_state = mixer_state.detach()
            o = self.norm(o).flatten(2)
        return self.o_proj(o.to(x.dtype) * functional.silu(self.g_proj(x)))

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layout: Layout, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence in fp32: (B, T, H, V) and the last state."""
        q, k, v = (at_least_fp32(part) for part in (q, k, v))
        k, log_decay = self._unpadded(k, gate, layout)
        q = q * self.spec.head_k_dim**-0.5
        if q.shape[1] == 1 and initial is not None:
            return gla_step(q, k, v, log_decay, initial)
        return self.core(q, k, v, log_decay, layout, initial, self.spec.chunk_size)

    def _kernel_for(self, given: Tensor) -> str | None:
        return next((name for name in self.kernels if self.takes(name, given)), None)

    def _by_kernel(self, kernel: str, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layout: Layout) -> Tensor:
        """What ``_mix`` gives from no state, in half precision with fp32 decays and states: (B, T, H, V)."""
        k, log_decay = self._unpadded(k, gate, layout)
        edges = None if layout.doc_ids is None else document_edges(layout, *q.shape[:2])
        scan = gla_by_triton if kernel == "triton" else gla_by_fla
        return scan(q, k, v, log_decay, edges, self.spec.head_k_dim**-0.5)

    def _unpadded(self, k: Tensor, gate: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Keys, and log decays (B, T, H, K) in fp32, that leave no trace of padding: no key and no decay there."""
        gate = at_least_fp32(gate) + self.gate_bias
        log_decay = functional.logsigmoid(gate) / self.spec.gate_normalizer
        log_decay = log_decay.unflatten(-1, (self.spec.n_heads, -1))
        if layout.valid is None:
            return k, log_decay
        valid = layout.valid[:, :, None, None]
        return k * valid, log_decay * valid

    def prepare(self, x: Tensor, layout: Layout) -> None:
        """The documents' edges, or the torch core's masks."""
        by_kernel = self._kernel_for(projected(x, self.q_proj.weight)) is not None
        if layout.doc_ids is not None and by_kernel:
            document_edges(layout, *x.shape[:2])
        elif self.backend != "reference":
            layout.chunk_masks(block_size(x.shape[1], self.spec.chunk_size))


def _gate_projection(d_model: int, width: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(d_model, width, bias=False)
    return nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, width, bias=False))
