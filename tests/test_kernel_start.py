"""Before and at the first step: fast kernels asked for, kernel caches, warming up, and what the wait is."""

from __future__ import annotations

import importlib.util
import threading

import pytest
import torch
from test_kernels import on_hopper
from tiny_run import config, spec

from model import fast
from model.config import HybridConfig
from model.kernels.limits import KERNELS
from model.lm import HybridForCausalLM
from model.presets import preset
from model.spec import ModelSpec
from pipelines.run import main
from stages.base import ConfigError
from stages.runtime.kernel_cache import INDUCTOR, KEPT_TUNING, TRITON, kernel_cache, use_kernel_cache
from stages.runtime.patience import patience
from stages.runtime.pretraining_engine import backend_lines
from stages.runtime.warm_up import random_batch, warm_up


def slow_on_hopper(monkeypatch, model: ModelSpec, *absent: str, precision: str = "bf16", capability=(9, 0)):
    on_hopper(monkeypatch, capability=capability)
    missing = {name: [one for one in facts.packages if one in absent] for name, facts in KERNELS.items()}
    monkeypatch.setattr(fast, "absent_packages", missing.__getitem__)
    return fast.slow_layers(model, precision)


def with_mixer(word: str, **changes) -> ModelSpec:
    fields = preset("nano_helix").model_dump()
    fields["mixers"][word] |= changes
    return ModelSpec.model_validate(fields)


@pytest.mark.parametrize("name", ["hybrid_1b3", "chimera_700m", "helix_900m"])
def test_presets_are_fast_where_everything_is_installed(name, monkeypatch):
    assert slow_on_hopper(monkeypatch, preset(name)) == {}


def test_a_slow_layer_is_named_with_its_mixer_and_what_is_missing(monkeypatch):
    model = preset("nano_helix")  # mamba2, three gla, local
    assert slow_on_hopper(monkeypatch, model, "fla") == {}
    found = slow_on_hopper(monkeypatch, model, "fla", "triton")
    assert found.keys() == {"gla"}
    assert "in layers 1, 2, 3 (gla); triton needs triton, not installed; fla needs fla, not installed" in found["gla"]
    both = slow_on_hopper(monkeypatch, model, "causal_conv1d", "triton")
    assert "triton needs triton" in both["mamba2"]
    assert "mamba_ssm needs causal_conv1d, not installed" in both["mamba2"]


@pytest.mark.parametrize(
    ("model", "how", "word", "why"),
    [
        (with_mixer("gla", backend="torch"), {}, "gla", "torch is none for packed rows; set auto"),
        (with_mixer("local", global_tokens=0, window=None, backend="sdpa_cudnn"), {}, "local", "none for packed rows"),
        (with_mixer("gla", head_k_dim=32), {}, "gla", "head_k_dim must be one of [64, 128] for backend fla; got 32"),
        (preset("nano_helix"), {"precision": "fp32"}, "local", "flex takes half precision, and precision is fp32"),
        (preset("nano_helix"), {"capability": (8, 0)}, "mamba2", "mamba_ssm is not tested on compute capability 8.0"),
    ],
)
def test_every_reason_for_a_slow_layer_is_said(model, how, word, why, monkeypatch):
    assert why in slow_on_hopper(monkeypatch, model, **how)[word]


def test_require_fast_kernels_refuses_before_anything_runs(tmp_path, capsys):
    runs = tmp_path / "runs"
    for how in (["--all"], ["--stage", "pretrain"]):
        assert main([*how, "--require-fast-kernels", "--runs", str(runs)]) == 2
        told = capsys.readouterr().err
        assert "model.mixers.attention.backend: must be a kernel tested for the device in layers 4 (attention)" in told
        assert "(--require-fast-kernels, pretrain)" in told
    assert not runs.exists() or not any(runs.rglob("stage.json"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--plan", "--require-fast-kernels"], "belongs to --all and --stage"),
        (["--all", "--warm-up"], "belongs to --stage"),
        (["--stage", "sft", "--warm-up"], "must name one pretrain stage"),
    ],
)
def test_flags_without_a_stage_to_serve_are_refused(words, told, tmp_path, capsys):
    assert main([*words, "--runs", str(tmp_path / "runs")]) == 2
    assert told in capsys.readouterr().err


