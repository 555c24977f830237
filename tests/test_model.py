"""The model as a whole: configuration, names, saving, initial values, loss, precision (traps K7, K9, K10)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import CASES, VOCAB, recompute, relative_gap, tiny_config, tiny_model, tiny_spec, tokens, tolerance
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

import model as model_room
from model import init, loss
from model.config import HybridConfig
from model.layers import GatedRMSNorm
from model.lm import HybridForCausalLM, model_backends

ISLANDS = {"A_log", "dt_bias", "D", "gate_bias"}


def test_config_round_trips_through_json_and_auto_config(tmp_path: Path) -> None:
    model_room.register()
    config = tiny_config()
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HybridConfig
    assert again.spec == config.spec == tiny_spec()
    assert (again.eos_token_id, again.pad_token_id) == (0, 1)
    assert (again.hidden_size, again.num_hidden_layers, again.tie_word_embeddings) == (32, len(CASES), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modle": 32}, "field d_modle must be a field of the model; got 32; did you mean d_model"),
        ({"d_ff": 0}, "d_ff: .*got 0"),
        ({"layers": "2*mamba3"}, "mamba3"),
        ({"mixers": {"it": {"mixer": "gla", "n_haeds": 2}}}, "n_haeds"),
    ],
)
def test_config_refuses_what_the_spec_refuses(change: dict[str, Any], message: str) -> None:  # trap T7
    with pytest.raises(ValueError, match=message):
        HybridConfig(**(tiny_spec().model_dump() | change))


def test_unknown_key_in_a_saved_config_is_refused(tmp_path: Path) -> None:  # trap T7
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"window_size": 4}))
    with pytest.raises(ValueError, match="field window_size must be"):
        HybridConfig.from_pretrained(tmp_path)


def test_names_of_parameters_are_stable() -> None:
    case = next(case for case in CASES if case.name == "mamba2")
    names = {name for name, _ in tiny_model(case, layers="1*it", tie_embeddings=False).named_parameters()}
    layer = {
        "mixer_norm.weight", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.A_log",
        "mixer.D", "mixer.dt_bias", "mixer.norm.weight", "mixer.out_proj.weight", "mlp_norm.weight",
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    }  # fmt: skip
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names == outside | {f"model.layers.0.{name}" for name in layer}


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_comes_back_bit_for_bit_through_the_auto_class(tmp_path: Path, tied: bool) -> None:
    model_room.register()
    model = tiny_model(tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is HybridForCausalLM
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_missing_weights_are_initialised_and_loaded_ones_left_alone(tmp_path: Path) -> None:  # trap K7
    from safetensors.torch import load_file, save_file

    model = HybridForCausalLM(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    lost = {name for name in saved if name.rsplit(".", 1)[-1] in {"A_log", "gate_bias"}}
    save_file(
        {name: saved[name] for name in saved if name not in lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    again = HybridForCausalLM.from_pretrained(tmp_path)
    for name, value in again.named_parameters():
        if name.endswith("A_log"):
            assert (value >= 0).all()
            assert (value <= math.log(16)).all()
        elif name not in lost:
            assert (value == 7.0).all(), name


def test_initial_values_are_those_of_the_papers() -> None:
    torch.manual_seed(0)
    model = HybridForCausalLM(tiny_config(d_model=128))
    for name, value in ((name, parameter.detach()) for name, parameter in model.named_parameters()):
        kind = name.rsplit(".", 1)[-1]
        if kind == "A_log":
            assert ((value.exp() >= 1) & (value.exp() <= 16)).all()
        elif kind == "dt_bias":
            step = functional.softplus(value)
            assert ((step > 0.99e-3) & (step < 1.01e-1)).all()
        elif kind == "D" or name.endswith("norm.weight"):
            assert (value == 1).all()
        elif kind == "gate_bias":
            mixer: Any = model.get_submodule(name.rsplit(".", 1)[0])
            memory = -mixer.spec.gate_normalizer / functional.logsigmoid(value)
            assert ((memory > 7.9) & (memory < 1030)).all()
        elif "conv1d" in name:
            assert value.abs().max() <= 0.5
        elif value.dim() == 2:
            narrow = any(f".{part}." in name for part in ("out_proj", "o_proj", "down_proj"))
            std = 0.02 / math.sqrt(2 * len(CASES)) if narrow else 0.02
            # Five standard errors of a standard deviation over n draws.
            assert float(value.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * value.numel())), name


def test_model_is_built_on_the_meta_device_without_memory() -> None:
    with torch.device("meta"):
        model = HybridForCausalLM(tiny_config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    real = tiny_model()
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


def test_islands_are_found_and_exempt_from_decay() -> None:  # trap K7
    model = tiny_model()
    islands = init.fp32_islands(model)
    assert {name.rsplit(".", 1)[-1] for name in islands} == ISLANDS
    spared = {name for name, parameter in model.named_parameters() if init.no_decay(name, parameter)}
    assert islands < spared
    assert {name for name in spared - islands if not name.endswith(("norm.weight", "conv1d.bias"))} == set()
    assert "model.embed_tokens.weight" not in spared
    partitioned = torch.nn.Parameter(torch.empty(0))
    partitioned.ds_shape = torch.Size([8, 8])  # type: ignore[attr-defined]
    assert not init.no_decay("flattened.matrix", partitioned), "ZeRO-3 hides the shape of a matrix"


def test_an_island_of_two_axes_is_exempt_from_decay_too() -> None:  # trap K7
    matrix = torch.nn.Parameter(torch.empty(8, 8))
    for name in ISLANDS:
        assert init.no_decay(f"model.layers.0.mixer.{name}", matrix), name
    assert not init.no_decay("model.layers.0.mixer.in_proj.weight", matrix)


def cast_by_loading(model: Any, directory: Path) -> Any:
    model.save_pretrained(directory)
    return HybridForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


CASTS = {
    "to": lambda model, directory: model.to(torch.bfloat16),
    "bfloat16": lambda model, directory: model.bfloat16(),
    "half": lambda model, directory: model.half(),
    "from_pretrained": cast_by_loading,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_no_cast_reaches_the_islands(cast: Any, tmp_path: Path) -> None:  # trap K7
    model = tiny_model()
    before = {name: model.get_parameter(name).detach().clone() for name in init.fp32_islands(model)}
    model = cast(model, tmp_path)
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, before[name]), name
        else:
            assert parameter.dtype in (torch.bfloat16, torch.float16), name
    assert model(tokens(1, 9)).logits.dtype == next(model.parameters()).dtype


def test_autocast_trains_islands_in_fp32_close_to_fp32() -> None:  # trap K7
    ids = tokens(4, 24)
    gradients: list[dict[str, Any]] = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = HybridForCausalLM(tiny_config())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(ids, labels=ids, return_logits=False).loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        gradients.append({name: model.get_parameter(name).grad for name in init.fp32_islands(model)})
    for name in gradients[0]:
        cosine = functional.cosine_similarity(gradients[0][name], gradients[1][name], dim=0)
        # Six layers, each a few roundings to eight bits off: an error of some 2**-8 * 6 * 3 of the gradient.
        assert cosine > 1 - (2**-8 * 6 * 3) ** 2, name


def test_loss_is_the_mean_nll_of_next_tokens() -> None:  # trap K9
    model, ids = tiny_model(dtype=torch.float64), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    result = model(ids, labels=labels)
    nll = -torch.log_softmax(result.logits.detach(), -1)
    wanted = [nll[row, t, ids[row, t + 1]] for row in range(2) for t in range(8) if labels[row, t + 1] != -100]
    assert len(wanted) == 5 + 8
    assert torch.allclose(result.loss, torch.stack(wanted).mean(), rtol=1e-12)
    divided = model(ids, labels=labels, num_items_in_batch=torch.tensor(26)).loss
    assert torch.allclose(divided * 26, torch.stack(wanted).sum(), rtol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_without_logits_has_the_same_value_and_gradients(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_chunk_tokens", lambda *shape: 7)
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[:, 3:6] = -100
    results = []
    for return_logits in (True, False):
        model = tiny_model(dtype=torch.float64, tie_embeddings=tied)
        outputs = model(ids, labels=labels, return_logits=return_logits, num_items_in_batch=11)
        outputs.loss.backward()
        assert (outputs.logits is not None) is return_logits
        results.append({name: p.grad for name, p in model.named_parameters()} | {"loss": outputs.loss})
        with torch.no_grad():
            assert torch.allclose(model(ids, labels=labels, return_logits=False).loss * 16 / 11, outputs.loss)
    for name in results[0]:
        assert relative_gap(results[1][name], results[0][name]) < tolerance(torch.float64, VOCAB), name


def test_half_precision_logits_are_scored_in_fp32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(30, VOCAB).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(0, VOCAB, (30,))
    total = loss.nll_of_logits(logits, targets)
    assert total.dtype == torch.float32
    assert torch.allclose(total, functional.cross_entropy(logits.detach().float(), targets, reduction="sum"))
    total.backward()
    wanted = (torch.softmax(logits.detach().float(), -1) - functional.one_hot(targets, VOCAB)).bfloat16()
    assert logits.grad is not None
    assert torch.allclose(logits.grad.float(), wanted.float(), atol=2**-8)


def test_no_scored_token_gives_zero_and_no_nan() -> None:
    model, ids = tiny_model(), tokens(1, 6)
    for return_logits in (True, False):
        result = model(ids, labels=torch.full_like(ids, -100), return_logits=return_logits).loss
        result.backward()
        assert float(result.detach()) == 0.0
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def counting(batch: int, time: int) -> torch.Tensor:
    starts = torch.randint(0, VOCAB, (batch, 1))
    return (starts + torch.arange(time)) % VOCAB


def test_model_trained_on_counting_predicts_the_very_next_number() -> None:  # trap K9
    torch.manual_seed(0)
    model = HybridForCausalLM(tiny_config(layers=["mamba2", "attention"], mixers=two_mixers()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = counting(16, 12)
        model(ids, labels=ids, return_logits=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids = counting(32, 12)
    with torch.no_grad():
        likeliest = model(ids).logits.argmax(-1)
    assert (likeliest[:, :-1] == ids[:, 1:]).float().mean() > 0.98
    assert (likeliest[:, :-2] == ids[:, 2:]).float().mean() < 0.02


def two_mixers() -> dict[str, Any]:
    return {case.name: case.spec for case in CASES if case.name in ("mamba2", "attention")}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_activation_checkpointing_gives_equal_gradients(reentrant: bool, packed: bool) -> None:
    ids = tokens(2, 30)
    described = {"seq_idx": (torch.arange(30) // 11)[None].expand(2, -1)} if packed else {}
    gradients = []
    for enabled in (False, True):
        model = tiny_model().train()
        if enabled:
            recompute(model, {"use_reentrant": reentrant})
            assert all(block.gradient_checkpointing for block in model.model.layers)
        model(ids, labels=ids, **described).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_compiling_in_place_keeps_names_and_results() -> None:
    model, ids = tiny_model(), tokens(1, 12)
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(ids).logits
        for block in model.model.layers:
            block.mlp.compile(backend="eager")
        assert list(model.state_dict()) == names
        assert torch.equal(model(ids).logits, before)


def test_logits_to_keep_and_hidden_states() -> None:
    model, ids = tiny_model(), tokens(2, 7)
    with torch.no_grad():
        full = model(ids, output_hidden_states=True)
        assert torch.equal(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
        assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, full.logits[:, [1, 4]])
        assert len(full.hidden_states) == len(CASES) + 1
        assert torch.equal(model.lm_head(full.hidden_states[-1]), full.logits)
        assert model(ids, return_dict=False)[0].shape == full.logits.shape
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert torch.equal(embedded, full.logits)
    assert model.get_output_embeddings() is model.lm_head
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_backends_are_named_layer_by_layer() -> None:  # trap K2
    lines = model_backends(tiny_model())
    assert len(lines) == len(CASES)
    assert lines[0] == f"layer 0: {CASES[0].spec['mixer']} on torch"


def test_gated_norm_gates_first_and_normalises_each_group() -> None:
    # Two groups of two: gate z = 0 would silence a channel, silu(1) = 0.7311 scales it.
    norm = GatedRMSNorm(4, 2, 0.0)
    norm.weight.data.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    y, z = torch.tensor([[3.0, 4.0, 5.0, 12.0]]), torch.ones(1, 4)
    # The gate is one factor a group here, so it cancels: 3 / sqrt((9 + 16) / 2), 4 / ..., 5 / sqrt((25 + 144) / 2), ...
    root = torch.tensor([12.5, 12.5, 84.5, 84.5]).sqrt()
    assert torch.allclose(norm(y, z), y / root * norm.weight.detach())
    z[0, 1] = 0.0
    # Channel 1 is silenced before the norm, so channel 0 takes the whole group: 3 / sqrt(9 / 2).
    assert torch.allclose(norm(y, z)[0, :2], torch.tensor([2.0**0.5, 0.0]))
