"""QLoRA end to end on one CPU rank under real DeepSpeed and TRL; kills, stops and ranks: see the fine-tuning lives."""

from __future__ import annotations

import json
import warnings

import finetune_cases as cases
import pytest
import torch
from tiny_run import Log, spec

from model.projections import projections
from stages.qlora import QLoRA
from stages.runtime import adapters
from stages.runtime.audit import AuditError

CASE = cases.CASES["qlora"]
RUNS = {
    "lora": {"deepspeed": "zero1", "lr": 2e-2, "rewarm": True},
    "dora": {
        "deepspeed": "zero2",
        "precision": "bf16",
        "activation_checkpointing": True,
        "adapter": {"method": "dora", "rank": 2, "targets": ["mixer"], "modules_to_save": ["mlp_norm"]},
        "quantisation": {"blocksize": 128, "double_quant": False},
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return cases.make_inputs(CASE, tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    """Output folder, result and rows of each run, made once."""
    found = {}

    def run(name):
        if name not in found:
            log = Log()
            at = cases.context(CASE, tmp_path_factory.mktemp(name), inputs, tracker=log, **RUNS[name])
            found[name] = (at, QLoRA().run(at), log)
        return found[name]

    return run


def parent_model(inputs):
    from transformers import AutoModelForCausalLM

    import model

    model.register()
    return AutoModelForCausalLM.from_pretrained(inputs["from_"] / "output").eval()


def heldout_ids(inputs):
    from data.conversations import read_conversations
    from data.tokenizer import load

    path, tokenizer = inputs["data"] / "output" / "heldout.jsonl", load(inputs["from_"] / "output")
    return read_conversations(path, tokenizer, max_length=64, over_length="drop")[0]


@torch.no_grad()
def nats_per_token(model, conversations):
    """One conversation at a time, without padding."""
    nats = scored = 0
    for row in conversations:
        logprobs = torch.log_softmax(model(torch.tensor([row.ids])).logits[0, :-1].double(), -1)
        for place, label in enumerate(row.labels[1:]):
            if label != -100:
                nats -= float(logprobs[place, label])
                scored += 1
    return nats / scored


@pytest.mark.parametrize("name", list(RUNS))
def test_the_output_is_the_merged_model_and_the_adapter_loads_onto_the_parent(done, inputs, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    at, result, _ = done(name)
    parent = parent_model(inputs)
    merged = AutoModelForCausalLM.from_pretrained(at.output).eval()
    changed = {key for key, weight in merged.state_dict().items() if not torch.equal(weight, parent.state_dict()[key])}
    assert all("proj" in key or "mlp_norm" in key for key in changed)
    assert (at.output / "info.json").read_bytes() == (inputs["from_"] / "output" / "info.json").read_bytes()
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that it is giving up.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = PeftModel.from_pretrained(parent, at.output / "adapter").eval()
    rows = heldout_ids(inputs)
    # What was reported of each way is what the files give; fp32, sums of logits of unit size.
    metrics = result.metrics
    assert nats_per_token(merged, rows) == pytest.approx(metrics["merge_nats_per_token/dequantised_base"], abs=1e-5)
    assert nats_per_token(adapted, rows) == pytest.approx(metrics["merge_nats_per_token/parent"], abs=1e-5)


@pytest.mark.parametrize("name", list(RUNS))
def test_both_merges_are_measured_and_the_nearer_is_kept(done, name):  # trap T11
    at, result, _ = done(name)
    written = json.loads((at.output / "evaluation.json").read_text())["metrics"]
    for metrics in (result.metrics, written):
        costs = {way: metrics[f"merge_kl_adapter_nats_per_token/{way}"] for way in ("dequantised_base", "parent")}
        assert metrics["merge_kept"] == min(costs, key=costs.get) == "dequantised_base"
        assert 0 <= costs["dequantised_base"] < 1e-6 < costs["parent"] < metrics["adapter_kl_base_nats_per_token"]
        assert metrics["merge_kl_base_nats_per_token/parent"] > 0
        assert metrics["base_kl_parent_nats_per_token"] > 0
    # Every held-out answer ends once; the merges were compared on all of them.
    assert written["merge_scored_tokens"] == written["scored_tokens"]


def test_the_loss_falls_and_its_interval_is_paired(done):
    _, result, log = done("lora")
    metrics = result.metrics
    change = metrics["nats_per_token"] - metrics["before/nats_per_token"]
    assert metrics["change_nats_per_token"] == pytest.approx(change, abs=1e-12)
    assert metrics["change_nats_per_token_low"] < change < metrics["change_nats_per_token_high"] < 0
    assert metrics["nats_per_token_low"] < metrics["nats_per_token"] < metrics["nats_per_token_high"]
    assert log.of("eval", "nats_per_token")[0] == metrics["before/nats_per_token"]


def test_sizes_are_counted(done, inputs):
    at, result, _ = done("lora")
    metrics = result.metrics
    parameters = sum(parameter.numel() for parameter in parent_model(inputs).parameters())
    assert metrics["base_fp32_bytes"] == 4 * parameters == 4 * metrics["parameters"]
    assert metrics["base_bytes"] < metrics["base_fp32_bytes"]
    assert metrics["adapter_bytes"] == 4 * metrics["trainable_parameters"]
    assert metrics["trainable_parameters"] == QLoRA.plan(at.config, at.model, 1)["adapter_parameters"]


def test_checkpoints_hold_adapters_and_no_weight_of_the_base(done):
    at, _, _ = done("lora")
    path = next((at.directory / "checkpoints").rglob("mp_rank_00_model_states.pt"))
    names = torch.load(path, weights_only=False)["module"]
    weights = [name for name in names if name.endswith((".weight", ".bias", ".A_log", ".D", ".dt_bias"))]
    # DeepSpeed knows a tied weight by the embedding's name, leaves that out, and keeps it under the head's.
    weights.remove("base_model.model.lm_head.weight")
    assert len(weights) == 2 * len(projections(at.model))
    assert all(".lora_" in name for name in weights)


def test_an_adapter_that_has_no_effect_stops_the_run_before_the_first_step(inputs, tmp_path, monkeypatch):  # trap K8
    from stages.runtime.qlora_tuning import AdapterProbeError

    real = adapters.attach

    def bypassed(model, config):
        wrapped = real(model, config)
        layer = wrapped.get_submodule("base_model.model.model.layers.0.mixer.out_proj")
        monkeypatch.setattr(layer, "forward", layer.base_layer.forward)
        return wrapped

    monkeypatch.setattr(adapters, "attach", bypassed)
    with pytest.raises(AdapterProbeError, match=r"out_proj changes no output.*choose other adapter\.targets"):
        QLoRA().run(cases.context(CASE, tmp_path, inputs, **RUNS["lora"]))
    assert not (tmp_path / "checkpoints").exists()


def test_frozen_adapters_are_not_called_done(inputs, tmp_path, monkeypatch):  # trap T4
    from stages.runtime.optimizer import GatedAdamW

    monkeypatch.setattr(GatedAdamW, "step", lambda self, closure=None: self.gate() and None)
    with pytest.raises(AuditError, match=r"no weight changed.*adapters never left zero"):
        QLoRA().run(cases.context(CASE, tmp_path, inputs, max_steps=1, **RUNS["lora"]))
    assert not (tmp_path / "output.tmp" / "adapter").exists()


def test_faults_are_gathered_before_anything_is_loaded():
    bad = cases.config(
        CASE,
        deepspeed="zero3",
        max_length=999,
        adapter={"rank": 2, "targets": ["in_prj"], "modules_to_save": ["lm_head"]},
    )
    paths = sorted(fault.path for fault in QLoRA.check(bad, spec()))
    assert paths == ["adapter.modules_to_save", "adapter.targets", "deepspeed", "max_length"]
    assert QLoRA.check(cases.config(CASE), spec()) == []
    with pytest.raises(ValueError, match="blocksize"):
        cases.config(CASE, quantisation={"blocksize": 48})


def test_a_rate_above_the_parents_last_needs_to_be_asked_for(inputs):  # trap T1
    high = cases.config(CASE, lr=1.0)
    assert [fault.path for fault in QLoRA.check_parents(high, spec(), inputs)] == ["lr"]
    assert QLoRA.check_parents(cases.config(CASE, lr=1.0, rewarm=True), spec(), inputs) == []
