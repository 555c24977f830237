"""NF4 bases and adapters on them: what is stored, what they change, what merging costs, what may be asked for."""

from __future__ import annotations

import json
import math
import re
import warnings

import pytest
import torch
from model_cases import CASES, HYBRID, tiny_config, tiny_model, tiny_spec, tokens
from torch import nn

from model.lm import HybridForCausalLM
from model.projections import matching, nearest, projections
from stages.runtime import adapters
from stages.runtime.manifest import CheckpointError
from stages.runtime.qlora_base import base_bytes, copy_dequantised, dequantised_weight, quantise
from stages.runtime.qlora_config import AdapterConfig, adapter_faults, adapter_parameters, engine_faults, saveable
from stages.runtime.qlora_merge import DEQUANTISED, PARENT, Merge, MergeReport, merge_both

# The sixteen levels of NF4 as published (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
WORDS = ["mamba2", "gla_low_rank_fast_gates", "attention_gated_qk_norm"]
SMALL = {"layers": WORDS, "mixers": {word: HYBRID[word] for word in WORDS}}
METHODS = ["lora", "dora"]


def base(**changes):
    """A small model of three mixers, quantised."""
    model = tiny_model(**SMALL | changes)
    quantise(model, projections(model.config.spec), blocksize=32, double_quant=True)
    return model


def adapted(adapter, **changes):
    """A small quantised model with fresh adapters."""
    torch.manual_seed(3)
    model = base(**changes)
    return adapters.attach(model, adapters.peft_config(model.config.spec, adapter)).eval()


def moved(adapter, **changes):
    """The same with adapters as after training: no matrix is zero."""
    model = adapted(adapter, **changes)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapters.trainable(model).items():
            parameter.add_(0.05 * torch.randn_like(parameter) * (1.0 if "lora_" in name else parameter.abs()))
    return model


@torch.no_grad()
def logits(model, ids=None):
    return model(tokens(2, 12) if ids is None else ids).logits


def batch():
    ids = tokens(3, 10, seed=7)
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", [None, *CASES], ids=str)
def test_the_tables_of_projections_and_other_modules_are_those_of_the_built_model(case, tied):
    spec = tiny_spec(case, tie_embeddings=tied)
    with torch.device("meta"):
        model = HybridForCausalLM(tiny_config(case, tie_embeddings=tied))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = linear.pop("lm_head")
    assert projections(spec) == {name: (layer.in_features, layer.out_features) for name, layer in linear.items()}
    owners = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    islands = {name for name in owners if name.endswith(".mixer")}
    tied_to_each_other = {"lm_head", "model.embed_tokens"} if tied else set()
    assert set(saveable(spec)) == owners - set(linear) - islands - tied_to_each_other
    assert head.bias is None


def test_a_part_stands_for_whole_dotted_words():
    names = list(projections(tiny_spec(**SMALL)))
    assert matching(names, "gk_proj") == ["model.layers.1.mixer.gk_proj.0", "model.layers.1.mixer.gk_proj.1"]
    assert matching(names, "layers.0") == [name for name in names if name.startswith("model.layers.0.")]
    assert matching(names, "proj") == matching(names, "") == []
    assert nearest(names, "in_prj")[0] == "in_proj"


@pytest.mark.parametrize("blocksize", [32, 64])
def test_a_weight_is_stored_as_the_nearest_of_sixteen_levels_of_its_block(blocksize):
    model = tiny_model(**SMALL)
    name = "model.layers.0.mlp.down_proj"
    weight = model.get_submodule(name).weight.detach().clone()
    quantise(model, [name], blocksize=blocksize, double_quant=False)
    found = dequantised_weight(model.get_submodule(name)).flatten()
    blocks = weight.flatten().split(blocksize)
    levels = torch.tensor(LEVELS)
    wanted = [
        levels[(block[:, None] / block.abs().max() - levels).abs().argmin(1)] * block.abs().max() for block in blocks
    ]
    assert torch.allclose(found, torch.cat(wanted), rtol=1e-6, atol=1e-7)


