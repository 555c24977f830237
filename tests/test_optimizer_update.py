"""Muon's and the 8-bit optimizer's arithmetic, their groups, gates and bytes, on one tensor or one tiny model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from tiny_run import config, spec

from model import cost
from model.config import HybridConfig
from model.init import fp32_islands, no_decay
from model.lm import HybridForCausalLM
from model.projections import projections
from stages.pretrain import Pretrain
from stages.runtime import flat
from stages.runtime.optimizer import make_optimizer
from stages.runtime.optimizer_8bit import BLOCK, AdamW8bit, blocked
from stages.runtime.optimizer_muon import Muon, orthogonal

KINDS = ("adamw", "adamw_8bit", "muon")
WIDE = {"d_model": 64, "d_ff": 96}
"""A tiny model some of whose projections have 4,096 weights or more, and some fewer."""


def build(kind, *, decay_embeddings=False, **changes):
    torch.manual_seed(5)
    model = HybridForCausalLM(HybridConfig.from_spec(spec(**WIDE, **changes), eos_token_id=0, pad_token_id=1))
    made = make_optimizer(model, config(optimizer={"kind": kind}), decay_embeddings=decay_embeddings, exempt=no_decay)
    return model, made


def set_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def take_steps(model, optimizer, count, lr=1e-2):
    for step in range(count):
        set_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.gate = lambda: True
        optimizer.step()
        optimizer.gate = lambda: False


@pytest.mark.parametrize("shape", [(48, 48), (32, 80), (80, 32)])
def test_orthogonalised_matrices_have_singular_values_near_one_and_their_own_directions(shape):
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(1)), False)
    matrix = left @ torch.diag(torch.linspace(0.2, 1.0, min(shape))) @ right
    found = orthogonal(matrix)
    # On the diagonal of the directions the polynomial x -> a x + b x^3 + c x^5 alone is at work.
    values = torch.linspace(0.2, 1.0, min(shape), dtype=torch.float64) / matrix.double().norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert 0.6 < values.min() <= values.max() < 1.3
    # An error of rounding, u sqrt(n) at each product, grows by the polynomial's slope, at most 3.4445 a time.
    bound = 2**-24 * math.sqrt(max(shape)) * 3.4445**5
    assert (left.T @ found @ right.T - torch.diag(values).float()).abs().max() < bound


def test_nothing_in_is_nothing_out():
    assert orthogonal(torch.zeros(8, 4)).tolist() == [[0.0] * 4] * 8


def test_a_muon_step_is_the_papers_formula_at_the_size_of_adamws():
    weight = torch.nn.Parameter(torch.full((30, 50), 0.5))
    optimizer = Muon([{"params": [weight], "weight_decay": 0.1, "own": True}], momentum=0.9, lr=0.0, fused=True)
    optimizer.gate = lambda: True
    expected, momentum = weight.detach().clone().double(), torch.zeros(30, 50, dtype=torch.float64)
    for step in range(2):
        gradient = torch.randn(30, 50, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        change = orthogonal((gradient + 0.9 * momentum).float()).double()
        assert change.square().mean().sqrt() == pytest.approx(1 / math.sqrt(50), rel=0.3)
        expected = (1 - 0.01 * 0.1) * expected - 0.01 * 0.2 * math.sqrt(50) * change
        assert (weight - expected).abs().max() < 1e-6


def test_an_8bit_step_is_that_of_bitsandbytes_own_optimizer():
    import bitsandbytes as bnb

    start = torch.randn(70, 90, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    group = {"params": [ours], "weight_decay": 0.1, "own": True}
    optimizer = AdamW8bit([group], lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)
    optimizer.gate = lambda: True
    reference = bnb.optim.AdamW8bit([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(4):
        gradient = torch.randn(70, 90, generator=torch.Generator().manual_seed(step + 1))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(ours, theirs)
    assert torch.equal(optimizer.state[ours]["codes1"].view(70, 90), reference.state[theirs]["state1"])
    assert torch.equal(optimizer.state[ours]["scales2"], reference.state[theirs]["absmax2"])


def test_partitions_tell_every_element_once_and_which_matrices_are_cut():
    shapes, offsets = [(4, 5), (10,), (6, 6), (2, 3)], [0, 20, 30, 66]
    layouts = [flat.partition(shapes, offsets, 24, rank) for rank in range(3)]
    assert [[piece.numel for piece in layout.pieces] for layout in layouts] == [
        [20, 4, 0, 0],
        [0, 6, 18, 0],
        [0, 0, 18, 6],
    ]
    assert [[piece.is_cut for piece in layout.pieces] for layout in layouts] == [[False, True, True, False]] * 3
    whole = torch.arange(72)
    for rank, layout in enumerate(layouts):
        for piece, offset in zip(layout.pieces, offsets, strict=True):
            mine = whole[rank * 24 :][piece.at : piece.at + piece.numel]
            assert torch.equal(mine, whole[offset:][piece.start : piece.start + piece.numel])


def test_blocks_follow_each_parameter_wherever_it_lies():
    size = 900
    layout = flat.partition([(30, 40), (20, 20)], [0, 1200], size, 1)
    # The first parameter's 300 elements from 900 on: 124 to the end of its fourth block, then 176; then 400.
    assert [(span.at, span.numel, span.scale) for span in blocked(layout)] == [
        (0, 124, 0),
        (124, 176, 1),
        (300, 400, 2),
    ]
    assert (900 + 124) % BLOCK == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["adamw_8bit", "muon"])
def test_projections_alone_are_the_optimizers_own_and_all_else_is_adamws(kind, tied):
    model, optimizer = build(kind, tie_embeddings=tied)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {names[id(p)] for group in optimizer.param_groups if group["own"] for p in group["params"]}
    rest = {names[id(p)] for group in optimizer.param_groups if not group["own"] for p in group["params"]}
    expected = {f"{name}.weight" for name in projections(spec(**WIDE))}
    if kind == "adamw_8bit":
        expected = {name for name in expected if dict(model.named_parameters())[name].numel() >= 4096}
        assert expected < {f"{name}.weight" for name in projections(spec(**WIDE))}
    assert own == expected
    assert own | rest == set(names.values())
    assert not own & rest
    assert {name for name in names.values() if "conv" in name or "embed" in name or "lm_head" in name} <= rest


@pytest.mark.parametrize("decay_embeddings", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_biases_decay_rates_and_embeddings_are_not_decayed_unless_asked(kind, decay_embeddings):  # trap K7
    model, optimizer = build(kind, decay_embeddings=decay_embeddings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.gate = lambda: True
    optimizer.step()
    # With no gradient, decay is all that moves a weight: by 1 - lr times 0.1.
    kept = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    vectors = {name for name, parameter in model.named_parameters() if parameter.dim() < 2}
    embeddings = set() if decay_embeddings else {name for name in before if "embed" in name or "lm_head" in name}
    assert kept == vectors | fp32_islands(model) | embeddings
    for name in before.keys() - kept:
        assert torch.allclose(dict(model.named_parameters())[name], 0.95 * before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shut_gate_leaves_weights_and_state_alone(kind):
    model, optimizer = build(kind)
    take_steps(model, optimizer, 1)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    set_gradients(model, 9)
    optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for number, held in state["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][number][k])) for k, v in held.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_goes_on_as_if_it_had_never_been_saved(kind, tmp_path):  # trap T6
    model, optimizer = build(kind)
    take_steps(model, optimizer, 2)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved")
    take_steps(model, optimizer, 2)
    again, other = build(kind)
    weights, state = torch.load(tmp_path / "saved")
    again.load_state_dict(weights)
    other.load_state_dict(state)
    dtypes = {
        value.dtype for held in other.state.values() for value in held.values() if isinstance(value, torch.Tensor)
    }
    assert dtypes == ({torch.uint8, torch.float32} if kind == "adamw_8bit" else {torch.float32})
    take_steps(again, other, 2)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_planned_bytes_are_those_of_the_state(kind, tied):
    model, optimizer = build(kind, tie_embeddings=tied)
    take_steps(model, optimizer, 1)
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != "step"
    )
    wanted = spec(**WIDE, tie_embeddings=tied)
    assert cost.optimizer_bytes(wanted, zero_stage=0, world_size=1, optimizer=kind) == held
    saved = cost.checkpoint_bytes(wanted, zero_stage=0, optimizer=kind)
    assert saved == held + cost.weights_file_bytes(wanted)


def test_a_plan_asks_less_memory_for_smaller_states():
    plans = [Pretrain.plan(config(optimizer={"kind": kind}, deepspeed="zero1"), spec(**WIDE), 1) for kind in KINDS]
    memory = [plan["memory_per_gpu_bytes"] for plan in plans]
    assert memory[1] < memory[2] < memory[0]


@pytest.mark.parametrize("kind", ["adamw_8bit", "muon"])
@pytest.mark.parametrize("engine", ["zero3", "zero3_cpu_offload"])
def test_engines_that_cut_matrices_or_step_on_the_host_are_refused_before_launch(kind, engine):
    (fault,) = Pretrain.check(config(optimizer={"kind": kind}, deepspeed=engine), spec())
    assert fault.path == "optimizer"
    assert f"got {engine}; set deepspeed to zero1 or zero2, or optimizer to adamw" in fault.message
    assert Pretrain.check(config(optimizer={"kind": kind}, deepspeed="zero2"), spec()) == []
    assert Pretrain.check(config(deepspeed=engine), spec()) == []


def test_adapters_refuse_other_optimizers_than_adamw():
    from stages.qlora import QLoRA

    plain = {"kind": "qlora", "from": "a", "max_length": 32, "global_batch_size": 4, "max_steps": 9, "lr": 1e-3}
    asked = QLoRA.Config.model_validate({**plain, "optimizer": {"kind": "muon"}})
    assert [fault.path for fault in QLoRA.check(asked, None)] == ["optimizer"]
    assert QLoRA.check(QLoRA.Config.model_validate(plain), None) == []


def test_the_optimizer_is_part_of_the_key_and_the_default_is_none_of_it():
    keys = [Pretrain.key_config(config(optimizer=choice)) for choice in (
        {"kind": "adamw"}, {"kind": "adamw_8bit"}, {"kind": "muon"}, {"kind": "muon", "momentum": 0.9},
    )]  # fmt: skip
    assert keys[0] == Pretrain.key_config(config())
    assert all(a != b for number, a in enumerate(keys) for b in keys[:number])
    with pytest.raises(ValidationError, match="momentum"):
        config(optimizer={"kind": "adamw", "momentum": 0.9})
