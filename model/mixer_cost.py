"""What one layer's mixer costs: parameters, FLOPs, bytes. One class and one line of ``MIXER_COSTS`` a mixer; no torch.

Legend: T tokens in the sequence, D d_model, H heads, P head_dim (Mamba-2) or value channels (GLA), K key channels,
N d_state, G groups, Q chunk_size, C convolution channels. A multiply-add counts as two FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from model.kernels.limits import HOPPER, KERNELS, limit_faults
from model.spec import AttentionSpec, GLASpec, Mamba2Spec

FP32_BYTES = 4
BF16_BYTES = 2
PREFERRED = {
    "mamba2": ("triton", "mamba_ssm"),
    "gla": ("triton", "fla"),
    "attention": ("varlen", "flex", "sdpa_cudnn"),
}
"""Kernels by mixer, those that ``auto`` prefers first; of attention's, those that take packed rows."""
GLA_CHUNK = 64
"""Tokens a chunk of GLA's kernels."""
GLA_BLOCK = 1
"""Tokens a block at the diagonal of GLA's scores: the halving goes down to single tokens."""


Kept = Callable[..., int]
"""``kept(inputs, *outputs)``: bytes a token that projections of one input to so many outputs keep of it."""


class MixerCost(Protocol):
    """The arithmetic that every mixer must give; ``mixer`` is its spec, ``d_model`` the model's width."""

    def projections(self, mixer: Any, d_model: int) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear projection by its name in the mixer; what autocast runs as products."""

    def other_parameters(self, mixer: Any, d_model: int) -> int:
        """Convolution, norms, biases, decays: everything that is not a projection's weight."""

    def sequence_flops(self, mixer: Any, d_model: int, seq_len: int) -> float:
        """Forward FLOPs a token beyond the projections, averaged over a document of ``seq_len`` tokens."""

    def state_bytes(self, mixer: Any, d_model: int, dtype_bytes: int) -> int:
        """Bytes of one sequence's decoding state that do not grow with its length."""

    def cache_tokens(self, mixer: Any, seq_len: int) -> int:
        """Tokens whose keys and values stay in the cache after ``seq_len`` tokens."""

    def saved_bytes(self, mixer: Any, d_model: int, seq_len: int, dtype_bytes: int) -> float:
        """Bytes a token that the PyTorch path keeps for backward in packed rows of ``seq_len`` tokens; projections give
        ``dtype_bytes`` an element, the rest is fp32.
        """

    def kernel_saved_bytes(self, mixer: Any, d_model: int, packed: bool, kept: Kept) -> float:
        """Bytes a token that a compiled block keeps for backward where kernels run, in bf16; ``kept`` gives those of
        projections' inputs. Norms keep what they read and a scale; what stands between is computed again.
        """


