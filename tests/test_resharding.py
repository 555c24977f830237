"""A checkpoint of 4 ranks goes on on 2 and on 1, one of 1 on 2: the same rows, the same losses, the same moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import Ranks
from test_optimizer_ranks import LR, STEPS, engine_of, excess, take, toy_model
from tiny_run import Log, context, make_tokens

TOYS = (("zero0", "adamw"), ("zero1", "adamw"), ("zero2", "muon"), ("zero1", "adamw_8bit"))
PRETRAIN_STEPS = 4
ENGINES = ("zero3",)
"""Of the pretraining runs, after the toys, which it cannot cut; what it leaves in torch comes last."""
BLOCK = 256


class StopsAt(Log):
    """Rank 0 leaves the file STOP once a step is logged."""

    def __init__(self, directory: Path, step: int | None) -> None:
        super().__init__()
        self.directory, self.step = directory, step

    def log(self, event: str, step: int, values: dict[str, Any]) -> None:
        from stages.runtime import distributed

        super().log(event, step, values)
        if event == "train" and step == self.step and distributed.rank() == 0:
            (self.directory / "STOP").touch()


def saved(folder: Path) -> None:
    """Each toy but for its last step, in a checkpoint; each rank's random states are its own."""
    from stages.runtime import distributed, rng

    for engine, kind in TOYS:
        wrapped = engine_of(toy_model(), kind, engine)
        for step in range(STEPS - 1):
            take(wrapped, step)
        own = folder / f"{engine}-{kind}"
        own.mkdir(parents=True, exist_ok=True)
        rng.seed_all(100 + distributed.rank())
        distributed.barrier()
        wrapped.save(own)
        distributed.barrier()


def resumed(folder: Path) -> dict[Any, Any]:
    """Weights after the last step of each toy, taken on these ranks; and a number drawn after the load."""
    import torch

    found: dict[Any, Any] = {}
    for engine, kind in TOYS:
        wrapped = engine_of(toy_model(), kind, engine)
        wrapped.load(folder / f"{engine}-{kind}")
        found["drawn"] = float(torch.rand(()))
        found[engine, kind] = take(wrapped, STEPS - 1)
    return found


def pretrained(directory: Path, tokens: Path, engine: str, stop: int | None) -> tuple[dict[int, float], list[Any]]:
    """A pretraining run on these ranks, from where it stands: losses by step, and the rows that this rank read."""
    from stages.base import StopRequested
    from stages.pretrain import Pretrain
    from stages.runtime import ds_config
    from stages.runtime.engine import TrainingEngine

    real, rows, log = TrainingEngine.accumulate, [], StopsAt(directory, stop)
    facts = ds_config.engine_facts

    def changed(name: str, *args: Any) -> dict[str, Any]:
        found = facts(name, *args)
        if ds_config.zero_stage(found) == 3:
            found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    def accumulate(self: Any, inputs: Any, n_tokens: float) -> Any:
        rows.extend(inputs["input_ids"].tolist())
        return real(self, inputs, n_tokens)

    TrainingEngine.accumulate, ds_config.engine_facts = accumulate, changed
    settings = {"deepspeed": engine, "max_steps": PRETRAIN_STEPS, "micro_batch_size": 1}
    try:
        Pretrain().run(context(directory, tokens, tracker=log, **settings))
    except StopRequested:
        assert stop is not None
    finally:
        TrainingEngine.accumulate, ds_config.engine_facts = real, facts
    return log.of("train", "loss_nats_per_token"), rows


def part(root: Path, save_to: str | None, load_from: tuple[str, ...], runs: tuple[tuple[str, int | None], ...]) -> Any:
    """What one set of ranks is asked to do, in one set of processes."""
    import torch

    from stages.runtime import distributed, engine

    torch.set_num_threads(1)
    engine.prepare_environment()
    distributed.init_process_group()
    found: dict[Any, Any] = {}
    if save_to is not None:
        saved(root / save_to)
    for name in load_from:
        found["toys", name] = resumed(root / name)
    for name, stop in runs:
        for stage in ENGINES:
            found["run", name, stage] = pretrained(root / name / stage, root / "tokens", stage, stop)
    distributed.close_process_group()
    return found


