"""Mamba-2: a state-space layer whose decay is one scalar a head and token (Dao and Gu 2024, arXiv:2405.21060).

B batch, T time, D d_model, H heads, P head_dim, G groups, N d_state, C chunks, Q tokens a chunk.

The layer computes, for each head with its step dt_t > 0 and rate A < 0 (section 7.1 of the paper)::

    z, x, B, C, dt = in_proj(u);  x, B, C = silu(conv(x, B, C));  dt = softplus(dt + dt_bias)
    S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T          (P, N)
    y_t = S_t C_t + D x_t;        out = out_proj(norm(y silu(z)))
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model import init
from model.boundaries import Layout
from model.cache import MixerState, RecurrentState
from model.kernels.mamba2_core import mamba2_core
from model.kernels.rows import document_numbers
from model.kernels.ssd import conv_silu, ssd_scan
from model.layers import CausalConv, GatedRMSNorm, ResidualProjection, at_least_fp32
from model.mixers.contract import Mixer, island, projected
from model.mixers.scan import block_size, carry_states, document_changes, from_chunks, into_chunks
from model.spec import Mamba2Spec, ModelSpec


def ssd_recurrence(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, layout: Layout, initial: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_(t-1) + x_t B_t^T, y_t = S_t C_t, token by token.

    ``x`` (B, T, H, P) is dt_t x_t; ``log_decay`` (B, T, H); ``b`` and ``c`` (B, T, G, N); ``initial`` (B, H, P, N) or
    zeros. Returns y (B, T, H, P) and the state after the last token.
    """
    batch, time, heads, width = x.shape
    b, c = (part.repeat_interleave(heads // part.shape[2], 2) for part in (b, c))  # (B, T, H, N)
    state = x.new_zeros(batch, heads, width, b.shape[-1]) if initial is None else initial.to(x.dtype)
    outputs = []
    for t, starts in enumerate(document_changes(layout.doc_ids, time)):
        if starts is not None:
            state = torch.where(starts[:, None, None, None], 0.0, state)
        state = log_decay[:, t].exp()[..., None, None] * state + x[:, t, :, :, None] * b[:, t, :, None, :]
        outputs.append((state @ c[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, 1), state


def ssd_chunked(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, layout: Layout, initial: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """What ``ssd_recurrence`` gives, by matrix products within chunks and a short loop over chunks (section 6).

    Exact to rounding at any decay: every exponent is a sum of log decays over the stretch itself (``_decays``).
    """
    time = x.shape[1]
    size = block_size(time, chunk_size)
    masks = layout.chunk_masks(size)
    x, log_decay, b, c = (into_chunks(part, size) for part in (x, log_decay, b, c))
    decay, since_start, until_end = _decays(log_decay)
    from_start, to_end, through = since_start.exp(), until_end.exp(), since_start[..., -1:, None].exp()
    scores = c @ b.transpose(-1, -2)  # (B, C, G, Q, Q)
    if masks is not None:
        scores = scores * masks.pairs[:, :, None]
        from_start = from_start * masks.head[:, :, None]
        to_end = to_end * masks.tail[:, :, None]
        through = through * masks.through[:, :, None, None, None]

    # 1. Within a chunk: the masked product of C, B and the decay between each pair.
    weights = _by_group(decay, b.shape[2]) * scores[:, :, :, None]
    y = weights.flatten(2, 3) @ x

    # 2. What each chunk adds to the state.
    weighted = _by_group(x * to_end[..., None], b.shape[2])  # (B, C, G, H/G, Q, P)
    added = (weighted.transpose(-1, -2) @ b[:, :, :, None]).flatten(2, 3)  # (B, C, H, P, N)

    # 3. From chunk to chunk.
    before, state = carry_states(added, through, initial)

    # 4. What the state before a chunk gives to its tokens.
    carried = c[:, :, :, None] @ _by_group(before, b.shape[2]).transpose(-1, -2)  # (B, C, G, H/G, Q, P)
    y = y + carried.flatten(2, 3) * from_start[..., None]
    return from_chunks(y, time), state


def ssd_step(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of ``ssd_recurrence``: ``x`` (B, 1, H, P), ``log_decay`` (B, 1, H), ``b`` and ``c`` (B, 1, G, N)."""
    heads, groups = x.shape[2], b.shape[2]
    b, c = (part.squeeze(1).repeat_interleave(heads // groups, 1) for part in (b, c))  # (B, H, N)
    decay = log_decay.squeeze(1).exp()[..., None, None]
    state = torch.addcmul(decay * state.to(x.dtype), x.squeeze(1)[..., None], b[..., None, :])
    return (state @ c[..., None]).squeeze(-1)[:, None], state


class Mamba2(Mixer):
    """The Mamba-2 layer; parameters are named and ordered (z, x, B, C, dt) as in transformers' Granite hybrid.

    Kernels take every call without a state, and leave both projections to their layers, so that adapters, quantised
    weights and ZeRO's hooks meet them as ever. ``triton`` is our own: one operator for all that lies between them.
    ``mamba_ssm`` does convolution with SiLU, then the scan with D in it, then comes our norm. It takes decays as
    differences of fp32 running sums over a chunk, so what a chunk held before can show in the last bit of bf16.
    """

    initialisers: ClassVar = {"A_log": init.log_decay, "dt_bias": init.step_bias, "D": init.ones}
    backends: ClassVar = {"torch": ssd_chunked, "reference": ssd_recurrence}
    kernels: ClassVar = ("triton", "mamba_ssm")

    def __init__(self, spec: Mamba2Spec, model: ModelSpec) -> None:
        super().__init__(spec, model)
        self.d_inner = spec.expand * model.d_model
        self.n_heads = self.d_inner // spec.head_dim
        self.d_groups = spec.n_groups * spec.d_state
        self.in_proj = nn.Linear(model.d_model, 2 * self.d_inner + 2 * self.d_groups + self.n_heads, bias=False)
        self.conv1d = CausalConv(self.d_inner + 2 * self.d_groups, spec.d_conv)
        self.A_log = island(self.n_heads)
        self.dt_bias = island(self.n_heads)
        self.D = island(self.n_heads)
        self.norm = GatedRMSNorm(self.d_inner, spec.n_groups, model.norm_eps)
        self.out_proj = ResidualProjection(self.d_inner, model.d_model)

    def new_state(self) -> RecurrentState:
        """Empty convolution and state-space memory."""
        return RecurrentState()

    def forward(self, x: Tensor, layout: Layout, state: MixerState | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        assert state is None or isinstance(state, RecurrentState)
        zxbcdt = self.in_proj(x)
        if state is None and self.takes("triton", zxbcdt):
            return self.out_proj(self._by_our_kernels(zxbcdt, layout))
        z, xbc, dt = zxbcdt.split([self.d_inner, self.d_inner + 2 * self.d_groups, self.n_heads], -1)
        if state is None and self.takes("mamba_ssm", xbc):
            return self.out_proj(self.norm(self._by_kernels(xbc, dt, layout).flatten(2), z))
        xbc, conv = self.conv1d(xbc, layout, None if state is None else state.conv)
        with torch.autocast(x.device.type, enabled=False):
            y, mixer_state = self._mix(functional.silu(xbc), dt, layout, None if state is None else state.mixer_state)
        if state is not None:
            state.conv, state.mixer_state = conv.detach(), mixer_state.detach()
        return self.out_proj(self.norm(y.flatten(2), z))

    def prepare(self, x: Tensor, layout: Layout) -> None:
        """The documents' numbers, or the torch core's masks."""
        given = projected(x, self.in_proj.weight)
        if any(self.takes(kernel, given) for kernel in self.kernels):
            document_numbers(layout)
        elif self.backend != "reference":
            layout.chunk_masks(block_size(x.shape[1], self.spec.chunk_size))
            for shift in range(1, self.spec.d_conv):
                layout.same_document(shift)

    def _by_our_kernels(self, zxbcdt: Tensor, layout: Layout) -> Tensor:
        """The rows before the output projection, (B, T, d_inner)."""
        spec, seq_idx = self.spec, document_numbers(layout)
        with torch.autocast(zxbcdt.device.type, enabled=False):
            vectors = (self.dt_bias.float(), -self.A_log.float().exp(), self.D.float())
            sizes = (spec.head_dim, spec.d_state, spec.n_groups, self.norm.eps)

            # Norm and convolution both hand their weights on from within their own calls.
            def convolved(joined: Tensor, norm_weight: Tensor) -> Tensor:
                def core(joined: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                    given = (joined, weight, bias, *vectors, norm_weight, seq_idx, layout.valid)
                    return mamba2_core(*given, *sizes)[0]

                return self.conv1d(joined, layout, kernel=core)[0]

            return self.norm(zxbcdt, kernel=convolved)

    def _by_kernels(self, xbc: Tensor, dt: Tensor, layout: Layout) -> Tensor:
        """What convolution, SiLU and ``_mix`` give from no state, in half precision with fp32 states: (B, T, H, P)."""
        seq_idx = document_numbers(layout)
        with torch.autocast(xbc.device.type, enabled=False):
            if layout.valid is not None:
                xbc = xbc * layout.valid[:, :, None].to(xbc.dtype)
            xbc, _ = self.conv1d(xbc, layout, kernel=lambda *parts: conv_silu(*parts, seq_idx))
            x, b, c = self._heads(xbc)
            rate = -self.A_log.float().exp()
            return ssd_scan(x, self._steps(dt, layout), rate, b, c, self.D.float(), seq_idx, self.spec.chunk_size)

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, H, P), B and C (B, T, G, N)."""
        spec = self.spec
        x, b, c = xbc.split([self.d_inner, self.d_groups, self.d_groups], -1)
        b, c = (part.unflatten(-1, (spec.n_groups, spec.d_state)) for part in (b, c))
        return x.unflatten(-1, (self.n_heads, spec.head_dim)), b, c

    def _steps(self, dt: Tensor, layout: Layout) -> Tensor:
        """Step sizes (B, T, H) in fp32."""
        step = functional.softplus(at_least_fp32(dt) + self.dt_bias)
        # A step of zero neither decays the state nor adds to it: padding leaves no trace.
        return step if layout.valid is None else step * layout.valid[:, :, None]

    def _mix(self, xbc: Tensor, dt: Tensor, layout: Layout, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """The state-space recurrence in fp32: (B, T, H, P) and the last state."""
        x, b, c = self._heads(at_least_fp32(xbc))
        step = self._steps(dt, layout)
        log_decay = -self.A_log.exp() * step
        scaled = x * step[..., None]
        if x.shape[1] == 1 and initial is not None:
            y, state = ssd_step(scaled, log_decay, b, c, initial)
        else:
            y, state = self.core(scaled, log_decay, b, c, layout, initial, self.spec.chunk_size)
        return y + self.D[:, None] * x, state


def _decays(log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decay (..., Q, Q) from each token of a chunk to each later one, one on the diagonal and zero above it.

    Written as the difference of two running sums, a weak decay after a strong one keeps only the digits that the strong
    one left. Blocks are therefore joined two by two, as in ``gla._scores``: what decays from the left block to the
    right one is the product of the decay until their border and since it. Both are sums over the stretch itself, so
    nothing cancels, no exponent is above zero, and no pair of one document feels what another holds. Also returns the
    sums (..., Q) of ``log_decay`` (..., Q) since the chunk's start, and after each token until its end.
    """
    decay = torch.ones_like(log_decay)[..., None, None]  # (..., Q, 1, 1): blocks of one token
    since = log_decay[..., None]  # (..., Q, 1): sum from the block's first token to this one, both included
    until = torch.zeros_like(since)  # sum from the token after this one to the block's last
    while decay.shape[-3] > 1:
        (since_left, since_right), (until_left, until_right) = (
            part.unflatten(-2, (-1, 2)).unbind(-2) for part in (since, until)
        )
        left, right = decay.unflatten(-3, (-1, 2)).unbind(-3)
        lower = since_right.exp()[..., None] * until_left.exp()[..., None, :]
        decay = torch.cat([functional.pad(left, (0, left.shape[-1])), torch.cat([lower, right], -1)], -2)
        since = torch.cat([since_left, since_right + since_left[..., -1:]], -1)
        until = torch.cat([until_left + since_right[..., -1:], until_right], -1)
    return decay.squeeze(-3), since.squeeze(-2), until.squeeze(-2)


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    return tensor.unflatten(2, (groups, -1))