class Mamba2Cost:
    """Mamba-2: x, z, B, C, dt from one projection, causal convolution over x, B, C, SSD, gated norm, projection."""

    def sizes(self, mixer: Mamba2Spec, d_model: int) -> tuple[int, int, int]:
        """``(d_inner, heads, convolution channels)``."""
        d_inner = mixer.expand * d_model
        return d_inner, d_inner // mixer.head_dim, d_inner + 2 * mixer.n_groups * mixer.d_state

    def projections(self, mixer: Mamba2Spec, d_model: int) -> dict[str, tuple[int, int]]:
        """z, x, B, C and dt in, ``d_inner`` out."""
        d_inner, heads, channels = self.sizes(mixer, d_model)
        return {"in_proj": (d_model, d_inner + channels + heads), "out_proj": (d_inner, d_model)}

    def other_parameters(self, mixer: Mamba2Spec, d_model: int) -> int:
        """Convolution ``C (taps + 1)``, gated norm ``d_inner``, and A_log, D, dt_bias a head."""
        d_inner, heads, channels = self.sizes(mixer, d_model)
        return channels * (mixer.d_conv + 1) + d_inner + 3 * heads

    def sequence_flops(self, mixer: Mamba2Spec, d_model: int, seq_len: int) -> float:
        """The chunked form (Dao and Gu 2024, section 6), a token: C B^T against its whole chunk, ``2 Q N`` a group;
        the masked scores times x, ``2 Q P`` a head; writing the chunk's state and reading the last, ``4 N P`` a head;
        ``2 taps`` a channel of the convolution. Whole Q x Q blocks are computed, so the masked half counts.
        """
        _, heads, channels = self.sizes(mixer, d_model)
        chunk = block_size(mixer.chunk_size, seq_len)
        scores = 2 * chunk * mixer.d_state * mixer.n_groups
        values = 2 * chunk * mixer.head_dim * heads
        states = 4 * mixer.d_state * mixer.head_dim * heads
        scan = (scores + values + states) * padded_share(seq_len, chunk)
        return scan + 2.0 * mixer.d_conv * channels

    def state_bytes(self, mixer: Mamba2Spec, d_model: int, dtype_bytes: int) -> int:
        """``H P N`` in fp32 (TRAPS K6), and the last ``taps - 1`` inputs of the convolution in the model's dtype."""
        _, heads, channels = self.sizes(mixer, d_model)
        return heads * mixer.head_dim * mixer.d_state * FP32_BYTES + channels * (mixer.d_conv - 1) * dtype_bytes

    def cache_tokens(self, mixer: Mamba2Spec, seq_len: int) -> int:
        """None."""
        return 0

    def saved_bytes(self, mixer: Mamba2Spec, d_model: int, seq_len: int, dtype_bytes: int) -> float:
        """In the projections' dtype: their inputs, z x B C dt, the convolution's input and output. In fp32: x B C and
        the gated norm's six; per head the decay and weights of each pair of a chunk, B and C; two states a chunk.
        """
        d_inner, heads, channels = self.sizes(mixer, d_model)
        states, chunk = 2 * heads * mixer.d_state, block_size(mixer.chunk_size, seq_len)
        cast = input_elements(d_model, 1, dtype_bytes) + 2 * d_inner + heads + 3 * channels
        pairs = 2 * heads * chunk + mixer.n_groups * chunk
        wide = channels + 9 * d_inner + 4 * heads + states + states * mixer.head_dim / chunk
        return dtype_bytes * cast + FP32_BYTES * (pairs + wide) + chunk

    def kernel_saved_bytes(self, mixer: Mamba2Spec, d_model: int, packed: bool, kept: Kept) -> float:
        """What in_proj gives, and y; the gated norm's scales and result. ``mamba_ssm`` also keeps what its convolution
        gives, and the steps, which our own kernels compute again.
        """
        d_inner, heads, channels = self.sizes(mixer, d_model)
        joined = d_inner + channels + heads
        own = BF16_BYTES * (joined + d_inner) + FP32_BYTES * mixer.n_groups
        if kernel_of(mixer) != "triton":
            own += BF16_BYTES * channels + FP32_BYTES * heads
        return kept(d_model, joined) + own + kept(d_inner, d_model)


