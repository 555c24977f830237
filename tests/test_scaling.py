"""What `benchmarks/scaling.py` counts and compares: bytes between ranks against theory, hidden time, efficiency."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from tiny_run import spec

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import scaling  # noqa: E402
import traffic  # noqa: E402

RANKS, MICRO_STEPS = 3, 2
WHOLE = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
POINTS: dict[tuple[str, bool], dict[str, Any]] = {
    ("zero0", False): {},
    ("zero1", False): {},
    ("zero1", True): {"overlap_comm": True, "reduce_bucket_size": 2000, "use_multi_rank_bucket_allreduce": False},
    ("zero2", False): {"overlap_comm": True, "reduce_bucket_size": 2000},
    ("zero3", False): WHOLE,
}
"""By engine and whether buckets are reduced in pieces: what is changed in its file."""


def counted() -> dict[Any, Any]:
    """Bytes that this rank sends in one step of two micro-steps, by point, and the weights after it."""
    import torch

    found = traffic.install()
    from model.config import HybridConfig
    from model.init import no_decay
    from model.lm import HybridForCausalLM
    from stages.runtime import distributed, ds_config
    from stages.runtime.engine import TrainingEngine, prepare_environment
    from stages.runtime.optimizer import adamw, parameter_groups

    torch.set_num_threads(1)
    prepare_environment()
    distributed.init_process_group()
    result: dict[Any, Any] = {}
    for (name, pieces), changes in POINTS.items():
        torch.manual_seed(3)
        untied = spec(tie_embeddings=False)
        model = HybridForCausalLM(HybridConfig.from_spec(untied, eos_token_id=0, pad_token_id=1))
        result["parameters"] = sum(weight.numel() for weight in model.parameters())
        facts = ds_config.engine_facts(name)
        facts["zero_optimization"] |= changes
        settings = ds_config.engine_config(
            facts, global_batch_size=RANKS * MICRO_STEPS, micro_batch_size=1, world_size=RANKS, max_grad_norm=1.0,
            precision="fp32",
        )  # fmt: skip
        groups = parameter_groups(model, weight_decay=0.1, decay_embeddings=False, exempt=no_decay)
        wrapped = TrainingEngine(model, adamw(groups, betas=(0.9, 0.95), eps=1e-8), settings)
        # Where ZeRO-3 gathers is settled in its first step.
        for _ in range(2 if name == "zero3" else 1):
            with found.counting():
                for micro in range(MICRO_STEPS):
                    ids = torch.randint(2, 320, (1, 32), generator=torch.Generator().manual_seed(micro))
                    wrapped.accumulate({"input_ids": ids, "labels": ids}, RANKS * MICRO_STEPS * 31)
                norm, _ = wrapped.step(1e-3, lambda norm: None)
        result[name, pieces] = found.wire_bytes(RANKS), norm, dict(found.payload_bytes), dict(found.calls)
    distributed.close_process_group()
    return result


@pytest.fixture(scope="module")
def ranks():
    results = Ranks(RANKS, counted).results(timeout_s=240)
    assert all(isinstance(result, dict) for result in results), results
    return results


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0]}-{'pieces' if point[1] else 'whole'}")
def test_ranks_send_what_theory_says(ranks, point):
    stage, pieces = int(point[0][-1]), point[1]
    share = 4.0 * ranks[0]["parameters"] * (RANKS - 1) / RANKS
    # In units of a ring's pass over fp32 parameters: a reduction each micro-step is two of them where it is an
    # all-reduce and one where it is a reduce-scatter, a gather is one.
    passes = {0: 2, 1: 1 + 1 if pieces else 2 + 1, 2: 2 * MICRO_STEPS + 1, 3: 3 * MICRO_STEPS}[stage]
    volume = traffic.expected(stage, parameters=ranks[0]["parameters"], micro_steps=MICRO_STEPS, pieces=pieces)
    assert volume.wire_bytes(RANKS) == pytest.approx(passes * share)
    # Parameters that do not divide are padded, and a few numbers (norms, overflow) travel besides.
    slack = 0.04 if stage == 3 else 0.01
    for rank in ranks:
        assert rank[point][0] == pytest.approx(passes * share, rel=slack)


def test_overlap_buckets_and_pieces_change_no_gradient(ranks):
    # ZeRO-3's is of its second step.
    norms = [rank[point][1] for rank in ranks for point in POINTS if point[0] != "zero3"]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


def test_communication_is_exposed_where_nothing_else_runs():
    kernels = [("ncclDevKernel_AllReduce", 0, 100), ("gemm", 40, 60), ("other", 50, 80), ("NCCL", 90, 130)]
    # 0 to 130 is communication; 40 to 80 of it is hidden.
    assert traffic.times_ms(kernels) == (pytest.approx(0.040), pytest.approx(0.130), pytest.approx(0.090))
    assert traffic.times_ms([("gemm", 0, 5)]) == (0.005, 0, 0)


def test_points_are_read_from_the_command_line():
    one = scaling.point("weak:zero1:4:overlap_comm=true,reduce_bucket_size=2e8")
    assert (one.mode, one.engine, one.ranks) == ("weak", "zero1", 4)
    assert scaling.changes_of(one.changes) == {"overlap_comm": True, "reduce_bucket_size": 200_000_000}
    assert scaling.point("strong:zero3:8").changes == ""
    assert scaling.point("weak8:zero1:2").mode == "weak8"
    for wrong in ("weak0:zero1:2", "strong2:zero1:2"):
        with pytest.raises(argparse.ArgumentTypeError):
            scaling.point(wrong)
    for wrong in ("flat:zero1:4", "weak::4", "weak:zero1:0", "weak:zero1:x", "weak:zero1:2:overlap_comm=yes"):
        with pytest.raises(argparse.ArgumentTypeError):
            scaling.point(wrong)


def test_points_share_a_launch_by_ranks_and_zero3_comes_last_in_it():
    points = [scaling.point(f"weak:{engine}:{ranks}") for engine, ranks in
              (("zero1", 1), ("zero3", 4), ("zero1", 4), ("zero3", 1), ("zero2", 4))]  # fmt: skip
    order = [[f"{one.engine}:{one.ranks}" for one in launch] for launch in scaling.launches(points)]
    assert order == [["zero1:1", "zero3:1"], ["zero1:4", "zero2:4", "zero3:4"]]


def test_strong_points_share_the_global_batch_out():
    arguments = argparse.Namespace(micro_batch_size=8, global_batch_size=32)
    assert scaling.shares(scaling.point("weak:zero1:4"), arguments) == (8, 1)
    assert scaling.shares(scaling.point("weak4:zero1:4"), arguments) == (8, 4)
    found = [scaling.shares(scaling.point(f"strong:zero1:{ranks}"), arguments) for ranks in (1, 2, 4, 8)]
    assert found == [(8, 4), (8, 2), (8, 1), (4, 1)]
    with pytest.raises(ValueError, match="must divide over 3"):
        scaling.shares(scaling.point("strong:zero1:3"), arguments)


def test_efficiency_is_against_one_rank_of_the_same_mode_and_engine_where_there_is_one():
    keys = ("mode", "engine", "ranks", "tokens_per_s")
    rows = [dict(zip(keys, row, strict=True)) for row in (
        ("weak", "zero1", 1, 100), ("weak", "zero1", 4, 380), ("weak", "zero2", 4, 360),
        ("weak", "zero3", 1, 80), ("weak", "zero3", 4, 240), ("strong", "zero1", 4, 300),
    )]  # fmt: skip
    scaling.with_efficiency(rows)
    assert [row.get("efficiency") for row in rows] == [1.0, 0.95, 0.9, 1.0, 0.75, None]
    assert [row.get("compared_with") for row in rows[2:5]] == ["zero1 on 1", "zero3 on 1", "zero3 on 1"]


def test_a_projection_stretches_what_is_exposed_and_nothing_else():
    row = {"mode": "weak", "engine": "zero1", "changes": "", "ranks": 2, "step_ms": 520.0, "exposed_ms": 20.0}
    alone = row | {"ranks": 1, "efficiency": 1.0}
    (found,) = scaling.projections([alone, row | {"efficiency": 0.98}], 8)
    # 20 ms times (7/8) / (1/2); one rank took 0.98 x 520 ms.
    assert (found["exposed_ms"], found["step_ms"]) == (35.0, 535.0)
    assert found["efficiency"] == pytest.approx(0.98 * 520 / 535, abs=1e-4)
    assert (found["measured_on"], found["projected_to"]) == (2, 8)


@pytest.mark.slow
def test_the_benchmark_launches_its_ranks_and_writes_a_row_a_point(tmp_path, capfd):
    result = tmp_path / "scaling.json"
    small = "--shrink 16 --layers 1*mamba2+1*gated --micro-batch-size 1 --seq-len 32 --steps 1 --warm-up 1 --eager"
    points = ["--points", "weak:zero1:1", "weak:zero1:2:overlap_comm=true"]
    assert scaling.main([*small.split(), "--result", str(result), *points]) == 0
    rows = json.loads(result.read_text())["rows"]
    assert [(row["ranks"], row["changes"]) for row in rows] == [(1, ""), (2, "overlap_comm=true")]
    assert rows[0]["efficiency"] == 1
    assert rows[0]["wire_bytes"] == 0
    assert rows[1]["wire_bytes"] == pytest.approx(rows[1]["expected_wire_bytes"], rel=1e-4)
    assert {"hardware", "versions", "commit", "date", "command"} <= set(rows[1])
    assert "| weak | zero1 | 2 |" in capfd.readouterr().out
