"""ZeRO-1 on two ranks: gradients summed in place, to the last bit as DeepSpeed's own step of the same engine has it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import Ranks
from tiny_run import config, spec

STEPS, ROWS = 3, 8
LIMITS = {"adamw": 1.25, "adamw_8bit": 1.25, "muon": 1.5}
"""Norms to clip at, between those of the steps."""
WAYS: dict[str, dict[str, Any]] = {
    "early": {"overlap_comm": True, "reduce_bucket_size": 3000},
    "late": {"overlap_comm": False, "reduce_bucket_size": 3000},
    "owners": {"overlap_comm": True, "reduce_bucket_size": 3000, "use_multi_rank_bucket_allreduce": False},
    "one bucket": {"overlap_comm": True, "reduce_bucket_size": 10**9},
}
"""How gradients are sent, in the words of ``ds_configs``."""


def build(model: Any, *, kind: str = "adamw", way: str = "early", ours: bool = True, micro_steps: int = 2) -> Any:
    """``model`` under ZeRO-1 on these ranks; ``ours`` is what ships, else DeepSpeed's own step."""
    from model.init import no_decay
    from stages.runtime import distributed, ds_config, zero_one
    from stages.runtime.engine import TrainingEngine
    from stages.runtime.optimizer import make_optimizer

    ranks = distributed.world_size()
    settings = ds_config.engine_config(
        {"zero_optimization": {"stage": 1, **WAYS[way]}}, global_batch_size=ranks * micro_steps, micro_batch_size=1,
        world_size=ranks, max_grad_norm=LIMITS[kind], precision="fp32",
    )  # fmt: skip
    made = make_optimizer(model, config(optimizer={"kind": kind}), decay_embeddings=False, exempt=no_decay)
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            patch.setattr(zero_one, "take_over", lambda zero, parameters: update_by_pieces(made))
        return TrainingEngine(model, made, settings)


def update_by_pieces(optimizer: Any) -> None:
    """Let each parameter's share of DeepSpeed's flat gradient be an update of its own.

    Torch's kernel does not round the end of a tensor, where no vector is full, as it rounds the rest.
    """
    import torch

    from stages.runtime.adamw import Pieces

    real = optimizer.step

    def step(closure: Any = None) -> None:
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        optimizer.pieces = {
            id(flat): Pieces(optimizer.layouts[id(flat)].split(flat.grad), torch.device("cpu")) for flat in flats
        }
        real()
        optimizer.pieces = {}

    optimizer.step = step


def hybrid() -> Any:
    from model.config import HybridConfig
    from model.lm import HybridForCausalLM
    from stages.runtime import rng

    rng.seed_all(3)
    return HybridForCausalLM(HybridConfig.from_spec(spec(d_model=64, d_ff=96), eos_token_id=0, pad_token_id=1))


def pair() -> Any:
    """Two parameters, one of which a rank may leave out, and in an order of its own."""
    import torch
    from torch import nn

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.first, self.second = nn.Linear(5, 4, bias=False), nn.Linear(7, 3, bias=False)

        def get_input_embeddings(self) -> None:
            return None

        get_output_embeddings = get_input_embeddings

        def forward(self, names: str, num_items_in_batch: float, **kwargs: Any) -> Any:
            loss = sum((2.0**-4 * getattr(self, name).weight).sum() for name in names.split())
            return type("Output", (), {"loss": loss / num_items_in_batch})

    return Pair()


def take(wrapped: Any, steps: range) -> list[tuple[float, list[np.ndarray]]]:
    """Norm and weights after each of ``steps``, of two micro-batches."""
    import torch

    from stages.runtime import distributed

    found = []
    rank, ranks = distributed.rank(), distributed.world_size()
    for step in steps:
        ids = torch.randint(2, 320, (ROWS, 32), generator=torch.Generator().manual_seed(step))
        for rows in ids.chunk(ranks)[rank].chunk(2):
            wrapped.accumulate({"input_ids": rows, "labels": rows}, ROWS * 31)
        norm, _ = wrapped.step(2.0**-7, lambda norm: None)
        found.append((norm, weights(wrapped)))
    return found


def weights(wrapped: Any) -> list[np.ndarray]:
    return [weight.detach().clone().numpy() for weight in wrapped.model.parameters()]


def sent() -> dict[str, Any]:
    """What leaves when, in a step of two micro-batches: events in their order."""
    from stages.runtime import reduction

    events: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        real, end = reduction._all_reduced, reduction.Reduction.finish

        def noted(tensors: Any, group: Any) -> Any:
            events.append([tensor.data_ptr() for tensor in tensors])
            return real(tensors, group)

        def ending(self: Any) -> None:
            events.append("backward over")
            end(self)

        patch.setattr(reduction, "_all_reduced", noted)
        patch.setattr(reduction.Reduction, "finish", ending)
        wrapped = build(hybrid())
        held, begin = [], wrapped._engine.optimizer.reduce_gradients

        def reduce(pipeline_parallel: bool = False) -> None:
            held.extend(weight.grad.data_ptr() for weight in wrapped.model.parameters())
            begin()

        wrapped._engine.optimizer.reduce_gradients = reduce
        take(wrapped, range(1))
    sizes = [weight.numel() for weight in wrapped.model.parameters()]
    return {"events": events, "gradients": held, "sizes": sizes}


def uneven() -> list[np.ndarray]:
    """Weights after steps in which ranks use other parameters, and in another order."""
    from stages.runtime import distributed

    wrapped = build(pair(), micro_steps=1)
    orders = (("first second", "second first"), ("first", "second first"), ("second", "second"))
    for names in orders:
        wrapped.accumulate({"names": names[distributed.rank()]}, 2)
        wrapped.step(2.0**-7, lambda norm: None)
    return weights(wrapped)


