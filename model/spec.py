"""What a model is, as plain validated data: dimensions, mixers, and the pattern of its layers. No torch here.

A recipe's ``model`` section and ``HybridConfig`` both validate through ``ModelSpec``, so one definition serves
training, rollouts, cost arithmetic and export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from model.kernels.limits import limit_faults
from model.pattern import MAX_LAYERS, expand_pattern, is_word, read_pattern

UNFIT = "unfit"
"""Type of pydantic's error for fields that are well formed but do not fit together; its place is the field to set."""
MAX_WIDTH = 65536
MAX_TOKENS = 16_777_216
OPERATIONAL: dict[str, Any] = {"operational": True}
"""Marks a field that says how to compute and never what: it is no part of a stage's key."""


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Fields that are wrong by themselves and fields that do not fit together, in one error."""
        unfit = list(cls.unfit(data)) if isinstance(data, Mapping) else []
        try:
            section = handler(data)
        except ValidationError as error:
            raise _with_unfit(error, unfit) from None
        if unfit:
            raise _with_unfit(ValidationError.from_exception_data(cls.__name__, []), unfit)
        return section

    @classmethod
    def unfit(cls, data: Mapping[str, Any]) -> Iterator[Unfit]:
        """What does not fit together in unvalidated ``data``; a field that is wrong by itself takes no part."""
        yield from ()


Place = tuple[str | int, ...]
Unfit = tuple[Place, str, Any]
"""A field's place below its section, what is wrong with it and how to mend it, and its value."""


def _with_unfit(error: ValidationError, unfit: list[Unfit]) -> ValidationError:
    found = [_again(item) for item in error.errors(include_url=False)]
    for place, message, value in unfit:
        kind = PydanticCustomError(UNFIT, "{message}", {"message": message})
        found.append(InitErrorDetails(type=kind, loc=place, input=value))
    return ValidationError.from_exception_data(error.title, found)