class GLACost:
    """Gated linear attention: q, k, v, decay gate, output gate, normalised a head, output projection."""

    def projections(self, mixer: GLASpec, d_model: int) -> dict[str, tuple[int, int]]:
        """Queries, keys and decay gate ``H K`` wide, values and output gate ``H P`` wide, output ``H P`` to D."""
        key, value, rank = mixer.n_heads * mixer.head_k_dim, mixer.n_heads * mixer.head_v_dim, mixer.gate_rank
        gate = {"gk_proj": (d_model, key)}
        if rank is not None:
            gate = {"gk_proj.0": (d_model, rank), "gk_proj.1": (rank, key)}
        queries = {"q_proj": (d_model, key), "k_proj": (d_model, key), "v_proj": (d_model, value)}
        return {**queries, **gate, "g_proj": (d_model, value), "o_proj": (value, d_model)}

    def other_parameters(self, mixer: GLASpec, d_model: int) -> int:
        """The decay gate's bias, and the head norm's weight, shared by the heads."""
        return mixer.n_heads * mixer.head_k_dim + mixer.head_v_dim

    def sequence_flops(self, mixer: GLASpec, d_model: int, seq_len: int) -> float:
        """The chunked form (Yang et al. 2023, section 4), a token and head: scores times values ``2 Q P``, writing the
        chunk's state and reading the last ``4 K P``, and scores ``2 K`` a key. Halving the chunk down to blocks of s
        tokens leaves ``s + (Q - s) / 2`` keys of its Q to a query: the causal half, and whole blocks at the diagonal.
        """
        chunk = block_size(mixer.chunk_size, seq_len)
        block = min(GLA_BLOCK, chunk)
        scores = 2 * mixer.head_k_dim * (block + (chunk - block) / 2)
        values = 2 * chunk * mixer.head_v_dim
        states = 4 * mixer.head_k_dim * mixer.head_v_dim
        return mixer.n_heads * (scores + values + states) * padded_share(seq_len, chunk)

    def state_bytes(self, mixer: GLASpec, d_model: int, dtype_bytes: int) -> int:
        """``H K P`` in fp32 (TRAPS K6)."""
        return mixer.n_heads * mixer.head_k_dim * mixer.head_v_dim * FP32_BYTES

    def cache_tokens(self, mixer: GLASpec, seq_len: int) -> int:
        """None."""
        return 0

    def saved_bytes(self, mixer: GLASpec, d_model: int, seq_len: int, dtype_bytes: int) -> float:
        """In the projections' dtype: their inputs, the output gate before and after its swish. In fp32: q, k, gates and
        their products with decays, a set a level of halving and a pair at the diagonal; scores; two states a chunk.
        """
        key, value = mixer.n_heads * mixer.head_k_dim, mixer.n_heads * mixer.head_v_dim
        chunk = block_size(mixer.chunk_size, seq_len)
        block = min(GLA_BLOCK, chunk)
        levels = (chunk // block).bit_length() - 1
        cast = input_elements(d_model, 5, dtype_bytes) + 3 * value + (mixer.gate_rank or 0)
        keys = (11 + 2 * block + 2 * levels) * key
        wide = keys + 4 * value + mixer.n_heads * (1 + chunk) + 2 * key * mixer.head_v_dim / chunk
        return dtype_bytes * cast + FP32_BYTES * wide

    def kernel_saved_bytes(self, mixer: GLASpec, d_model: int, packed: bool, kept: Kept) -> float:
        """q, k, v, both gates, o and its norm's scales; in fp32 the sums of log decays; scores within chunks, which
        ``fla`` keeps in fp32 and our own kernels in bf16.
        """
        key, value = mixer.n_heads * mixer.head_k_dim, mixer.n_heads * mixer.head_v_dim
        gate = mixer.gate_rank or key
        inputs = kept(d_model, key, value, gate) + kept(value, d_model)
        rank = kept(mixer.gate_rank, key) if mixer.gate_rank else 0
        scores = GLA_CHUNK * mixer.n_heads * (BF16_BYTES if kernel_of(mixer) == "triton" else FP32_BYTES)
        return inputs + rank + BF16_BYTES * (3 * key + 3 * value) + FP32_BYTES * (key + mixer.n_heads) + scores


class AttentionCost:
    """Softmax attention with grouped keys and values."""

    def projections(self, mixer: AttentionSpec, d_model: int) -> dict[str, tuple[int, int]]:
        """Queries and output, ``H P`` wide, keys and values, and an output gate as wide as the queries if any."""
        queries, keys = mixer.n_heads * mixer.head_dim, mixer.n_kv_heads * mixer.head_dim
        gate = {"g_proj": (d_model, queries)} if mixer.output_gate else {}
        pairs = {"q_proj": (d_model, queries), "k_proj": (d_model, keys), "v_proj": (d_model, keys)}
        return {**pairs, "o_proj": (queries, d_model), **gate}

    def other_parameters(self, mixer: AttentionSpec, d_model: int) -> int:
        """The norms of queries and keys, one weight of ``head_dim`` each, if any."""
        return 2 * mixer.head_dim if mixer.qk_norm else 0

    def sequence_flops(self, mixer: AttentionSpec, d_model: int, seq_len: int) -> float:
        """``4 P`` a head and visible key (scores, then values), for the mean number of keys that a query sees: only
        pairs inside the causal window or the global tokens count, as a kernel that skips the rest would compute.
        """
        return 4.0 * mixer.n_heads * mixer.head_dim * visible_pairs(mixer, seq_len) / seq_len

    def state_bytes(self, mixer: AttentionSpec, d_model: int, dtype_bytes: int) -> int:
        """None: attention keeps tokens, see ``cache_tokens``."""
        return 0

    def cache_tokens(self, mixer: AttentionSpec, seq_len: int) -> int:
        """All of them, or at most the window and the global tokens."""
        return seq_len if mixer.window is None else min(seq_len, mixer.window + mixer.global_tokens)

    def saved_bytes(self, mixer: AttentionSpec, d_model: int, seq_len: int, dtype_bytes: int) -> float:
        """Inputs of the projections, q, k, v, output, softmax sums, and the mask of packed rows as the kernel wants it;
        an output gate and its product, or the two fp32 inputs of each norm, where there are any.
        """
        queries, keys = mixer.n_heads * mixer.head_dim, mixer.n_kv_heads * mixer.head_dim
        inputs = input_elements(d_model, 4 if mixer.output_gate else 3, dtype_bytes)
        cast = inputs + 2 * queries + 2 * keys + seq_len + (2 * queries if mixer.output_gate else 0)
        normed = 2 * (queries + keys) + mixer.n_heads + mixer.n_kv_heads if mixer.qk_norm else 0
        return dtype_bytes * cast + FP32_BYTES * (normed + mixer.n_heads)

    def kernel_saved_bytes(self, mixer: AttentionSpec, d_model: int, packed: bool, kept: Kept) -> float:
        """q, k, v after rotation (keys and values a query head each where rows are packed, unless ``flex`` runs), o and
        softmax sums; the projections of normalised queries and keys, and their scales; the gate and its product.
        """
        queries, keys = mixer.n_heads * mixer.head_dim, mixer.n_kv_heads * mixer.head_dim
        spread = packed and not mixer.global_tokens
        heads = mixer.n_heads + mixer.n_kv_heads
        own = BF16_BYTES * (2 * queries + 2 * (queries if spread else keys)) + FP32_BYTES * mixer.n_heads
        normed = BF16_BYTES * (queries + keys) + FP32_BYTES * heads if mixer.qk_norm else 0
        # Without a gate the output projection reads o itself.
        gate = BF16_BYTES * queries + kept(queries, d_model) if mixer.output_gate else 0
        return kept(d_model, queries, keys) + own + normed + gate


def kernel_of(mixer: Any) -> str | None:
    """The kernel that ``auto`` prefers for the mixer on Hopper, or the one that it names; None where none takes it."""
    names = PREFERRED[mixer.mixer] if mixer.backend == "auto" else (mixer.backend,)
    fitting = [name for name in names if name in KERNELS and not any(limit_faults(name, dict(mixer)))]
    return next((name for name in fitting if mixer.backend == name or HOPPER in KERNELS[name].capabilities), None)


def input_elements(d_model: int, projections: int, dtype_bytes: int) -> int:
    """Elements a token kept as input of ``projections``: autocast casts one copy for each, fp32 shares one."""
    return d_model * (1 if dtype_bytes == FP32_BYTES else projections)


def visible_pairs(mixer: AttentionSpec, seq_len: int) -> int:
    """Pairs (query, key) of one document of ``seq_len`` tokens, in which the query sees the key.

    Query t (from 0) sees ``min(t + 1, window)`` keys of its window, and the global tokens that lie before it.
    """
    if mixer.window is None or mixer.window >= seq_len:
        return seq_len * (seq_len + 1) // 2
    window = mixer.window
    inside = window * (window + 1) // 2 + (seq_len - window) * window
    tokens, steps = mixer.global_tokens, seq_len - window
    # Query t sees min(global, t + 1 - window) global tokens outside its window: 1, 2, ..., global, global, ...
    outside = steps * (steps + 1) // 2 if steps <= tokens else tokens * (tokens + 1) // 2 + (steps - tokens) * tokens
    return inside + outside


def padded_share(seq_len: int, chunk_size: int) -> float:
    """Tokens that whole chunks hold, over ``seq_len``."""
    return -(-seq_len // chunk_size) * chunk_size / seq_len


def block_size(chunk_size: int, seq_len: int) -> int:
    """Tokens a chunk, as computed: the largest power of two up to ``chunk_size``, or the one that holds a short row."""
    whole = 1 << (seq_len - 1).bit_length()
    return min(1 << (chunk_size.bit_length() - 1), whole)


MIXER_COSTS: dict[str, MixerCost] = {
    "mamba2": Mamba2Cost(),
    "gla": GLACost(),
    "attention": AttentionCost(),
}
