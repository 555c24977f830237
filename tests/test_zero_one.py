"""ZeRO-1 on one rank: weights updated in place by gradients as they came, to the last bit as DeepSpeed does it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton_cases
from tiny_run import config, spec

from model.config import HybridConfig
from model.init import no_decay
from model.lm import HybridForCausalLM
from stages.runtime import adamw, clipping, distributed, ds_config, flat, rng, zero_one
from stages.runtime.engine import TAG, Judge, TrainingEngine, prepare_environment
from stages.runtime.optimizer import make_optimizer

STEPS = 4
LIMITS = {"adamw": 2.0, "adamw_8bit": 2.0, "muon": 2.125}
"""Norms to clip at, between those of the steps."""


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    prepare_environment()
    distributed.init_process_group()


def build(*, ours: bool, kind: str = "adamw", micro_steps: int = 2, engine: str = "zero1") -> TrainingEngine:
    """A tiny model under ``engine``; ``ours`` is what ships, else DeepSpeed's own step, clone and flat gradient."""
    rng.seed_all(3)
    model = HybridForCausalLM(HybridConfig.from_spec(spec(d_model=64, d_ff=96), eos_token_id=0, pad_token_id=1))
    settings = ds_config.engine_config(
        ds_config.engine_facts(engine), global_batch_size=2 * micro_steps, micro_batch_size=2, world_size=1,
        max_grad_norm=LIMITS[kind], precision="fp32",
    )  # fmt: skip
    made = make_optimizer(model, config(optimizer={"kind": kind}), decay_embeddings=False, exempt=no_decay)
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            patch.setattr(zero_one, "take_over", lambda sharded, parameters: None)
        return TrainingEngine(model, made, settings)


def take(wrapped: TrainingEngine, steps: range, *, judge: Judge = lambda norm: None) -> list[float]:
    """Norms of ``steps``, each of rows of its own."""
    norms = []
    for step in steps:
        for micro in range(2):
            ids = torch.randint(2, 320, (2, 32), generator=torch.Generator().manual_seed(2 * step + micro))
            wrapped.accumulate({"input_ids": ids, "labels": ids}, 124)
        norms.append(wrapped.step(1e-2, judge)[0])
    return norms


def weights(wrapped: TrainingEngine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in wrapped.model.parameters()]


def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "muon"])
def test_steps_clipped_and_not_are_deepspeeds_own_to_the_last_bit(kind: str) -> None:
    ours, theirs = build(ours=True, kind=kind), build(ours=False, kind=kind)
    norms = take(ours, range(STEPS))
    assert norms == take(theirs, range(STEPS))
    assert max(norms) > LIMITS[kind] > min(norms)
    assert are_equal(weights(ours), weights(theirs))


@pytest.mark.parametrize(("saver", "loader"), [(True, False), (False, True), (True, True)])
def test_checkpoints_are_the_same_whoever_writes_them(saver: bool, loader: bool, tmp_path: Any) -> None:  # trap T6
    first = build(ours=saver)
    take(first, range(2))
    first.save(tmp_path)
    saved = weights(first)
    second = build(ours=loader)
    second.load(tmp_path)
    assert are_equal(weights(second), saved)
    take(first, range(2, STEPS))
    take(second, range(2, STEPS))
    assert are_equal(weights(second), weights(first))
    assert not are_equal(weights(second), saved)


def test_a_checkpoint_has_the_bytes_and_the_weights_that_deepspeeds_tools_expect(tmp_path: Any) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    sizes = {}
    for name, ours in (("ours", True), ("theirs", False)):
        wrapped = build(ours=ours)
        take(wrapped, range(1))
        folder = tmp_path / name
        folder.mkdir()
        wrapped.save(folder)
        sizes[name] = {file.name: file.stat().st_size for file in (folder / TAG).iterdir()}
        found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
        for parameter, value in wrapped.model.named_parameters():
            assert torch.equal(found[parameter], value)
    assert sizes["ours"].keys() == sizes["theirs"].keys()
    for file, size in sizes["theirs"].items():
        assert sizes["ours"][file] == pytest.approx(size, rel=0.01)