def test_the_bytes_of_a_base_are_half_a_byte_a_weight_and_a_scale_a_block():
    model = tiny_model(**SMALL)
    sizes = projections(model.config.spec)
    weights = sum(d_in * d_out for d_in, d_out in sizes.values())
    others = sum(parameter.numel() for parameter in model.parameters()) - weights
    quantise(model, sizes, blocksize=64, double_quant=False)
    scales = sum(math.ceil(d_in * d_out / 64) for d_in, d_out in sizes.values())
    codes = sum(math.ceil(d_in * d_out / 2) for d_in, d_out in sizes.values())
    held = base_bytes(model)
    assert held.fp32 == 4 * (weights + others)
    # One book of sixteen fp32 levels; how often it is kept is the library's affair.
    books = held.held - codes - 4 * scales - 4 * others
    assert books % 64 == 0
    assert 64 <= books <= 64 * len(sizes)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_base_gives_the_same_in_training_and_evaluation_and_again():
    model = base()
    ids = tokens(2, 12)
    packed = [parameter.clone() for parameter in model.parameters()]
    first = logits(model.eval(), ids)
    assert torch.equal(logits(model.train(), ids), first)
    assert torch.equal(logits(model.eval(), ids), first)
    assert all(torch.equal(before, now) for before, now in zip(packed, model.parameters(), strict=True))
    plain = tiny_model(**SMALL)
    copy_dequantised(model, plain)
    assert torch.allclose(logits(plain, ids), first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_off_and_untrained_adapters_are_the_base_bit_for_bit(method):  # trap T11
    plain, model = base(), adapted(AdapterConfig(method=method, rank=2))
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            wanted = logits(plain)
            assert torch.equal(logits(model), wanted)
            with adapters.switched_off(model):
                assert torch.equal(logits(model), wanted)
    trained = moved(AdapterConfig(method=method, rank=2))
    assert not torch.equal(logits(trained), logits(plain))
    with adapters.switched_off(trained):
        assert torch.equal(logits(trained), logits(plain))


def probed(model, reference=None):
    ids = tokens(1, 16)
    wanted = logits(base() if reference is None else reference, ids)
    return adapters.probe(model, wanted, lambda: model(ids).logits, lambda: model(ids, labels=ids).loss)


@pytest.mark.parametrize("method", METHODS)
def test_every_target_of_every_mixer_changes_the_output_and_gets_a_gradient(method):  # trap K8
    # One layer of every case for LoRA; three suffice to see that DoRA goes the same way.
    changes = {"layers": list(HYBRID), "mixers": HYBRID} if method == "lora" else SMALL
    reference = tiny_model(**changes)
    names = projections(reference.config.spec)
    quantise(reference, names, blocksize=32, double_quant=True)
    extra = ["norm", "conv1d", "q_norm", "mlp_norm"]
    model = adapted(AdapterConfig(method=method, rank=2, modules_to_save=extra), **changes)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert probed(model, reference) == []
    saved = {name for part in extra for name in matching(saveable(reference.config.spec), part)}
    assert len(adapters.units(model)) == len(names) + len(saved)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_projection_whose_weight_is_read_past_its_forward_is_found(monkeypatch):  # trap K8
    model = adapted(AdapterConfig(rank=2))
    layer = model.get_submodule("base_model.model.model.layers.0.mixer.out_proj")
    monkeypatch.setattr(layer, "forward", layer.base_layer.forward)
    found = probed(model)
    assert [fault for fault in found if "changes no output" in fault] == [
        "base_model.model.model.layers.0.mixer.out_proj changes no output: its weight is read past its forward"
    ]
    assert [fault for fault in found if "lora_" in fault] == [
        f"base_model.model.model.layers.0.mixer.out_proj.lora_{letter}.default.weight gets no gradient"
        for letter in "AB"
    ]


def test_adapters_that_do_not_start_as_the_base_are_found():  # trap T11
    assert probed(moved(AdapterConfig(rank=2)))[0] == "the model with untrained adapters is not the base"


@pytest.mark.parametrize("method", METHODS)
def test_adapters_and_their_gradients_are_fp32_under_autocast_and_nothing_else_is_trained(method):
    adapter = AdapterConfig(method=method, rank=2)
    model = moved(adapter).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    trained = adapters.trainable(model)
    assert {(p.dtype, p.grad.dtype) for p in trained.values()} == {(torch.float32, torch.float32)}
    assert all(".lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == adapter_parameters(model.config.spec, adapter)
    assert not hasattr(model.base_model.model, "is_loaded_in_4bit")


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_the_published_formula(method):
    adapter = AdapterConfig(method=method, rank=2, alpha=6, targets=["in_proj", "mlp"], modules_to_save=["mixer_norm"])
    model = moved(adapter)
    state, config = adapters.adapter_state(model), model.peft_config["default"]
    merged = adapters.merged(tiny_model(**SMALL), state, config)
    plain = tiny_model(**SMALL)
    changed = {
        f"{name}.weight" for part in ("in_proj", "mlp") for name in matching(projections(plain.config.spec), part)
    }
    for name, weight in plain.state_dict().items():
        found, prefix = merged.state_dict()[name], f"base_model.model.{name.removesuffix('.weight')}"
        if name in changed:
            wanted = weight + 6 / 2 * state[f"{prefix}.lora_B.weight"] @ state[f"{prefix}.lora_A.weight"]
            if method == "dora":
                wanted = state[f"{prefix}.lora_magnitude_vector"][:, None] * wanted / wanted.norm(dim=1, keepdim=True)
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6), name
        elif name.endswith("mixer_norm.weight"):
            assert torch.equal(found, state[f"{prefix}.weight"])
            assert not torch.equal(found, weight)
        else:
            assert torch.equal(found, weight), name


@pytest.mark.parametrize("method", METHODS)
def test_the_merge_into_the_dequantised_base_is_the_trained_model_and_the_nearer_is_kept(method):  # trap T11
    model = moved(AdapterConfig(method=method, rank=2))
    rows = batch()
    models, report = merge_both(model, lambda: tiny_model(**SMALL), model.peft_config["default"], [rows])
    chosen = rows["labels"][:, 1:] != -100
    with adapters.switched_off(model):
        off = logits(model, rows["input_ids"])

    def divergence(one, other):
        """Token by token: sum over the vocabulary of p (log p - log q), in nats, averaged."""
        p, q = (torch.softmax(part[:, :-1][chosen].double(), -1) for part in (one, other))
        return float((p * (p / q).log()).sum(-1).mean())

    trained = logits(model, rows["input_ids"])
    for merge in report.merges:
        other = logits(models[merge.name], rows["input_ids"])
        assert merge.kl_adapter == pytest.approx(divergence(trained, other), rel=1e-6, abs=1e-9)
        assert merge.kl_base == pytest.approx(divergence(off, other), rel=1e-6)
    assert report.adapter_kl_base == pytest.approx(divergence(trained, off), rel=1e-6)
    quantised = divergence(logits(tiny_model(**SMALL), rows["input_ids"]), off)
    assert report.base_kl_parent == pytest.approx(quantised, rel=1e-6)
    assert report.tokens == int(chosen.sum()) == 3 * 6
    # Logits of unit size through a dozen layers in fp32: the divergence is the square of their rounding.
    assert report.kept.name == DEQUANTISED
    assert report.kept.kl_adapter < 1e-8 < report.merges[1].kl_adapter
    assert report.faults() == []


def test_the_lower_divergence_wins_and_a_merge_that_costs_more_than_the_adapters_give_is_a_fault():  # trap T11
    def report(first, second, given):
        merges = (Merge(DEQUANTISED, first, 1.0, 2.0), Merge(PARENT, second, 1.0, 2.0))
        return MergeReport(merges, 2.0, given, 0.1, 9)

    assert report(0.3, 0.2, 1.0).kept.name == PARENT
    assert report(0.1, 0.2, 1.0).kept.name == DEQUANTISED
    assert report(0.3, 0.2, 0.25).faults() == []
    assert "costs 0.2 nats" in report(0.3, 0.2, 0.2).faults()[0]
    metrics = report(0.3, 0.2, 1.0).metrics()
    assert metrics["merge_kl_adapter_nats_per_token/dequantised_base"] == 0.3
    assert metrics["merge_kl_adapter_nats_per_token/parent"] == 0.2
    assert metrics["merge_kl_base_nats_per_token/parent"] == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_folder_loads_onto_the_parent_with_peft_and_is_written_alike_twice(method, tmp_path):
    from peft import PeftModel

    model = moved(AdapterConfig(method=method, rank=2, modules_to_save=["mlp_norm"]))
    sizes = [adapters.save_adapter(tmp_path / name, model, base="parent") for name in ("one", "two")]
    for name in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    # Sets have another order in another process.
    targets = json.loads((tmp_path / "one" / adapters.CONFIG_FILE).read_text())["target_modules"]
    assert targets == sorted(targets)
    assert sizes == [(tmp_path / "one" / adapters.WEIGHTS_FILE).stat().st_size] * 2
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that it is giving up.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        loaded = PeftModel.from_pretrained(tiny_model(**SMALL), tmp_path / "one").eval()
    merged = adapters.merged(tiny_model(**SMALL), adapters.adapter_state(model), model.peft_config["default"])
    assert torch.allclose(logits(loaded), logits(merged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(loaded), logits(tiny_model(**SMALL)), rtol=1e-2, atol=1e-2)


def test_an_empty_adapter_is_not_written(tmp_path):  # trap T4
    with pytest.raises(CheckpointError, match="is empty"):
        adapters.save_adapter(tmp_path / "adapter", adapted(AdapterConfig(rank=2)), base="parent")
    assert not (tmp_path / "adapter" / adapters.WEIGHTS_FILE).exists()


def test_adapters_of_another_shape_or_place_do_not_load():
    state = adapters.adapter_state(moved(AdapterConfig(rank=2)))
    with pytest.raises(CheckpointError, match=r"missing \['.*up_proj"):
        adapters.put_state(adapted(AdapterConfig(rank=2)), {k: v for k, v in state.items() if "up_proj" not in k})


@pytest.mark.parametrize(
    ("adapter", "tied", "path", "reason"),
    [
        ({"targets": ["in_prj"]}, True, "adapter.targets", r"got in_prj; did you mean in_proj, "),
        ({"targets": ["proj"]}, True, "adapter.targets", "got proj; did you mean"),
        ({"targets": ["lm_head"]}, True, "adapter.targets", "leave it out: it is tied"),
        ({"targets": ["lm_head"]}, False, "adapter.targets", "put it into adapter.modules_to_save"),
        ({"targets": ["mixer.conv1d"]}, True, "adapter.targets", "grouped convolution; put it into"),
        ({"targets": ["A_log"]}, True, "adapter.targets", "stays frozen in fp32; leave it out"),
        ({"rank": 6}, True, "adapter.rank", "at most 4, the narrower side of model.layers.1.mixer.gk_proj.0; got 6"),
        ({"modules_to_save": ["lm_head"]}, True, "adapter.modules_to_save", "are tied"),
        ({"modules_to_save": ["up_proj"]}, True, "adapter.modules_to_save", "put it into adapter.targets"),
        ({"modules_to_save": ["mixer_nrm"]}, True, "adapter.modules_to_save", "did you mean mixer_norm"),
    ],
)
def test_what_cannot_be_adapted_is_named_with_the_way_out(adapter, tied, path, reason):
    faults = adapter_faults(tiny_spec(**SMALL, tie_embeddings=tied), AdapterConfig(**{"rank": 2} | adapter))
    assert [fault.path for fault in faults] == [path]
    assert re.search(reason, faults[0].message)


def test_all_faults_of_an_adapter_are_gathered_and_good_ones_have_none():
    spec = tiny_spec(**SMALL, tie_embeddings=False)
    bad = AdapterConfig(targets=["nope", "out_proj"], modules_to_save=["nope"], rank=512)
    assert len(adapter_faults(spec, bad)) == 3
    good = AdapterConfig(
        targets=["layers.0", "mlp", "gk_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"], rank=2
    )
    assert adapter_faults(spec, good) == []


def test_zero3_is_refused_with_the_way_out():
    assert [engine_faults(name) for name in ("zero0", "zero1", "zero2")] == [[], [], []]
    assert "set zero2" in engine_faults("zero3")[0].message
    assert engine_faults("zero3_cpu_offload")[0].path == "deepspeed"