def test_the_cache_directory_is_set_but_never_over_what_the_operator_set(tmp_path):
    environment = {TRITON: "/elsewhere/t"}
    use_kernel_cache(tmp_path / "k", environment)
    assert environment == {TRITON: "/elsewhere/t", INDUCTOR: str(tmp_path / "k" / "inductor"), KEPT_TUNING: "1"}
    assert kernel_cache(environment) == f"/elsewhere/t and {tmp_path / 'k' / 'inductor'}"
    plain: dict[str, str] = {}
    use_kernel_cache(tmp_path / "k", plain)
    assert kernel_cache(plain) == str(tmp_path / "k")


def test_a_warm_up_steps_at_the_runs_shapes_and_leaves_the_weights_alone(capsys, monkeypatch):
    from stages.runtime.engine import TrainingEngine

    shapes, sums = [], []
    real = TrainingEngine.accumulate

    def watched(self, inputs, n_tokens):
        shapes.append((tuple(inputs["input_ids"].shape), "seq_idx" in inputs))
        sums.append(sum(float(p.detach().double().abs().sum()) for p in self.model.parameters()))
        return real(self, inputs, n_tokens)

    monkeypatch.setattr(TrainingEngine, "accumulate", watched)
    warm_up(config(), spec(), seed=17)
    # Two steps of two micro-batches, dense and packed.
    assert shapes == [((2, 32), False)] * 4 + [((2, 32), True)] * 4
    assert len(set(sums)) == 1
    told = capsys.readouterr().out
    assert "compiling and autotuning kernels for packed rows" in told
    assert "kernels are kept in" in told


def test_packed_warm_up_rows_number_their_documents():
    batch = random_batch(50, 1, 600, packed=True)
    assert batch["seq_idx"][0, [0, 255, 256, 599]].tolist() == [0, 0, 1, 2]
    assert batch["position_ids"][0, [0, 255, 256, 599]].tolist() == [0, 255, 0, 87]


def test_a_long_wait_is_told_at_once_meanwhile_and_at_its_end():
    lines: list[str] = []
    beaten = threading.Event()

    def say(text: str) -> None:
        lines.append(text)
        if "so far" in text:
            beaten.set()

    with patience(say, "compiling", "done", every_s=0.001):
        assert lines == ["compiling"] or beaten.is_set()
        assert beaten.wait(30)
    assert lines[0] == "compiling"
    assert lines[-1] == "done after 0s"
    assert not [thread for thread in threading.enumerate() if thread.name == "patience"]


def test_a_wait_that_ends_in_an_error_says_nothing_of_done():
    lines: list[str] = []
    with pytest.raises(RuntimeError), patience(lines.append, "compiling", "done"):
        raise RuntimeError
    assert lines == ["compiling"]


def test_the_first_step_of_a_compiling_run_says_what_the_wait_is(tmp_path, capsys, monkeypatch):
    from tiny_run import context, make_tokens

    from stages.pretrain import Pretrain
    from stages.runtime import pretraining_engine

    monkeypatch.setattr(pretraining_engine, "compile_parts", lambda model: None)
    Pretrain().run(context(tmp_path / "run", make_tokens(tmp_path / "tokens"), compile=True, max_steps=3))
    told = capsys.readouterr().out.splitlines()
    waits = [line for line in told if line.startswith("compiling and autotuning kernels: the first step can take")]
    ends = [line for line in told if line.startswith("first step done after ")]
    assert (len(waits), len(ends)) == (1, 1)
    first = next(line for line in told if line.startswith("step 1/3"))
    assert told.index(waits[0]) < told.index(first) < told.index(ends[0])
    assert torch.is_grad_enabled()


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_a_backend_that_is_not_there_is_one_fault_of_the_recipe():  # trap K2
    model = with_mixer("local", backend="flash_attn", window=None, global_tokens=0)
    built = HybridForCausalLM(HybridConfig.from_spec(model, eos_token_id=0, pad_token_id=1))
    with pytest.raises(ConfigError, match=r"must name what is installed; got flash_attn.*set backend: auto"):
        backend_lines(built, "bf16")