def test_weights_moments_and_the_last_gradients_are_all_that_is_held() -> None:
    wrapped = build(ours=True)
    take(wrapped, range(1))
    sharded = wrapped._engine.optimizer
    own = {parameter.untyped_storage().data_ptr() for parameter in wrapped.model.parameters()}
    assert {master.untyped_storage().data_ptr() for master in sharded.single_partition_of_fp32_groups} == own
    fragments = [parameter._hp_mapping.hp_fragment for parameter in wrapped.model.parameters()]
    assert {fragment.untyped_storage().data_ptr() for fragment in fragments} == own
    assert all(parameter.grad is None for parameter in wrapped.model.parameters())
    assert not sharded.averaged_gradients
    assert not sharded.all_grad_tensors
    assert wrapped.optimizer.pieces == {}


def test_gradients_reach_the_update_where_autograd_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = build(ours=True)
    taken: list[int] = []
    real = adamw.update

    def noted(flat_: Any, state: Any, layout: Any, pieces: adamw.Pieces, rule: Any) -> None:
        taken.extend(gradient.data_ptr() for gradient in pieces.gradients)
        real(flat_, state, layout, pieces, rule)

    monkeypatch.setattr(adamw, "update", noted)
    seen: list[int] = []
    gather = wrapped._engine.optimizer.reduce_gradients

    def before(pipeline_parallel: bool = False) -> None:
        seen.extend(p.grad.data_ptr() for part in wrapped._engine.optimizer.bit16_groups for p in part)
        gather()

    wrapped._engine.optimizer.reduce_gradients = before
    take(wrapped, range(1))
    assert seen == taken
    assert len(seen) == len(list(wrapped.model.parameters()))


