"""Softmax attention: grouped queries, rotary positions, optional QK-norm, output gate, window and global tokens.

B batch, T time, D d_model, H query heads, J key and value heads, P head_dim, S keys seen.

    o_t = sum_s softmax_s(q_t k_s / sqrt(P)) v_s  over the s that t sees;   out = o_proj(o sigmoid(g))

A query sees the tokens of its own document up to itself; with a window w, only the last w of them and the document's
first ``global_tokens``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.boundaries import Layout
from model.cache import KVState, MixerState
from model.kernels.attend import attend_cudnn, attend_flash, attend_varlen
from model.kernels.flex import attend_flex, visible_blocks
from model.kernels.rows import document_edges
from model.layers import ResidualProjection, RMSNorm, at_least_fp32, rotary_angles, rotate
from model.mixers.contract import Mixer, projected
from model.spec import AttentionSpec, ModelSpec

EDGE_KERNELS = ("varlen", "flash_attn")
"""Kernels that are told of documents by their edges, and keep to windows without global tokens."""


def attend_by_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The sum above, one query after another: ``q`` (B, H, T, P), ``k`` and ``v`` (B, J, S, P), ``mask`` (B, 1, T, S).

    Without a mask query t sees the first S - T + t + 1 keys.
    """
    share = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(share, 1) for part in (k, v))
    behind = k.shape[2] - q.shape[2]
    outputs = []
    for t in range(q.shape[2]):
        scores = torch.einsum("bhp,bhsp->bhs", q[:, :, t], k) * q.shape[-1] ** -0.5
        seen = torch.arange(k.shape[2], device=q.device) <= behind + t if mask is None else mask[:, :, t]
        weights = torch.softmax(at_least_fp32(scores).masked_fill(~seen, -torch.inf), -1).to(q.dtype)
        outputs.append(torch.einsum("bhs,bhsp->bhp", weights, v))
    return torch.stack(outputs, 2)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What ``attend_by_query`` gives, by PyTorch's scaled dot product attention."""
    shared = q.shape[1] != k.shape[1]
    causal = mask is None and q.shape[2] > 1
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)


class Attention(Mixer):
    """The attention layer.

    Without a state, ``sdpa_cudnn`` takes rows that are one document each and have no window to keep to, ``varlen`` and
    ``flash_attn`` rows of several documents and windows, ``flex`` windows with global tokens too. Rows with padding,
    and what the one named kernel does not take, need a mask and go through the ``torch`` core.
    """

    backends: ClassVar = {"torch": attend_sdpa, "reference": attend_by_query}
    kernels: ClassVar = ("sdpa_cudnn", "varlen", "flex", "flash_attn")
    whole_row_kernels: ClassVar = ("sdpa_cudnn",)

    def __init__(self, spec: AttentionSpec, model: ModelSpec) -> None:
        super().__init__(spec, model)
        queries, keys = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(model.d_model, queries, bias=False)
        self.k_proj = nn.Linear(model.d_model, keys, bias=False)
        self.v_proj = nn.Linear(model.d_model, keys, bias=False)
        self.o_proj = ResidualProjection(queries, model.d_model)
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, model.norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, model.norm_eps)
        if spec.output_gate:
            self.g_proj = nn.Linear(model.d_model, queries, bias=False)

    def new_state(self) -> KVState:
        """No keys and values yet."""
        return KVState(self.spec.window, self.spec.global_tokens)

    def forward(self, x: Tensor, layout: Layout, state: MixerState | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        assert state is None or isinstance(state, KVState)
        q, k, v = self._heads(x, layout)
        o = self._attend(q, k, v, layout) if state is None else self._attend_cached(q, k, v, layout, state)
        o = o.transpose(1, 2).flatten(2)  # (B, T, H P)
        if self.spec.output_gate:
            o = o * torch.sigmoid(self.g_proj(x))
        return self.o_proj(o)

    def prepare(self, x: Tensor, layout: Layout) -> None:
        """Rotary angles, and the documents' edges, the visible blocks or the mask."""
        self._angles(layout)
        how = self._how(projected(x, self.q_proj.weight), layout)
        if how in EDGE_KERNELS:
            document_edges(layout, *x.shape[:2])
        elif how == "flex":
            visible_blocks(layout, self.spec.window, self.spec.global_tokens)
        elif how == "torch":
            layout.attention_mask(self.spec.window, self.spec.global_tokens)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Attention among the tokens of this call, (B, H, T, P)."""
        how = self._how(q, layout)
        if how == "sdpa_cudnn":
            return attend_cudnn(q, k, v)
        if how in EDGE_KERNELS:
            edges = document_edges(layout, q.shape[0], q.shape[2])
            attend = attend_varlen if how == "varlen" else attend_flash
            return attend(q, k, v, edges, self.spec.window)
        if how == "flex":
            return attend_flex(q, k, v, visible_blocks(layout, self.spec.window, self.spec.global_tokens))
        return self.core(q, k, v, layout.attention_mask(self.spec.window, self.spec.global_tokens))

    def _how(self, q: Tensor, layout: Layout) -> str:
        """The kernel that takes a call without a state, or ``torch``; ``q`` stands for its dtype and device."""
        window, one_document = self.spec.window, layout.doc_ids is None
        windowed = window is not None and window < layout.positions.shape[1]
        if layout.valid is not None:
            return "torch"
        if one_document and not windowed and self.takes("sdpa_cudnn", q):
            return "sdpa_cudnn"
        for name in () if windowed and self.spec.global_tokens else EDGE_KERNELS:
            if self.takes(name, q):
                return name
        return "flex" if self.takes("flex", q) else "torch"

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: KVState) -> Tensor:
        """Attention among this call's tokens and those that the state holds, (B, H, T, P)."""
        if state.keys is None:
            mask = layout.attention_mask(self.spec.window, self.spec.global_tokens)
            state.append(k, v, layout)
        else:
            k, v, mask = state.extend(k, v, layout)
        return self.core(q, k, v, mask)

    def _heads(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, T, P), rotated keys and values (B, J, T, P)."""
        spec = self.spec
        q, k, v = (proj(x).unflatten(-1, (-1, spec.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self._angles(layout)
        return rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)

    def _angles(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary angles, made once a forward pass."""
        key = ("rotary", self.spec.head_dim, self.spec.rope_theta)
        if key not in layout.memo:
            layout.memo[key] = rotary_angles(layout.positions, self.spec.head_dim, self.spec.rope_theta)
        cos, sin = layout.memo[key]
        return cos, sin
