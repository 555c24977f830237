"""What AdamW decays, and that it takes a step only when it may."""

from __future__ import annotations

import pytest
import torch
from tiny_run import spec

from model.config import HybridConfig
from model.init import fp32_islands, no_decay
from model.lm import HybridForCausalLM
from stages.runtime.optimizer import adamw, parameter_groups


def build(**changes):
    return HybridForCausalLM(HybridConfig.from_spec(spec(**changes), eos_token_id=0, pad_token_id=1))


def names(model, groups):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{by_id[id(parameter)] for parameter in group["params"]} for group in groups]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_every_parameter_is_in_one_group_and_only_matrices_are_decayed(tied, decay_embeddings):  # trap K7
    model = build(tie_embeddings=tied)
    groups = parameter_groups(model, weight_decay=0.1, decay_embeddings=decay_embeddings, exempt=no_decay)
    decayed, kept = names(model, groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert decayed | kept == {name for name, _ in model.named_parameters()}
    assert not decayed & kept
    shapes = {name: parameter.dim() for name, parameter in model.named_parameters()}
    assert all(shapes[name] >= 2 for name in decayed)
    assert fp32_islands(model) <= kept
    assert {name for name in shapes if name.endswith(("A_log", ".D", "dt_bias", "bias")) or "norm" in name} <= kept
    embeddings = {name for name in shapes if "embed" in name or "lm_head" in name}
    assert len(embeddings) == (1 if tied else 2)
    assert embeddings <= (decayed if decay_embeddings else kept)


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_refused():
    model = build()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="must have a trainable parameter"):
        parameter_groups(model, weight_decay=0.1, decay_embeddings=False, exempt=no_decay)
    model.lm_head.weight.requires_grad_(True)
    (group,) = parameter_groups(model, weight_decay=0.1, decay_embeddings=True, exempt=no_decay)
    assert group["params"] == [model.lm_head.weight]


def test_the_optimizer_takes_a_step_only_while_its_gate_is_open():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = adamw([{"params": [weight], "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8)
    optimizer.param_groups[0]["lr"] = 0.5
    weight.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0, 1.0]
    assert not optimizer.state
    optimizer.gate = lambda: True
    optimizer.step()
    # The first Adam step is lr in the gradient's direction, whatever its size.
    assert weight.tolist() == pytest.approx([0.5, 1.5, 0.5])
