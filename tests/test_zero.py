"""What is put in place of DeepSpeed's own under ZeRO-2: the norm of sharded gradients and their clipping."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import config, spec

from model.config import HybridConfig
from model.init import no_decay
from model.lm import HybridForCausalLM
from stages.runtime import distributed, ds_config, rng, zero
from stages.runtime.engine import TrainingEngine, prepare_environment
from stages.runtime.optimizer import make_optimizer


@pytest.fixture(scope="module", autouse=True)
def group():
    prepare_environment()
    distributed.init_process_group()
    return torch.distributed.group.WORLD


def build(engine, monkeypatch=None, limit=0.1):
    rng.seed_all(3)
    model = HybridForCausalLM(HybridConfig.from_spec(spec(), eos_token_id=0, pad_token_id=1))
    facts = ds_config.engine_facts(engine)
    settings = ds_config.engine_config(
        facts, global_batch_size=4, micro_batch_size=2, world_size=1, max_grad_norm=limit, precision="fp32"
    )
    if monkeypatch is not None:
        monkeypatch.setattr(zero, "attach", lambda *args: None)
    return TrainingEngine(model, make_optimizer(model, config(), decay_embeddings=False, exempt=no_decay), settings)


def steps(wrapped):
    seen = []
    for step in range(2):
        for micro in range(2):
            ids = torch.randint(2, 320, (2, 32), generator=torch.Generator().manual_seed(2 * step + micro))
            wrapped.accumulate({"input_ids": ids, "labels": ids}, 124)
        norm, _ = wrapped.step(1e-2, lambda norm: None)
        seen.append((norm, [parameter.detach().clone() for parameter in wrapped.model.parameters()]))
    return seen


@pytest.mark.parametrize("limit", [0.1, 1e6, 0.0])
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_norms_and_steps_clipped_or_not_are_deepspeeds_own_to_the_last_bit(engine, limit, monkeypatch):
    ours = steps(build(engine, limit=limit))
    theirs = steps(build(engine, monkeypatch, limit))
    for (norm, weights), (expected, others) in zip(ours, theirs, strict=True):
        assert norm == expected > 0.1
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_a_step_within_the_limit_makes_no_pass_over_its_gradients(monkeypatch):
    wrapped, passes, real = build("zero2", limit=1e6), [], torch._foreach_mul_

    def noted(tensors, factor):
        passes.append(factor)
        real(tensors, factor)

    monkeypatch.setattr(torch, "_foreach_mul_", noted)
    steps(wrapped)
    assert passes == []
    steps(build("zero2", limit=0.1))
    assert len(passes) == 2 * len(wrapped.optimizer.param_groups)
    assert all(0 < factor < 1 for factor in passes)


def test_a_norm_is_the_root_of_all_squares_in_double_precision(group):
    drawn = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=drawn) * scale for shape, scale in (((300, 70), 1e-3), ((5,), 1e4))]
    squares = math.fsum(value * value for gradient in gradients for value in gradient.double().flatten().tolist())
    found = zero.grad_norm([*gradients, torch.zeros(9)], None, group=group)
    # fp64 sums are exact here to far below the two roundings to fp32, of the sum and of its root.
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(math.sqrt(squares), rel=2**-23)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_norm_that_is_not_finite_is_told_as_deepspeed_expects(group, bad):
    assert float(zero.grad_norm([torch.ones(3), torch.tensor([1.0, bad])], None, group=group)) == -1.0