def _again(item: Any) -> InitErrorDetails:
    context = item.get("ctx", {})
    kind = PydanticCustomError(UNFIT, "{message}", context) if item["type"] == UNFIT else item["type"]
    return InitErrorDetails(type=kind, loc=item["loc"], input=item["input"], ctx=context)


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
    n_groups: int = Field(1, ge=1, le=MAX_WIDTH)
    """Groups that share B and C; also the groups of the gated norm."""
    chunk_size: int = Field(128, ge=1, le=1024, json_schema_extra=OPERATIONAL)
    """Tokens a chunk of the chunked scan, a power of two or the one below: speed and memory, never the result."""
    backend: Literal["auto", "torch", "mamba_ssm", "triton"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Kernel family; ``auto`` is the fastest that is installed and tested where the layer runs, ``torch`` on a CPU."""

    @classmethod
    def unfit(cls, data: Mapping[str, Any]) -> Iterator[Unfit]:
        """Sizes that the named backend does not take."""
        yield from _unfit_backend(cls, data)


class GLASpec(Section):
    """Gated linear attention with a vector gate a key channel (Yang et al. 2023, arXiv:2312.06635)."""

    mixer: Literal["gla"]
    """Gated linear attention."""
    n_heads: int = Field(ge=1, le=MAX_WIDTH)
    """Heads, each with a state of head_k_dim by head_v_dim."""
    head_k_dim: int = Field(128, ge=1, le=512)
    """Key and query channels a head."""
    head_v_dim: int = Field(128, ge=1, le=512)
    """Value channels a head."""
    gate_rank: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Rank of the decay gate's projection; none means full rank."""
    gate_normalizer: float = Field(16.0, gt=0, le=1e6)
    """tau: log decay = logsigmoid(gate) / tau (equation 4 of the paper, section 4.4)."""
    chunk_size: int = Field(64, ge=1, le=1024, json_schema_extra=OPERATIONAL)
    """Tokens a chunk of the chunked form, a power of two or the one below: speed and memory, never the result."""
    backend: Literal["auto", "torch", "fla", "triton"] = Field("auto", json_schema_extra=OPERATIONAL)
    """Kernel family; ``auto`` is the fastest that is installed and tested where the layer runs, ``torch`` on a CPU."""

    @classmethod
    def unfit(cls, data: Mapping[str, Any]) -> Iterator[Unfit]:
        """Sizes that the named backend does not take."""
        yield from _unfit_backend(cls, data)


class AttentionSpec(Section):
    """Grouped-query softmax attention with rotary positions, optionally gated, windowed, with global tokens."""

    mixer: Literal["attention"]
    """Softmax attention."""
    n_heads: int = Field(ge=1, le=MAX_WIDTH)
    """Query heads."""
    n_kv_heads: int = Field(ge=1, le=MAX_WIDTH)
    """Key and value heads; a divisor of n_heads."""
    head_dim: int = Field(128, ge=2, le=512)
    """Channels a head; even, for the rotation."""
    rope_theta: float = Field(10000.0, gt=0, le=1e12)
    """Base of the rotary frequencies (Su et al. 2021)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys a head before the rotation."""
    output_gate: bool = False
    """Multiply the heads' output by sigmoid(W x) before the output projection."""
    window: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Sliding window: a query sees itself and the window - 1 tokens before it; none means all."""
    global_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    """The first tokens of each document, which every later query sees beside its window."""
    backend: Literal["auto", "torch", "sdpa_cudnn", "varlen", "flex", "flash_attn"] = Field(
        "auto", json_schema_extra=OPERATIONAL
    )
    """Kernel family; ``auto`` is the fastest that is installed and tested where the layer runs, ``torch`` on a CPU."""

    @classmethod
    def unfit(cls, data: Mapping[str, Any]) -> Iterator[Unfit]:
        """Heads that do not divide, channels that do not pair, global tokens without a window, an unfit backend."""
        given = _well_formed(cls, data)
        n_heads, n_kv_heads, head_dim = (given.get(name) for name in ("n_heads", "n_kv_heads", "head_dim"))
        if n_heads and n_kv_heads and n_heads % n_kv_heads:
            message = f"must divide n_heads {n_heads}; got {n_kv_heads}; set one of {_divisors(n_heads)}"
            yield ("n_kv_heads",), message, n_kv_heads
        if head_dim and head_dim % 2:
            yield ("head_dim",), f"must be even for rotary positions; got {head_dim}; set {head_dim + 1}", head_dim
        if given.get("global_tokens") and data.get("window") is None:
            message = f"needs a window; got {given['global_tokens']} and no window; set window, or global_tokens to 0"
            yield ("global_tokens",), message, given["global_tokens"]
        yield from _unfit_backend(cls, data)


MixerSpec = Annotated[Mamba2Spec | GLASpec | AttentionSpec, Field(discriminator="mixer")]


class ModelSpec(Section):
    """A hybrid language model: embedding, pre-norm blocks (mixer, then SwiGLU), final norm, head."""

    d_model: int = Field(ge=8, le=MAX_WIDTH)
    """D, width of the residual stream."""
    d_ff: int = Field(ge=8, le=1048576)
    """Inner width of every block's SwiGLU."""
    vocab_size: int = Field(ge=8, le=4_194_304)
    """Rows of the embedding; at least the tokenizer's size."""
    max_seq_len: int = Field(ge=8, le=MAX_TOKENS)
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

    @classmethod
    def unfit(cls, data: Mapping[str, Any]) -> Iterator[Unfit]:
        """Layers that do not parse, words that are not defined or never used, widths that do not divide.

        Each is looked for whatever else is wrong.
        """
        given = _well_formed(cls, data, "d_model")
        mixers = data.get("mixers")
        mixers = {str(word): _plain(mixer) for word, mixer in mixers.items()} if isinstance(mixers, Mapping) else None
        yield from _unfit_words(data.get("layers"), mixers)
        for word, mixer in (mixers or {}).items():
            if not is_word(word):
                message = f"must be a word of letters, digits and underscores; got {word!r}; rename the mixer"
                yield ("mixers", word), message, word
            elif isinstance(mixer, Mapping) and mixer.get("mixer") == "mamba2" and "d_model" in given:
                for name, message, value in _unfit_mamba2(_well_formed(Mamba2Spec, mixer), given["d_model"]):
                    yield ("mixers", word, name), message, value

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


def _unfit_words(layers: Any, mixers: Mapping[str, Any] | None) -> Iterator[Unfit]:
    if isinstance(layers, str):
        words, faults = read_pattern(layers)
        yield from ((("layers",), fault, layers) for fault in faults)
        places: dict[str, Place] = dict.fromkeys(words, ("layers",))
    elif isinstance(layers, list | tuple):
        places = {
            word: ("layers", number) for number, word in reversed(list(enumerate(layers))) if isinstance(word, str)
        }
        if not layers or len(layers) > MAX_LAYERS:
            yield ("layers",), f"must list 1 to {MAX_LAYERS} layers; got {len(layers)}; list fewer, or some", layers
    else:
        return
    if mixers is None:
        return
    for word in sorted(set(places) - set(mixers)):
        there = f"use one of {', '.join(sorted(mixers))}" if mixers else "mixers is empty"
        yield places[word], f"must use words that mixers defines; got {word!r}; define it, or {there}", word
    for word in sorted(set(mixers) - set(places)):
        yield ("mixers", word), "must be used by layers; got none that names it; use it or remove it", word


def _unfit_mamba2(given: Mapping[str, Any], d_model: int) -> Iterator[tuple[str, str, Any]]:
    if "expand" not in given or "head_dim" not in given:
        return
    d_inner, head_dim, n_groups = given["expand"] * d_model, given["head_dim"], given.get("n_groups")
    if d_inner % head_dim:
        fitting = [divisor for divisor in _divisors(d_inner) if divisor <= 256]
        yield "head_dim", f"must divide expand * d_model = {d_inner}; got {head_dim}; set one of {fitting}", head_dim
    elif n_groups and (d_inner // head_dim) % n_groups:
        n_heads = d_inner // head_dim
        yield "n_groups", f"must divide the {n_heads} heads; got {n_groups}; set one of {_divisors(n_heads)}", n_groups


def _unfit_backend(section: type[Section], data: Mapping[str, Any]) -> Iterator[Unfit]:
    backend = data.get("backend", "auto")
    if isinstance(backend, str):
        for name, message, value in limit_faults(backend, _well_formed(section, data)):
            yield (name,), message, value


def _plain(mixer: Any) -> Any:
    return mixer.model_dump() if isinstance(mixer, BaseModel) else mixer


def _well_formed(section: type[Section], data: Mapping[str, Any], *names: str) -> dict[str, int]:
    """The whole numbers among a section's fields (or ``names`` of them) that lie in their bounds, defaults included."""
    found = {}
    for name in names or section.model_fields:
        field = section.model_fields[name]
        value = data.get(name, field.default)
        if type(value) is int and all(_allows(bound, value) for bound in field.metadata):
            found[name] = value
    return found


def _allows(bound: Any, value: int) -> bool:
    return not (value < getattr(bound, "ge", value) or value > getattr(bound, "le", value))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