def spoiled(bad: float) -> dict[str, Any]:
    """A step in which rank 1 alone has a gradient that is not finite, and the next."""
    from stages.runtime import distributed

    wrapped = build(hybrid())
    hook = None
    if distributed.rank() == 1:
        hook = next(wrapped.model.parameters()).register_hook(lambda gradient: gradient * bad)
    before = weights(wrapped)
    norm, after = take(wrapped, range(1))[0]
    if hook is not None:
        hook.remove()
    return {"norm": norm, "kept": same(before, after), "then": take(wrapped, range(STEPS))}


def saved(folder: Path) -> dict[str, Any]:
    """Sizes of a checkpoint's files, by who wrote it; and a step after each was loaded by the other."""
    from stages.runtime import distributed
    from stages.runtime.engine import TAG

    found: dict[str, Any] = {}
    for ours in (True, False):
        wrapped = build(hybrid(), ours=ours)
        take(wrapped, range(2))
        own = folder / str(ours)
        own.mkdir(exist_ok=True)
        distributed.barrier()
        wrapped.save(own)
        distributed.barrier()
        other = build(hybrid(), ours=not ours)
        other.load(own)
        found["then", ours] = take(other, range(2, STEPS))
        found["files", ours] = {file.name: file.stat().st_size for file in sorted((own / TAG).iterdir())}
    return found


def everything(folder: Path) -> dict[Any, Any]:
    import torch

    from stages.runtime import distributed, engine

    torch.set_num_threads(1)
    engine.prepare_environment()
    distributed.init_process_group()
    found: dict[Any, Any] = {"sent": sent(), "uneven": uneven(), "saved": saved(folder)}
    for kind in LIMITS:
        found[kind, "theirs"] = take(build(hybrid(), kind=kind, ours=False), range(STEPS))
        found[kind, "early"] = take(build(hybrid(), kind=kind), range(STEPS))
    for way in set(WAYS) - {"early"}:
        found["adamw", way] = take(build(hybrid(), way=way), range(STEPS))
    for bad in (math.nan, math.inf):
        found["spoiled", str(bad)] = spoiled(bad)
    distributed.close_process_group()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    results = Ranks(2, everything, tmp_path_factory.mktemp("saved")).results(timeout_s=240)
    assert all(isinstance(result, dict) for result in results), results
    return results


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


def agree(ours: list[Any], theirs: list[Any]) -> None:
    """Norms and weights of all steps are equal to the last bit."""
    assert [norm for norm, _ in ours] == [norm for norm, _ in theirs]
    assert all(same(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", LIMITS)
def test_steps_clipped_and_not_are_deepspeeds_own_to_the_last_bit(ranks, kind):
    for rank in ranks:
        agree(rank[kind, "early"], rank[kind, "theirs"])
        norms = [norm for norm, _ in rank[kind, "early"]]
        assert max(norms) > LIMITS[kind] > min(norms)
    agree(ranks[0][kind, "early"], ranks[1][kind, "early"])


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"early"}))
def test_how_gradients_are_sent_changes_no_bit(ranks, way):
    for rank in ranks:
        agree(rank["adamw", way], rank["adamw", "early"])


def test_buckets_leave_in_place_during_the_last_backward_pass_in_one_order(ranks):
    for rank in ranks:
        events, gradients = rank["sent"]["events"], rank["sent"]["gradients"]
        over = events.index("backward over")
        sends = [event for event in events if event != "backward over"]
        # Once each, autograd's own tensors, from the last parameter to the first, whose bucket is the last to fill.
        assert [address for bucket in sends for address in bucket] == gradients[::-1]
        assert over >= len(sends) - 1 > 3
        sizes = dict(zip(gradients, rank["sent"]["sizes"], strict=True))
        assert all(len(bucket) == 1 or sum(sizes[one] for one in bucket) <= 3000 for bucket in sends)
    shapes = [[len(event) for event in rank["sent"]["events"]] for rank in ranks]
    assert shapes[0] == shapes[1]


def test_ranks_that_use_other_parameters_in_another_order_take_the_mean_of_all(ranks):
    import torch

    model = pair()
    # Per step and parameter, how many of the two ranks used it; the loss of a step is divided by two tokens.
    uses = ((2, 2), (2, 1), (0, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.0**-7, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for counts in uses:
        for weight, count in zip(model.parameters(), counts, strict=True):
            weight.grad = torch.full_like(weight, count * 2.0**-5)
        optimizer.step()
    for rank in ranks:
        for ours, theirs in zip(rank["uneven"], model.parameters(), strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=len(uses) * 4 * 2.0**-24)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_one_ranks_bad_gradient_leaves_the_step_out_on_all_and_nothing_of_it_stays(ranks, bad):
    for rank in ranks:
        assert rank["spoiled", bad]["norm"] == math.inf
        assert rank["spoiled", bad]["kept"]
        agree(rank["spoiled", bad]["then"], rank["adamw", "early"])


def test_checkpoints_are_as_large_as_deepspeeds_and_each_loads_the_others(ranks):  # trap T6
    for rank in ranks:
        for ours in (True, False):
            agree(rank["saved"]["then", ours], rank["adamw", "early"][2:])
        ours, theirs = rank["saved"]["files", True], rank["saved"]["files", False]
        assert ours.keys() == theirs.keys()
        assert len([name for name in ours if "optim_states" in name]) == 2
        for name, size in theirs.items():
            assert ours[name] == pytest.approx(size, rel=0.01)