def on(world_size: int, *arguments: Any) -> list[Any]:
    results = Ranks(world_size, part, *arguments).results(timeout_s=240)
    assert all(isinstance(result, dict) for result in results), results
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By number of ranks: what each rank answered."""
    root = tmp_path_factory.mktemp("resharding")
    make_tokens(root / "tokens")
    four = on(4, root, "of4", (), (("run", 2),))
    first = on(1, root, "of1", ("of4",), (("whole", None),))
    two = on(2, root, None, ("of4", "of1"), (("run", 3),))
    one = on(1, root, None, (), (("run", None),))
    return {4: four, "first": first, 2: two, 1: one}


@pytest.fixture(scope="module")
def expected():
    """Weights after the last step, by optimizer, of one process that was never stopped."""
    weights = {}
    for kind in ("adamw", "muon", "adamw_8bit"):
        wrapped = engine_of(toy_model(), kind, "zero0")
        weights[kind] = [take(wrapped, step) for step in range(STEPS)][-1]
    return weights


def resumes(found):
    """Each rank's toys, by what saved them."""
    yield from ((rank["toys", name], name) for rank in found[2] for name in ("of4", "of1"))
    yield from ((rank["toys", "of4"], "of4") for rank in found["first"])


@pytest.mark.parametrize("run", [run for run in TOYS if run[1] != "adamw_8bit"], ids="-".join)
def test_moments_are_those_that_were_saved_on_any_number_of_ranks(found, expected, run):  # trap T6
    for toys, name in resumes(found):
        assert excess(toys[run], expected[run[1]], STEPS) <= 1, name


def test_eight_bit_moments_are_rounded_anew_in_blocks_that_a_boundary_cut_alone(found, expected):
    for toys, _ in resumes(found):
        touched = 0
        for name, value in expected["adamw_8bit"].items():
            error = np.abs(toys["zero1", "adamw_8bit"][name] - value)
            assert error.max() < 2 * STEPS * LR
            bound = 4 * STEPS * 2.0**-23 * (np.abs(value) + LR)
            touched += len({place // BLOCK for place in np.flatnonzero(error.flat > bound.flat)})
        # Three boundaries of four ranks, and one of two.
        assert touched <= 4


def test_ranks_take_up_random_states_and_no_two_the_same(found):
    import torch

    drawn = [float(torch.rand((), generator=torch.Generator().manual_seed(100 + rank))) for rank in range(4)]
    assert [rank["toys", "of4"]["drawn"] for rank in found[2]] == drawn[:2]
    assert found["first"][0]["toys", "of4"]["drawn"] == drawn[0]
    ours, new = (rank["toys", "of1"]["drawn"] for rank in found[2])
    assert ours == drawn[0] != new


def in_order(ranks, name, engine, steps):
    """The rows of all steps, which are dealt out to the ranks one after another."""
    shares = [rank["run", name, engine][1] for rank in ranks]
    each = len(shares[0]) // steps
    return [row for step in range(steps) for share in shares for row in share[step * each : (step + 1) * each]]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_from_four_ranks_to_two_to_one_with_the_same_rows_and_losses(found, engine):  # trap T6
    losses, rows = found["first"][0]["run", "whole", engine]
    parts = ((found[4], 2), (found[2], 1), (found[1], 1))
    assert [row for ranks, steps in parts for row in in_order(ranks, "run", engine, steps)] == rows
    merged = {step: loss for ranks, _ in parts for step, loss in ranks[0]["run", "run", engine][0].items()}
    assert merged == pytest.approx(losses, rel=1e-5)
