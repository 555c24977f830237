"""A chimera-shaped model gives the logits of transformers' GraniteMoeHybrid with the same weights."""

import pytest
import torch
from transformers import GraniteMoeHybridForCausalLM

from model.config import HybridConfig
from model.export.granite import granite_config, granite_state_dict
from model.lm import HybridForCausalLM
from model.presets import PRESETS
from model.spec import ModelSpec

MAMBA2 = {"mixer": "mamba2", "d_state": 16, "head_dim": 8, "expand": 2, "d_conv": 4, "n_groups": 1, "chunk_size": 16}
ATTENTION = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rope_theta": 5000.0}
VOCAB, PAD = 96, 1


def chimera(mamba2: dict | None = None, attention: dict | None = None, **changes) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "d_model": 32,
            "d_ff": 48,
            "vocab_size": VOCAB,
            "max_seq_len": 128,
            "layers": "(2*mamba2 1*attention)*2",
            "mixers": {"mamba2": MAMBA2 | (mamba2 or {}), "attention": ATTENTION | (attention or {})},
            **changes,
        }
    )


def random_model(spec: ModelSpec) -> HybridForCausalLM:
    """Every parameter drawn anew, so that no two heads, channels or norms are alike and nothing is one or zero."""
    torch.manual_seed(5)
    model = HybridForCausalLM(HybridConfig.from_spec(spec, eos_token_id=0, pad_token_id=PAD)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    return model


def granite_of(model: HybridForCausalLM, spec: ModelSpec) -> GraniteMoeHybridForCausalLM:
    twin = GraniteMoeHybridForCausalLM(granite_config(spec, eos_token_id=0, pad_token_id=PAD)).eval()
    twin.load_state_dict(granite_state_dict(model), strict=True)
    return twin


def logits(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def batch(padding: tuple[int, ...], time: int = 53) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids with ``padding`` tokens on the left of each row; 53 tokens are three chunks of 16 and a rest."""
    ids = torch.randint(2, VOCAB, (len(padding), time), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = PAD, 0
    return ids, mask


def largest_gap(model: HybridForCausalLM, twin: GraniteMoeHybridForCausalLM, padding: tuple[int, ...]) -> float:
    """Largest difference of logits at tokens, relative to the largest logit."""
    ids, mask = batch(padding)
    ours, theirs = logits(model, ids, mask), logits(twin, ids, mask)
    return float(((ours - theirs).abs() * mask[..., None]).max() / theirs.abs().max())


# In fp32 both round each of about 10 operations a layer over 6 layers, in other orders; sums of up to n = 64 terms
# differ by sqrt(n) eps at most typically, so 60 * 8 * eps = 6e-5. Granite computes its norms, scan and rotation in fp32
# even in an fp64 model, so fp64 would be no sharper.
TOLERANCE = 60 * 8 * torch.finfo(torch.float32).eps

SPECS = {
    "chimera": chimera(),
    "untied": chimera(tie_embeddings=False),
    "other sizes": chimera(mamba2={"head_dim": 16, "expand": 3, "d_conv": 3, "d_state": 12}, d_ff=40),
    "other chunks": chimera(mamba2={"chunk_size": 8}),
    "all heads have keys": chimera(attention={"n_kv_heads": 4}),
}


@pytest.mark.parametrize("padding", [(0, 0), (0, 17)], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", SPECS)
def test_logits_are_granites(name, padding):  # trap K4
    model = random_model(SPECS[name])
    assert largest_gap(model, granite_of(model, SPECS[name]), padding) < TOLERANCE


def swap(weights: dict, name: str, split: tuple[int, ...], order: tuple[int, ...]) -> None:
    parts = weights[name].split(split)
    weights[name] = torch.cat([parts[i] for i in order])


FAULTS = {
    "gate and x swapped": lambda w: swap(w, "model.layers.0.mamba.in_proj.weight", (64, 64, 40), (1, 0, 2)),
    "B and C swapped": lambda w: swap(w, "model.layers.0.mamba.conv1d.weight", (64, 16, 16), (0, 2, 1)),
    "MLP halves swapped": lambda w: swap(w, "model.layers.3.shared_mlp.input_linear.weight", (48, 48), (1, 0)),
    "taps reversed": lambda w: w.update({k: v.flip(-1) for k, v in w.items() if k.endswith("conv1d.weight")}),
    "decay without its sign": lambda w: w["model.layers.1.mamba.A_log"].neg_(),
    "skip lost": lambda w: w["model.layers.4.mamba.D"].zero_(),
    "rotation pairs interleaved": lambda w: w.update(
        {
            name: w[name].view(-1, 2, 4, 32).transpose(1, 2).reshape(-1, 32)
            for name in (f"model.layers.2.self_attn.{part}_proj.weight" for part in "qk")
        }
    ),
    "keys grouped otherwise": lambda w: swap(w, "model.layers.2.self_attn.k_proj.weight", (8, 8), (1, 0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_weights_is_seen(fault):
    model = random_model(chimera())
    twin = granite_of(model, chimera())
    weights = {name: tensor.clone() for name, tensor in granite_state_dict(model).items()}
    FAULTS[fault](weights)
    twin.load_state_dict(weights, strict=True)
    assert largest_gap(model, twin, (0, 0)) > 10 * TOLERANCE


def test_other_multipliers_are_seen():
    model = random_model(chimera())
    twin = granite_of(model, chimera())
    for layer in twin.model.layers:
        if layer.self_attn is not None:
            layer.self_attn.scaling = 1.0
    assert largest_gap(model, twin, (0, 0)) > 10 * TOLERANCE


def test_weights_are_shared_under_other_names():
    model = random_model(chimera())
    theirs = granite_state_dict(model)
    assert theirs["model.embed_tokens.weight"].data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert theirs["lm_head.weight"].data_ptr() == model.model.embed_tokens.weight.data_ptr()
    joined = sum(t.numel() for name, t in theirs.items() if name != "lm_head.weight")
    assert joined == sum(p.numel() for p in model.parameters())


REFUSED = {
    "output_gate": (chimera(attention={"output_gate": True}), "mixers.attention.output_gate must be false"),
    "qk_norm": (chimera(attention={"qk_norm": True}), "mixers.attention.qk_norm must be false"),
    "n_groups": (chimera(mamba2={"n_groups": 2}), "mixers.mamba2.n_groups must be 1, .* got 2"),
    "window": (chimera(attention={"window": 8}), "mixers.attention.window must be absent; got 8"),
    "head_dim": (chimera(attention={"head_dim": 16}), r"head_dim must be d_model / n_heads = 8; got 16"),
    "gla": (
        chimera(layers="g", mixers={"g": {"mixer": "gla", "n_heads": 2}}),
        "mixers.g.mixer must be mamba2 or attention; got 'gla'",
    ),
    "two SSM sizes": (
        chimera(layers="a b", mixers={"a": MAMBA2, "b": MAMBA2 | {"d_state": 8}}),
        "mixers.b must have the sizes of mixers.a; got d_state 8 and 16; set 16",
    ),
    "two attention sizes": (
        chimera(layers="a b", mixers={"a": ATTENTION, "b": ATTENTION | {"rope_theta": 1e6}}),
        "got rope_theta 1000000.0 and 5000.0",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_granite_cannot_express_is_refused(reason):
    spec, message = REFUSED[reason]
    with pytest.raises(ValueError, match=message):
        granite_config(spec)


def test_all_reasons_are_given_at_once():
    with pytest.raises(ValueError, match=r"output_gate must be false.*qk_norm must be false"):
        granite_config(chimera(attention={"output_gate": True, "qk_norm": True}))


def test_chunks_and_backends_are_no_reason():
    spec = chimera(layers="a b", mixers={"a": MAMBA2, "b": MAMBA2 | {"chunk_size": 8, "backend": "torch"}})
    assert granite_config(spec).layer_types == ["linear_attention", "linear_attention"]


@pytest.mark.parametrize("name", ["chimera_700m", "nano_chimera"])
def test_the_chimera_presets_have_a_granite_form(name):
    config = granite_config(PRESETS[name])
    with torch.device("meta"):
        twin = GraniteMoeHybridForCausalLM(config)
        ours = HybridForCausalLM(HybridConfig.from_spec(PRESETS[name], eos_token_id=0, pad_token_id=1))
    shapes = {name: tensor.shape for name, tensor in granite_state_dict(ours).items()}
    assert shapes == {name: tensor.shape for name, tensor in twin.state_dict().items()}
    # llama.cpp's quantised blocks want rows of a multiple of 256
    assert all(size % 256 == 0 for size in (config.hidden_size, config.shared_intermediate_size))
