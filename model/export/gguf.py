"""A chimera-shaped model as one GGUF file that stock llama.cpp runs: architecture ``granitehybrid``.

Written tensor by tensor, so that memory holds one of them at a time. Shapes are numpy's; GGUF lists them backwards.
H heads, P head_dim, D d_model, C channels of the convolution, K taps, G groups.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from model.export.granite import granite_faults
from model.export.vocabulary import Vocabulary
from model.spec import AttentionSpec, Mamba2Spec, ModelSpec

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Precision = Literal["f32", "f16", "q8_0", "q4_0"]
BLOCK_VALUES = 32
"""Values that share one scale in Q8_0 and Q4_0; a row must be a multiple of it."""
ARCHITECTURE = "granitehybrid"

Read = Callable[[str], np.ndarray]
"""A parameter of ``HybridForCausalLM`` by its name, as float32."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: where it comes from, its shape, and how its values change on the way.

    ``matrix`` marks what is multiplied with activations and so takes the file's precision; the rest stays fp32.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    matrix: bool
    change: Callable[[np.ndarray], np.ndarray] | None = None


def gguf_faults(spec: ModelSpec, precision: Precision) -> list[str]:
    """Everything about ``spec`` that has no form in a GGUF file of that precision; empty where it has one."""
    faults = granite_faults(spec) + _llama_cpp_faults(spec)
    if faults or precision in ("f32", "f16"):
        return faults
    fields = {"d_model": (spec.d_model, "token_embd.weight"), "d_ff": (spec.d_ff, "ffn_down.weight")}
    return [
        f"{field} must be a multiple of {BLOCK_VALUES}, the block of {precision}, for the rows of {tensor}; "
        f"got {size}; set {math.ceil(size / BLOCK_VALUES) * BLOCK_VALUES}"
        for field, (size, tensor) in fields.items()
        if size % BLOCK_VALUES
    ]


def _llama_cpp_faults(spec: ModelSpec) -> list[str]:
    """What GraniteMoeHybrid can express and llama.cpp ends the whole process over."""
    faults = [
        f"mixers.{word}.expand must be 2, which llama.cpp takes for granted; got {mixer.expand}; set 2"
        for word, mixer in spec.mixers.items()
        if isinstance(mixer, Mamba2Spec) and mixer.expand != 2
    ]
    kinds = {mixer.mixer for mixer in spec.layer_mixers}
    if kinds <= {"mamba2", "attention"} and len(kinds) == 1:
        faults.append(f"layers must hold mamba2 and attention for llama.cpp; got {kinds.pop()} alone; add the other")
    return faults


def write_gguf(
    path: Path, spec: ModelSpec, read: Read, vocabulary: Vocabulary, precision: Precision, *, name: str
) -> None:
    """Write the model ``spec`` with the weights that ``read`` gives to ``path``.

    ``name`` goes into the file's metadata. In Q4_0 the embedding (and head) is Q8_0, as it is both read and multiplied.

    Raises:
        ValueError: naming every field of ``spec`` that has no form there, or a weight of another shape.
    """
    from gguf import GGUFWriter

    faults = gguf_faults(spec, precision)
    if faults:
        raise ValueError("; ".join(faults))
    writer = GGUFWriter(path, ARCHITECTURE)
    _add_model_facts(writer, spec, precision, name)
    _add_vocabulary(writer, vocabulary.padded(spec.vocab_size))
    with contextlib.closing(writer):
        _write_tensors(writer, _tensors(spec), read, precision)


