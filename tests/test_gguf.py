"""A chimera-shaped model's GGUF file gives the model's logits in stock llama.cpp."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from export_cases import MAMBA2, VOCAB, chimera, our_logits, random_model, reader, save_gguf, tokens_and_vocabulary

from model.export import gguf as gguf_room
from model.export.gguf import gguf_faults, interleaved, write_gguf
from model.export.llama_cpp import LlamaCpp
from model.presets import PRESETS

IDS = torch.randint(4, 320, (101,), generator=torch.Generator().manual_seed(3)).tolist()
# fp32 on both sides: about 10 operations a layer over 6 layers, in other orders; sums of up to n = 96 terms differ by
# sqrt(n) eps at most typically; the random layers amplify each other's rounding a little.
TOLERANCE = 60 * 10 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tokens_and_vocabulary(tmp_path_factory.mktemp("tokens"))[1]


@pytest.fixture
def theirs(tmp_path, vocabulary):
    """Logits that llama.cpp gives for the model's file."""

    def logits(model, precision="f32", ids=IDS):
        path = save_gguf(tmp_path / f"{precision}.gguf", model, vocabulary, precision)
        with LlamaCpp(path, context_tokens=128, threads=1, exact=True) as other:
            return other.logits(ids)

    return logits


def gap(ours: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(ours - other).max() / np.abs(ours).max())


SPECS = {
    "chimera": chimera(),
    "untied": chimera(tie_embeddings=False),
    "other sizes": chimera(mamba2={"head_dim": 32, "d_conv": 3, "d_state": 24}, d_ff=64),
    "all heads have keys": chimera(attention={"n_kv_heads": 4, "rope_theta": 1e6}),
    "attention first": chimera(layers="2*attention 1*mamba2"),
}


@pytest.mark.parametrize("name", SPECS)
def test_llama_cpp_gives_the_models_logits(name, theirs):
    model = random_model(SPECS[name])
    other = theirs(model)
    assert other.shape == (len(IDS), VOCAB)
    assert gap(our_logits(model, IDS), other) < TOLERANCE


def test_a_sequence_does_not_feel_the_one_before_it(tmp_path, vocabulary):
    path = save_gguf(tmp_path / "a.gguf", random_model(chimera()), vocabulary, "f32")
    with LlamaCpp(path, context_tokens=128, threads=1) as other:
        first = other.logits(IDS)
        other.logits(IDS[::-1])
        assert np.array_equal(first, other.logits(IDS))


def swapped(tensors, name, change):
    return [dataclasses.replace(t, change=change) if t.name.endswith(name) else t for t in tensors]


FAULTS = {
    "query and key rows as they were": lambda tensors: swapped(
        swapped(tensors, "attn_q.weight", None), "attn_k.weight", None
    ),
    "decay rates as logarithms": lambda tensors: swapped(tensors, "ssm_a", None),
    "skip lost": lambda tensors: swapped(tensors, "ssm_d", np.zeros_like),
    "taps reversed": lambda tensors: swapped(tensors, "ssm_conv1d.weight", lambda taps: taps[:, ::-1]),
    "gate and up swapped": lambda tensors: [
        dataclasses.replace(t, source=t.source.replace("gate_proj", "up_proj")) if "ffn_gate" in t.name else t
        for t in tensors
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_file_is_seen(fault, theirs, monkeypatch):
    model = random_model(chimera())
    written = gguf_room._tensors
    monkeypatch.setattr(gguf_room, "_tensors", lambda spec: FAULTS[fault](written(spec)))
    other = theirs(model)
    assert not gap(our_logits(model, IDS), other) < 10 * TOLERANCE


def test_positions_that_are_not_rotated_are_seen(theirs, monkeypatch):
    from gguf import GGUFWriter

    model = random_model(chimera())
    written = GGUFWriter.add_rope_scaling_finetuned
    monkeypatch.setattr(GGUFWriter, "add_rope_scaling_finetuned", lambda self, value: written(self, False))
    assert gap(our_logits(model, IDS), theirs(model)) > 10 * TOLERANCE


def test_interleaving_by_hand():
    rows = np.arange(8)[:, None]
    # Two heads of four channels: pairs (0, 2) and (1, 3) become neighbours.
    assert interleaved(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_file_states_the_architectures_facts(tmp_path, vocabulary):
    from gguf import GGUFReader

    path = save_gguf(tmp_path / "a.gguf", random_model(chimera()), vocabulary, "q4_0")
    file = GGUFReader(path)
    facts = {name: field.contents() for name, field in file.fields.items()}
    assert facts["general.architecture"] == "granitehybrid"
    assert facts["granitehybrid.attention.head_count_kv"] == [0, 2, 0, 2]
    assert facts["granitehybrid.rope.scaling.finetuned"] is True
    assert facts["granitehybrid.attention.scale"] == 0.25
    scales = ("embedding_scale", "residual_scale", "logit_scale")
    assert [facts[f"granitehybrid.{name}"] for name in scales] == [1.0, 1.0, 1.0]
    shapes = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()[::-1]) for tensor in file.tensors}
    assert shapes["blk.0.ssm_a"] == ("F32", [8, 1])
    assert shapes["blk.0.ssm_d"] == ("F32", [8, 1])
    assert shapes["blk.0.ssm_norm.weight"] == ("F32", [1, 128])
    assert shapes["blk.1.attn_k.weight"] == ("Q4_0", [32, 64])
    assert shapes["token_embd.weight"] == ("Q8_0", [VOCAB, 64])
    assert "output.weight" not in shapes


def test_quantised_values_lie_within_half_a_step(tmp_path, vocabulary):
    from gguf import GGUFReader, dequantize

    model = random_model(chimera())
    for precision, steps in (("q8_0", 127), ("q4_0", 8)):
        path = save_gguf(tmp_path / f"{precision}.gguf", model, vocabulary, precision)
        tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
        stored = dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32)
        wanted = reader(model)("model.layers.1.mlp.up_proj.weight").reshape(-1, 32)
        largest = np.abs(wanted).max(1, keepdims=True)
        # Q4_0 has 8 steps down and 7 up, so the far end may be a whole step away; scales are halves (2^-11).
        room = {"q8_0": 0.5, "q4_0": 1.0}[precision] / steps + 2**-10
        assert (np.abs(stored - wanted) <= room * largest).all()


