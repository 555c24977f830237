"""What a model is, as plain validated data: dimensions, mixers, and the pattern of its layers. No torch here.

A recipe's ``model`` section and ``HybridConfig`` both validate through ``ModelSpec``, so one definition serves
training, rollouts, cost arithmetic and export.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_LAYERS = 512
OPERATIONAL: dict[str, Any] = {"operational": True}
"""Marks a field that says how to compute and never what: it is no part of a stage's key."""


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Mamba2Spec(Section):
    """Mamba-2, the state-space dual layer (Dao and Gu 2024, arXiv:2405.21060)."""

    mixer: Literal["mamba2"]
    """Mamba-2."""
    d_state: int = Field(128, ge=1, le=512)
    """N, the state size of one head's channel."""
    head_dim: int = Field(64, ge=1, le=256)
    """P, channels a head; heads = expand * d_model / head_dim."""
    expand: int = Field(2, ge=1, le=8)
    """d_inner / d_model."""
    d_conv: int = Field(4, ge=2, le=8)
    """Taps of the causal depthwise convolution."""
    n_groups: int = Field(1, ge=1)
    """Groups that share B and C; also the groups of the gated norm."""
    chunk_size: int = Field(128, ge=1, le=1024, json_schema_extra=OPERATIONAL)
    """Tokens a chunk of the chunked scan, a power of two or the one below: speed and memory, never the result."""
    backend: Literal["auto", "torch"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Kernel family; ``torch`` is the only one so far, and what ``auto`` means."""


class GLASpec(Section):
    """Gated linear attention with a vector gate a key channel (Yang et al. 2023, arXiv:2312.06635)."""

    mixer: Literal["gla"]
    """Gated linear attention."""
    n_heads: int = Field(ge=1)
    """Heads, each with a state of head_k_dim by head_v_dim."""
    head_k_dim: int = Field(128, ge=1, le=512)
    """Key and query channels a head."""
    head_v_dim: int = Field(128, ge=1, le=512)
    """Value channels a head."""
    gate_rank: int | None = Field(None, ge=1)
    """Rank of the decay gate's projection; none means full rank."""
    gate_normalizer: float = Field(16.0, gt=0)
    """tau: log decay = logsigmoid(gate) / tau (equation 4 of the paper, section 4.4)."""
    chunk_size: int = Field(64, ge=1, le=1024, json_schema_extra=OPERATIONAL)
    """Tokens a chunk of the chunked form, a power of two or the one below: speed and memory, never the result."""
    backend: Literal["auto", "torch"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Kernel family; ``torch`` is the only one so far, and what ``auto`` means."""


class AttentionSpec(Section):
    """Grouped-query softmax attention with rotary positions, optionally gated, windowed, with global tokens."""

    mixer: Literal["attention"]
    """Softmax attention."""
    n_heads: int = Field(ge=1)
    """Query heads."""
    n_kv_heads: int = Field(ge=1)
    """Key and value heads; a divisor of n_heads."""
    head_dim: int = Field(128, ge=2, le=512)
    """Channels a head; even, for the rotation."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies (Su et al. 2021)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys a head before the rotation."""
    output_gate: bool = False
    """Multiply the heads' output by sigmoid(W x) before the output projection."""
    window: int | None = Field(None, ge=1)
    """Sliding window: a query sees itself and the window - 1 tokens before it; none means all."""
    global_tokens: int = Field(0, ge=0)
    """The first tokens of each document, which every later query sees beside its window."""
    backend: Literal["auto", "torch"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Kernel family; ``torch`` (SDPA) is the only one so far, and what ``auto`` means."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> AttentionSpec:
        faults = []
        if self.n_heads % self.n_kv_heads:
            faults.append(
                f"n_kv_heads must divide n_heads; got {self.n_kv_heads} and {self.n_heads}; "
                f"set n_kv_heads to one of {_divisors(self.n_heads)}"
            )
        if self.head_dim % 2:
            faults.append(f"head_dim must be even for rotary positions; got {self.head_dim}; set {self.head_dim + 1}")
        if self.global_tokens and self.window is None:
            faults.append(
                f"global_tokens needs a window; got global_tokens {self.global_tokens} and no window; "
                "set window, or global_tokens to 0"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self


MixerSpec = Annotated[Mamba2Spec | GLASpec | AttentionSpec, Field(discriminator="mixer")]


class ModelSpec(Section):
    """A hybrid language model: embedding, pre-norm blocks (mixer, then SwiGLU), final norm, head."""

    d_model: int = Field(ge=8, le=65536)
    """D, width of the residual stream."""
    d_ff: int = Field(ge=8, le=1048576)
    """Inner width of every block's SwiGLU."""
    vocab_size: int = Field(ge=8, le=4_194_304)
    """Rows of the embedding; at least the tokenizer's size."""
    max_seq_len: int = Field(ge=8, le=16_777_216)
    """Longest sequence in tokens that the model is meant for."""
    layers: str | list[str]
    """Pattern such as ``(3*mamba2 1*gated)*6`` over the words of ``mixers``, or a list of words, first layer first."""
    mixers: dict[str, MixerSpec]
    """The words of the pattern: a name of your own for each configured mixer."""
    tie_embeddings: bool = True
    """Whether the head is the embedding's transpose."""
    norm_eps: float = Field(1e-5, gt=0, lt=1)
    """Added to the mean square in every RMSNorm."""
    initializer_range: float = Field(0.02, gt=0, lt=1)
    """Standard deviation of the initial linear and embedding weights."""

    @model_validator(mode="before")
    @classmethod
    def _words_are_names(cls, data: Any) -> Any:
        mixers = data.get("mixers") if isinstance(data, Mapping) else None
        bad = [word for word in mixers or {} if not re.fullmatch(r"[A-Za-z_]\w*", str(word))]
        if bad:
            raise ValueError(f"mixers must be named by plain words; got {bad}; use letters, digits and underscores")
        return data

    @model_validator(mode="after")
    def _layers_fit(self) -> ModelSpec:
        faults = []
        words = self.layer_words
        unknown = sorted(set(words) - set(self.mixers))
        if unknown:
            faults.append(
                f"layers uses {unknown}, which mixers does not define; define them or use one of {sorted(self.mixers)}"
            )
        for word in sorted(set(self.mixers) - set(words)):
            faults.append(f"mixers.{word} is defined but layers never uses it; remove it or use it")
        for word, mixer in self.mixers.items():
            if isinstance(mixer, Mamba2Spec):
                faults.extend(f"mixers.{word}.{fault}" for fault in _mamba2_faults(mixer, self.d_model))
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def layer_words(self) -> list[str]:
        """One word a layer, first layer first."""
        return expand_pattern(self.layers) if isinstance(self.layers, str) else list(self.layers)

    @property
    def layer_mixers(self) -> list[Mamba2Spec | GLASpec | AttentionSpec]:
        """One mixer's spec a layer, first layer first."""
        return [self.mixers[word] for word in self.layer_words]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layer_words)


def expand_pattern(pattern: str) -> list[str]:
    """The words that a layer pattern stands for.

    ``"(2*a 1*b)*2"`` gives ``["a", "a", "b", "a", "a", "b"]``. Counts may stand on either side of ``*``.

    Raises:
        ValueError: if the pattern does not parse, is empty, or has more than ``MAX_LAYERS`` layers.
    """
    tokens = re.findall(r"\d+|[A-Za-z_]\w*|[()*]|\S", pattern)
    if tokens.count("(") > MAX_LAYERS // 4:
        raise ValueError(f"layers must have at most {MAX_LAYERS // 4} brackets; got {tokens.count('(')}; write fewer")
    words, rest = _sequence(tokens, pattern)
    if rest:
        raise ValueError(f"layers: unexpected {rest[0]!r} in {pattern!r}; write for example '(3*mamba2 1*attention)*6'")
    if not words:
        raise ValueError(f"layers must name at least one layer; got {pattern!r}")
    return words


def _sequence(tokens: list[str], pattern: str) -> tuple[list[str], list[str]]:
    words: list[str] = []
    while tokens and tokens[0] != ")":
        count = 1
        if tokens[0].isdigit():
            count, tokens = _count(tokens, pattern)
        head, *tokens = tokens or [""]
        if head == "(":
            group, tokens = _sequence(tokens, pattern)
            if not tokens:
                raise ValueError(f"layers: a bracket is never closed in {pattern!r}")
            tokens = tokens[1:]
        elif re.fullmatch(r"[A-Za-z_]\w*", head):
            group = [head]
        else:
            raise ValueError(f"layers: expected a mixer's name or '(' but got {head!r} in {pattern!r}")
        if tokens[:1] == ["*"]:
            if not tokens[1:2] or not tokens[1].isdigit():
                raise ValueError(f"layers: expected a count after '*' in {pattern!r}")
            count, tokens = count * int(tokens[1]), tokens[2:]
        if count < 1 or len(words) + len(group) * count > MAX_LAYERS:
            raise ValueError(f"layers must give 1 to {MAX_LAYERS} layers; got more, or a count of 0, in {pattern!r}")
        words += group * count
    return words, tokens


def _count(tokens: list[str], pattern: str) -> tuple[int, list[str]]:
    if tokens[1:2] != ["*"]:
        raise ValueError(f"layers: expected '*' after the count {tokens[0]} in {pattern!r}")
    return int(tokens[0]), tokens[2:]


def _mamba2_faults(mixer: Mamba2Spec, d_model: int) -> list[str]:
    d_inner = mixer.expand * d_model
    if d_inner % mixer.head_dim:
        return [
            f"head_dim must divide expand * d_model = {d_inner}; got {mixer.head_dim}; "
            f"set one of {[d for d in _divisors(d_inner) if d <= 256]}"
        ]
    n_heads = d_inner // mixer.head_dim
    if n_heads % mixer.n_groups:
        return [f"n_groups must divide the {n_heads} heads; got {mixer.n_groups}; set one of {_divisors(n_heads)}"]
    return []


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
