"""One evaluation on one rank and on two: the same bytes, a fault or a wish to stop on one rank felt by both (M2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluated
import pytest
from evaluated import content, evaluate
from ranks import run_ranks

from stages.base import StopRequested

UNLIKE_SIZES = {
    "suites": {**evaluated.SUITES, "harness": {"local": ["facts_local", "tasks_local"], "max_new_tokens": 4}}
}


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    return evaluated.make_parents(tmp_path_factory.mktemp("evaluated"))


def on_this_rank(folder: Path, parents: dict[str, Path], changes: dict[str, Any]) -> tuple[Any, list[float]]:
    """The stage as each rank of a launch runs it: its result, and what the generators draw afterwards."""
    import random

    import torch

    from stages.runtime import distributed, rng

    rng.seed_all(3 + distributed.rank())
    result, _ = evaluate(folder, parents, **changes)
    return result, [random.random(), torch.rand(1).item()]


def drawn_after(seed: int) -> list[float]:
    import random

    import torch

    from stages.runtime import rng

    rng.seed_all(seed)
    return [random.random(), torch.rand(1).item()]


def broken_on_rank_one(folder: Path, parents: dict[str, Path]) -> str:
    """Rank 1 meets a model that has diverged, rank 0 a sound one."""
    import torch

    from stages.runtime import distributed
    from stages.runtime.manifest import CheckpointError
    from stages.runtime.suites import bench, evaluation_run

    real = bench.open_bench

    def opened(*arguments: Any, **named: Any) -> Any:
        made = real(*arguments, **named)
        if distributed.rank() == 1:
            with torch.no_grad():
                made.model.model.norm.weight.fill_(float("nan"))
        return made

    evaluation_run.open_bench = opened
    try:
        evaluate(folder, parents)
    except CheckpointError as error:
        return f"rank {distributed.rank()}: {error}"
    return "no fault"


def stopped_and_resumed(folder: Path, parents: dict[str, Path]) -> str:
    """A file STOP asks after the second suite; the same call goes on."""
    from stages.runtime import distributed
    from stages.runtime.suites.registry import SUITES

    real = SUITES["margins"]

    def stopping(bench: Any, section: Any) -> Any:
        if distributed.rank() == 0:
            (folder / "STOP").touch()
        return real.run(bench, section)

    SUITES["margins"] = real._replace(run=stopping)
    try:
        evaluate(folder, parents)
    except StopRequested as stop:
        SUITES["margins"] = real
        evaluate(folder, parents)
        return str(stop)
    return "not stopped"


def test_one_rank_and_two_give_the_same_bytes_and_move_no_generator(parents, tmp_path):  # trap M2
    one = on_this_rank(tmp_path / "one", parents, UNLIKE_SIZES)
    both = run_ranks(2, on_this_rank, tmp_path / "two", parents, UNLIKE_SIZES)
    assert content(tmp_path / "two" / "output") == content(tmp_path / "one" / "output")
    assert both[0][0] == one[0]
    assert [drawn for _, drawn in both] == [drawn_after(3), drawn_after(4)]


def test_a_fault_on_one_rank_ends_both(parents, tmp_path):
    found = run_ranks(2, broken_on_rank_one, tmp_path, parents)
    assert [text[:6] for text in found] == ["rank 0", "rank 1"]
    assert all("logits must be finite" in text for text in found)


def test_two_ranks_stop_between_suites_and_go_on_to_the_same_bytes(parents, tmp_path):  # trap M2
    assert run_ranks(2, stopped_and_resumed, tmp_path / "two", parents) == ["a file STOP"] * 2
    evaluate(tmp_path / "one", parents)
    assert content(tmp_path / "two" / "output") == content(tmp_path / "one" / "output")
