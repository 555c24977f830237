"""`precision: fp8` and `residual` of a pretraining run: what is refused, what enters the key, that a run takes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import config, context, make_tokens, spec

from model import projections
from model.config import HybridConfig
from model.lm import HybridForCausalLM
from model.presets import PRESETS, preset
from stages.base import ConfigError
from stages.pretrain import Pretrain
from stages.runtime import fp8_limits
from stages.runtime.pretraining_engine import checked_engine_config, prepare_model

ROOT = Path(__file__).resolve().parents[1]


def built(model=None) -> HybridForCausalLM:
    torch.manual_seed(3)
    return HybridForCausalLM(HybridConfig.from_spec(model or spec(), eos_token_id=0, pad_token_id=1)).float()


@pytest.fixture
def small_fp8(monkeypatch):
    """Projections of 16 and more in 8 bits, which the CPU emulates."""
    import model.fp8

    monkeypatch.setattr(model.fp8, "SMALLEST", 16)
    monkeypatch.setattr(projections, "FP8_SMALLEST", 16)


@pytest.mark.parametrize("name", PRESETS)
def test_the_plan_and_the_model_take_the_same_projections(name):
    from model.fp8 import takes

    sizes = projections.projections(preset(name))
    assert projections.fp8_projections(sizes) == [one for one, size in sizes.items() if takes(*size)]


def test_sizes_that_fp8_does_not_take_are_refused_together_with_the_way_out():
    model = preset("hybrid_1b3").model_copy(update={"d_ff": 4090})
    faults = fp8_limits.fp8_model_faults("fp8", model, 1000)
    assert [fault.path for fault in faults] == ["precision"] * 2
    assert "got 4090; set model.d_ff to 4096, or precision to bf16" in faults[0].message
    assert "got 1000; set seq_len to 1008, or precision to bf16" in faults[1].message
    assert "gains nothing" in fp8_limits.fp8_model_faults("fp8", preset("nano_hybrid"), 512)[0].message
    assert fp8_limits.fp8_model_faults("bf16", model, 1000) == []
    assert fp8_limits.fp8_model_faults("fp8", preset("hybrid_1b3"), 4096) == []


@pytest.mark.parametrize(
    ("capability", "told"),
    [(None, "needs a GPU"), ((8, 0), "needs compute capability 8.9 or more; got 8.0"), ((8, 9), None), ((9, 0), None)],
)
def test_devices_without_fp8_are_refused(capability, told, monkeypatch):
    monkeypatch.setattr(fp8_limits.importlib.util, "find_spec", lambda name: name)
    faults = fp8_limits.fp8_device_faults("fp8", capability)
    assert [told in fault.message and "set precision to bf16" in fault.message for fault in faults] == [True] * bool(
        told
    )


def test_a_machine_without_triton_is_refused_and_a_plan_asks_no_device(monkeypatch):
    monkeypatch.setattr(fp8_limits.importlib.util, "find_spec", lambda name: None)
    assert "triton, which is not installed" in fp8_limits.fp8_machine_faults("fp8", True)[0].message
    assert fp8_limits.fp8_machine_faults("fp8", None) == []
    with pytest.raises(ConfigError, match="precision: fp8 needs a GPU"):
        checked_engine_config(config(precision="fp8"))


def test_a_large_projection_that_stays_in_bf16_is_said():
    fields = preset("hybrid_1b3").model_dump()
    fields["mixers"]["gated"] |= {"n_heads": 12, "head_dim": 90}
    lines = fp8_limits.fp8_lines(type(preset("hybrid_1b3"))(**fields), "fp8")
    # Outputs may be any number, inputs may not: q is taken, o is not.
    assert lines[1:] == ["fp8: mixer.o_proj (1080 x 2048) stays in bf16: inputs must be a multiple of 16"]
    # 40 heads leave helix's input projection at 2 x 2560 + 2 x 128 + 40 = 5416 outputs.
    assert len(fp8_limits.fp8_lines(preset("helix_900m"), "fp8")) == 1
    assert fp8_limits.fp8_lines(preset("helix_900m"), "bf16") == []


@pytest.mark.parametrize(
    ("vocab_size", "told"), [(50304, "the head's gradients too; its logits and"), (1008, "the head and")]
)
def test_what_of_the_head_runs_in_8_bits_is_said(vocab_size, told):
    model = preset("hybrid_1b3").model_copy(update={"vocab_size": vocab_size})
    assert fp8_limits.fp8_lines(model, "fp8") == [f"fp8: 126 of 138 projections, {told} the rest in bf16"]


def test_the_residual_is_part_of_the_key_only_where_it_is_not_the_default():
    plain, narrow = (
        json.dumps(Pretrain.key_config(config(precision="bf16", **more))) for more in ({}, {"residual": "bf16"})
    )
    assert "residual" not in plain
    assert json.loads(narrow) == json.loads(plain) | {"residual": "bf16"}
    assert [fault.path for fault in Pretrain.check(config(residual="bf16"), spec())] == ["residual"]


@pytest.mark.parametrize(("residual", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_stream_between_blocks_has_the_dtype_that_is_asked_for(residual, dtype):
    model, seen = built(), []
    prepare_model(model, config(precision="bf16", residual=residual))
    for block in model.model.layers:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(32)[None], use_cache=False)
    assert seen == [(dtype, dtype)] * 3


def test_a_run_in_fp8_with_a_narrow_stream_trains_resumes_and_keeps_its_names(tmp_path, small_fp8, monkeypatch):
    from model import fp8
    from stages.runtime import pretraining_engine

    monkeypatch.setattr(pretraining_engine, "fp8_device_faults", lambda *_: [])
    tokens, names = make_tokens(tmp_path / "tokens"), [name for name, _ in built().named_parameters()]
    changes = {"precision": "fp8", "residual": "bf16", "checkpoint_every_steps": 2, "deepspeed": "zero1"}
    found, casts = {}, {}
    for name in ("whole", "resumed", "cast anew for each micro-batch"):
        at, kept = context(tmp_path / name.split()[0], tokens, **changes), []
        with monkeypatch.context() as patch:
            real = (lambda *_: None) if "anew" in name else fp8.keep_casts
            patch.setattr(fp8, "keep_casts", lambda *given, real=real, kept=kept: kept.append(real(*given)))
            if name == "resumed":
                _stopped_after(at, 4, monkeypatch)
            run = Pretrain().run(at)
        found[name] = (at.output / "model.safetensors").read_bytes(), run.metrics["final_loss_nats_per_token"]
        casts[name] = len(kept)
    assert len(set(found.values())) == 1
    assert casts["whole"] == run.metrics["steps"], "asked for before the first of two micro-batches"
    model = built()
    prepare_model(model, config(**changes))
    assert [name for name, _ in model.named_parameters()] == names
    assert any(isinstance(module, fp8.Float8Linear) for module in model.modules())
    assert isinstance(model.lm_head, fp8.Float8LMHead)


def _stopped_after(at, step: int, monkeypatch) -> None:
    """Run until the checkpoint of ``step`` stands, then break off."""
    from stages.runtime.loop import TrainLoop

    real = TrainLoop._train_step

    def broken(self):
        if self.state.step == step:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoop, "_train_step", broken)
        with pytest.raises(KeyboardInterrupt):
            Pretrain().run(at)


def test_the_parity_benchmark_trains_both_and_writes_a_row_each(tmp_path, small_fp8, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fp8_parity

    ids = np.random.default_rng(0).integers(2, 60, 40 * 32)
    ids[::50] = 1
    np.concatenate([[1, 64], ids]).astype("<u2").tofile(tmp_path / "tokens.bin")
    words = ["--tokens", tmp_path / "tokens.bin", "--d-model", 128, "--d-ff", 64, "--layers", "mamba2 gated",
             "--seq-len", 32, "--rows", 4, "--steps", 3, "--heldout-rows", 8, "--eager",
             "--result", tmp_path / "r.json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["fp8_parity.py"])
    assert fp8_parity.main([str(word) for word in words]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["bf16", "fp8"]
    wanted = (
        "preset scope precision tokens_per_s micro_batch_size seq_len peak_bytes hardware versions commit date command"
    )
    assert all(set(wanted.split()) <= row.keys() for row in rows)
    assert rows[0]["heldout_nats_per_token"] != rows[1]["heldout_nats_per_token"]
    printed = capsys.readouterr().out
    assert "fp8 passes" in printed
    assert "the head's gradients too" in printed