def _write_tensors(writer: GGUFWriter, tensors: list[_Tensor], read: Read, precision: Precision) -> None:
    for tensor in tensors:
        kind = _kind(tensor, precision)
        writer.add_tensor_info(tensor.name, _stored_shape(tensor.shape, kind), *_stored_type(tensor.shape, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_stored(tensor, read, _kind(tensor, precision)))


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows (H P, D) of a query or key projection reordered from rotation pairs (i, i + P/2) to pairs (2i, 2i + 1)."""
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])  # (H, 2, P/2, D)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _tensors(spec: ModelSpec) -> list[_Tensor]:
    embedding = (spec.vocab_size, spec.d_model)
    found = [
        _Tensor("token_embd.weight", "model.embed_tokens.weight", embedding, True),
        _Tensor("output_norm.weight", "model.norm.weight", (spec.d_model,), False),
    ]
    if not spec.tie_embeddings:
        found.append(_Tensor("output.weight", "lm_head.weight", embedding, True))
    for number, mixer in enumerate(spec.layer_mixers):
        prefix, source = f"blk.{number}.", f"model.layers.{number}."
        parts = _mamba(mixer, spec) if isinstance(mixer, Mamba2Spec) else _attention(mixer, spec)
        found += [
            dataclasses.replace(part, name=prefix + part.name, source=source + part.source)
            for part in [*parts, *_shared(spec)]
        ]
    return found


def _shared(spec: ModelSpec) -> list[_Tensor]:
    """What every block has."""
    inner = (spec.d_ff, spec.d_model)
    return [
        _Tensor("attn_norm.weight", "mixer_norm.weight", (spec.d_model,), False),
        _Tensor("ffn_norm.weight", "mlp_norm.weight", (spec.d_model,), False),
        _Tensor("ffn_gate.weight", "mlp.gate_proj.weight", inner, True),
        _Tensor("ffn_up.weight", "mlp.up_proj.weight", inner, True),
        _Tensor("ffn_down.weight", "mlp.down_proj.weight", inner[::-1], True),
    ]


def _attention(mixer: Any, spec: ModelSpec) -> list[_Tensor]:
    queries, keys = mixer.n_heads * mixer.head_dim, mixer.n_kv_heads * mixer.head_dim

    def permute(rows: np.ndarray) -> np.ndarray:
        return interleaved(rows, mixer.head_dim)

    return [
        _Tensor("attn_q.weight", "mixer.q_proj.weight", (queries, spec.d_model), True, permute),
        _Tensor("attn_k.weight", "mixer.k_proj.weight", (keys, spec.d_model), True, permute),
        _Tensor("attn_v.weight", "mixer.v_proj.weight", (keys, spec.d_model), True),
        _Tensor("attn_output.weight", "mixer.o_proj.weight", (spec.d_model, queries), True),
    ]


def _mamba(mixer: Mamba2Spec, spec: ModelSpec) -> list[_Tensor]:
    inner, groups = mixer.expand * spec.d_model, mixer.n_groups
    heads, channels = inner // mixer.head_dim, inner + 2 * groups * mixer.d_state
    return [
        _Tensor("ssm_in.weight", "mixer.in_proj.weight", (inner + channels + heads, spec.d_model), True),
        _Tensor("ssm_conv1d.weight", "mixer.conv1d.weight", (channels, mixer.d_conv), False),
        _Tensor("ssm_conv1d.bias", "mixer.conv1d.bias", (channels,), False),
        _Tensor("ssm_dt.bias", "mixer.dt_bias", (heads,), False),
        _Tensor("ssm_a", "mixer.A_log", (heads, 1), False, lambda log: -np.exp(log)),
        _Tensor("ssm_d", "mixer.D", (heads, 1), False),
        _Tensor("ssm_norm.weight", "mixer.norm.weight", (groups, inner // groups), False),
        _Tensor("ssm_out.weight", "mixer.out_proj.weight", (spec.d_model, inner), True),
    ]


def _kind(tensor: _Tensor, precision: Precision) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    if not tensor.matrix:
        return GGMLQuantizationType.F32
    embedding = tensor.name in ("token_embd.weight", "output.weight")
    return GGMLQuantizationType[("q8_0" if embedding and precision == "q4_0" else precision).upper()]


def _stored_shape(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[int, ...]:
    from gguf import quant_shape_to_byte_shape

    return quant_shape_to_byte_shape(shape, kind) if kind.name.startswith("Q") else shape


def _stored_type(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[np.dtype[Any], int, Any]:
    """numpy's type, bytes, and GGUF's type where numpy has none."""
    if kind.name.startswith("Q"):
        return np.dtype(np.uint8), math.prod(_stored_shape(shape, kind)), kind
    dtype = np.dtype(np.float16 if kind.name == "F16" else np.float32)
    return dtype, math.prod(shape) * dtype.itemsize, None


def _stored(tensor: _Tensor, read: Read, kind: GGMLQuantizationType) -> np.ndarray:
    from gguf.quants import quantize

    values = read(tensor.source)
    if values.size != math.prod(tensor.shape):
        raise ValueError(f"{tensor.source} must have the values of {list(tensor.shape)}; got {list(values.shape)}")
    values = values.reshape(tensor.shape).astype(np.float32, copy=False)
    if tensor.change is not None:
        values = tensor.change(values)
    if not np.isfinite(values).all():
        raise ValueError(f"{tensor.source} must be finite; got inf or nan; export another checkpoint")
    if kind.name == "F16" and np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(f"{tensor.source} must lie within float16; got {np.abs(values).max():g}; leave f16 out")
    return quantize(np.ascontiguousarray(values), kind)


def _add_model_facts(writer: GGUFWriter, spec: ModelSpec, precision: Precision, name: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[types[precision]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(spec.n_layers)
    writer.add_context_length(spec.max_seq_len)
    writer.add_embedding_length(spec.d_model)
    writer.add_feed_forward_length(spec.d_ff)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    for add in (writer.add_embedding_scale, writer.add_residual_scale, writer.add_logit_scale):
        add(1.0)
    _add_attention_facts(writer, spec)
    _add_mamba_facts(writer, spec)


def _add_attention_facts(writer: GGUFWriter, spec: ModelSpec) -> None:
    mixers = spec.layer_mixers
    mixer = next((mixer for mixer in mixers if isinstance(mixer, AttentionSpec)), None)
    # A layer without key heads is what llama.cpp takes for a Mamba layer.
    writer.add_head_count_kv([mixer.n_kv_heads if isinstance(mixer, AttentionSpec) else 0 for mixer in mixers])
    writer.add_head_count(1 if mixer is None else mixer.n_heads)
    if mixer is None:
        return
    writer.add_attention_scale(1 / math.sqrt(mixer.head_dim))
    writer.add_rope_dimension_count(mixer.head_dim)
    writer.add_rope_freq_base(mixer.rope_theta)
    # In this architecture the flag means that positions are rotated at all.
    writer.add_rope_scaling_finetuned(True)


def _add_mamba_facts(writer: GGUFWriter, spec: ModelSpec) -> None:
    mixer = next((mixer for mixer in spec.layer_mixers if isinstance(mixer, Mamba2Spec)), None)
    if mixer is None:
        return
    inner = mixer.expand * spec.d_model
    writer.add_ssm_conv_kernel(mixer.d_conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(mixer.d_state)
    writer.add_ssm_time_step_rank(inner // mixer.head_dim)
    writer.add_ssm_group_count(mixer.n_groups)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_tokenizer_pre(vocabulary.pre)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(False)
    # No text begins with a special token here; the id is named so that nobody guesses one.
    writer.add_bos_token_id(vocabulary.eos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_eot_token_id(vocabulary.eot_id)
    writer.add_pad_token_id(vocabulary.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(vocabulary.chat_template)