def test_micro_batches_add_to_autograds_gradient_and_do_nothing_beside() -> None:
    wrapped = build(ours=True, micro_steps=3)
    ids = torch.randint(2, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    places = []
    for _ in range(2):
        wrapped.accumulate({"input_ids": ids, "labels": ids}, 186)
        places.append([parameter.grad.data_ptr() for parameter in wrapped.model.parameters()])
        sharded = wrapped._engine.optimizer
        assert not sharded.averaged_gradients
        assert not any(bucket.buffer for bucket in sharded.ipg_buckets.values())
    assert places[0] == places[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_whose_norm_is_not_finite_is_left_out_and_the_next_is_as_if_it_had_not_been(bad: float) -> None:
    wrapped, other = build(ours=True), build(ours=True)
    take(wrapped, range(1))
    take(other, range(1))
    saved = weights(wrapped)
    handle = next(wrapped.model.parameters()).register_hook(lambda gradient: gradient * bad)
    assert take(wrapped, range(1, 2)) == [math.inf]
    handle.remove()
    assert are_equal(weights(wrapped), saved)
    assert wrapped._engine.skipped_steps == 1
    take(wrapped, range(2, 3))
    take(other, range(2, 3))
    assert are_equal(weights(wrapped), weights(other))


def test_a_refused_step_changes_nothing_and_lets_its_gradients_go() -> None:
    wrapped, other = build(ours=True), build(ours=True)
    saved = weights(wrapped)
    assert take(wrapped, range(1), judge=lambda norm: "bad") == take(build(ours=False), range(1))
    assert are_equal(weights(wrapped), saved)
    assert not wrapped.optimizer.state
    take(wrapped, range(1, 3))
    take(other, range(1, 3))
    assert are_equal(weights(wrapped), weights(other))


@pytest.mark.parametrize(("norm", "limit"), [(3.0, 1.0), (0.3, 1.0), (1.0, 1.0), (5e4, 0.7), (2.0, 0.0)])
def test_the_clipping_factor_is_deepspeeds(norm: float, limit: float) -> None:
    # (norm + 1e-6) / limit, at least 1, each rounded to fp32; its inverse.
    from numpy import float32

    excess = max(float32(1.0), (float32(norm) + float32(1e-6)) / float32(limit or math.inf))
    assert clipping.clipping_factor(norm, limit) == float(float32(1.0) / excess)


def drawn(seed: int, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("rank", [0, 1, None])
@pytest.mark.parametrize("shapes", [[(40, 36), (1500,), (4,)], [(7, 9), (1,), (1025,), (3, 5)]])
@pytest.mark.parametrize("way", ["torch", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_update_by_pieces_is_the_papers_in_double_precision(
    way: str, shapes: list[tuple[int, ...]], rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the only rank, or on each of two, which cut a parameter where no four elements begin."""
    if way == "triton":
        triton_cases.kernels("cast_triton")
        monkeypatch.setattr(adamw, "uses_triton", lambda device: True)
    sizes = [math.prod(shape) for shape in shapes]
    size = sum(sizes) + 1 if rank is None else (sum(sizes) + 2) // 2
    layout = flat.partition(shapes, [sum(sizes[:n]) for n in range(len(sizes))], size, rank or 0)
    held = sum(piece.numel for piece in layout.pieces)
    assert (held < sum(sizes)) is (rank is not None)
    device = torch.device("cuda" if way == "cuda" else "cpu")
    start = torch.cat([*layout_of(drawn(0, shapes), layout), torch.full((size - held,), 7.0)])
    whole = start.to(device)
    weight, first, second = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    state = adamw.empty_state(whole)
    for step in range(1, 4):
        gradients = layout_of([part.to(device) for part in drawn(step, shapes)], layout)
        rule = adamw.Rule(2.0**-7, 0.9, 0.95, 1e-8, 0.125, float(step), 0.375)
        flat_gradient = 0.375 * torch.cat([*gradients, torch.zeros(size - held, device=device)]).double().cpu()
        state["step"] += 1
        adamw.update(whole, state, layout, adamw.Pieces(gradients, device), rule)
        first = 0.9 * first + 0.1 * flat_gradient
        second = 0.95 * second + 0.05 * flat_gradient**2
        change = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight - 2.0**-7 * (0.125 * weight + change)
    whole = whole.cpu()
    # What lies behind the last piece is no weight.
    assert (whole[held:] == 7.0).all()
    # Three steps of a few roundings each, of the weight and of changes that are at most a few times lr.
    bound = 3 * 4 * 2.0**-24 * (weight.abs() + 8 * 2.0**-7)
    assert ((whole - weight).abs() <= bound)[:held].all()
    assert torch.allclose(state["exp_avg"].double().cpu(), first, rtol=0, atol=12 * 2.0**-24)
    assert torch.allclose(state["exp_avg_sq"].double().cpu(), second, rtol=12 * 2.0**-24, atol=0)


def layout_of(parameters: list[torch.Tensor], layout: flat.Layout) -> list[torch.Tensor]:
    """What of ``parameters`` lies on the rank of ``layout``: 1-D views, empty where nothing does."""
    pieces = zip(parameters, layout.pieces, strict=True)
    return [parameter.view(-1)[piece.start : piece.start + piece.numel] for parameter, piece in pieces]


def test_a_partition_of_padding_alone_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = flat.partition([(3,)], [0], 4, 1)
    state = adamw.empty_state(torch.ones(4))
    state["step"] += 1
    gradients, flat_weights = [torch.ones(3)[3:]], torch.ones(4)
    assert float(clipping.sum_of_squares(gradients)) == 0.0
    pieces = adamw.Pieces(gradients, torch.device("cpu"))
    adamw.update(flat_weights, state, layout, pieces, adamw.Rule(0.5, 0.9, 0.9, 1e-8, 0.5, 1.0, 0.5))
    assert (flat_weights == 1).all()