@pytest.mark.parametrize("precision", ["q8_0", "q4_0"])
def test_widths_that_do_not_fill_blocks_are_refused_with_field_and_tensor(precision):
    faults = gguf_faults(chimera(d_ff=100), precision)
    assert faults == [
        f"d_ff must be a multiple of 32, the block of {precision}, for the rows of ffn_down.weight; got 100; set 128"
    ]
    assert gguf_faults(chimera(d_ff=100), "f16") == []


def test_sizes_that_would_end_the_process_are_refused():
    wide = chimera(mamba2={"expand": 3})
    assert gguf_faults(wide, "f16") == [
        "mixers.mamba2.expand must be 2, which llama.cpp takes for granted; got 3; set 2"
    ]
    alone = chimera(layers="2*mamba2", mixers={"mamba2": MAMBA2})
    assert gguf_faults(alone, "f16") == [
        "layers must hold mamba2 and attention for llama.cpp; got mamba2 alone; add the other"
    ]


def test_what_llama_cpp_rounds_by_itself_stays_small(tmp_path, vocabulary):
    """Attention in half precision (eps 2^-10) over two layers, amplified by at most ten."""
    model = random_model(chimera())
    path = save_gguf(tmp_path / "a.gguf", model, vocabulary, "f32")
    with LlamaCpp(path, context_tokens=128, threads=1) as other:
        assert gap(our_logits(model, IDS), other.logits(IDS)) < 2 * 10 * 2**-10


@pytest.mark.parametrize("name", ["hybrid_1b3", "helix_900m", "nano_helix"])
def test_models_that_llama_cpp_has_no_form_for_are_refused(name):
    assert gguf_faults(PRESETS[name], "f16")


@pytest.mark.parametrize("name", ["chimera_700m", "nano_chimera"])
def test_the_chimera_presets_have_every_form(name):
    assert [gguf_faults(PRESETS[name], precision) for precision in ("f16", "q8_0", "q4_0")] == [[], [], []]


def test_weights_that_are_not_numbers_are_refused(tmp_path, vocabulary):
    model = random_model(chimera())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight must be finite"):
        save_gguf(tmp_path / "a.gguf", model, vocabulary, "f16")


def test_weights_beyond_half_precision_are_refused(tmp_path, vocabulary):
    model = random_model(chimera())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"must lie within float16; got 1e\+06; leave f16 out"):
        save_gguf(tmp_path / "a.gguf", model, vocabulary, "f16")


def test_more_tokens_than_rows_are_refused(tmp_path, vocabulary):  # trap K10
    model = random_model(chimera(vocab_size=256))
    with pytest.raises(ValueError, match="vocab_size must be at least the tokenizer's 320; got 256"):
        write_gguf(tmp_path / "a.gguf", model.config.spec, reader(model), vocabulary, "f16", name="tiny")


def test_another_layout_of_parameters_is_refused(monkeypatch):
    from model.export import llama_cpp

    llama_cpp._library.cache_clear()
    monkeypatch.setattr(llama_cpp, "_CONTEXT_DEFAULTS", {"<I": (0, (7,))})
    try:
        with pytest.raises(ValueError, match=r"got xllamacpp .* hold \(512,\) at 0"):
            llama_cpp._library()
    finally:
        llama_cpp._library.cache_clear()
