"""Which fields of the model may differ from the parent's: those that the spec marks as changing no result."""

import pytest

from model.spec import AttentionSpec, GLASpec, Mamba2Spec, ModelSpec
from stages.runtime.warm_start import model_faults

OTHER = {
    "d_state": 32, "head_dim": 32, "expand": 4, "d_conv": 3, "n_groups": 2, "chunk_size": 64, "backend": "torch",
    "n_heads": 8, "head_k_dim": 32, "head_v_dim": 32, "gate_rank": 4, "gate_normalizer": 8.0, "n_kv_heads": 1,
    "rope_theta": 500.0, "qk_norm": True, "output_gate": True, "window": 9, "global_tokens": 0,
}  # fmt: skip
SECTIONS = {
    "mamba2": (Mamba2Spec, {"mixer": "mamba2", "head_dim": 64}),
    "gla": (GLASpec, {"mixer": "gla", "n_heads": 4}),
    "attention": (
        AttentionSpec,
        {"mixer": "attention", "n_heads": 4, "n_kv_heads": 4, "window": 8, "global_tokens": 2},
    ),
}
FREE = {
    ("mamba2", "chunk_size"),
    ("mamba2", "backend"),
    ("gla", "chunk_size"),
    ("gla", "backend"),
    ("attention", "backend"),
}
"""Worked out from what each field does, not from its mark."""


def spec(mixer):
    return ModelSpec(d_model=64, d_ff=64, vocab_size=64, max_seq_len=64, layers="m", mixers={"m": mixer})


FIELDS = [(kind, name) for kind, (section, _) in SECTIONS.items() for name in section.model_fields if name != "mixer"]


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_a_field_that_gives_weights_another_meaning_is_refused_and_no_other(kind, field):
    _, parent = SECTIONS[kind]
    faults = [fault.message for fault in model_faults(spec({**parent, field: OTHER[field]}), spec(parent))]
    if (kind, field) in FREE:
        assert faults == []
    else:
        assert len(faults) == 1
        assert f"model.layers[0].{field} must be the parent's" in faults[0]
