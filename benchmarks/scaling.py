"""Pretraining steps on 1, 2, 4 and 8 GPUs of one host under ZeRO-1, 2 and 3: tokens a second, efficiency, peak memory,
bytes that ranks send each other, and the communication that nothing hides.

    python benchmarks/scaling.py --points weak:zero1:1 weak:zero1:4 weak:zero1:4:overlap_comm=false strong:zero1:1

A point is ``mode:engine:ranks[:change,...]``. ``weak`` gives each rank one micro-batch a step, ``weak8`` eight (and an
eighth of the steps), ``strong`` shares ``--global-batch-size`` out; a change overrides a key of ``zero_optimization``
in ``ds_configs/<engine>.json``. Points of the same number of ranks share one launch, in the order given; ZeRO-3, which
cannot be compiled, comes last in its launch. Efficiency is tokens a second over ranks times those of one rank, in the
same run, under the same ZeRO stage where that was measured, else under ZeRO-1. Without a GPU ranks are processes on
gloo: for trying it out.

A step is the training loop's: token count and loss summed over ranks, forward, backward, reduction, clipping, update.
Rows are written after every point.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from efficiency import projections, with_efficiency
from engines import give_back, sizes, spec_of
from record import RESULTS, provenance, table, write_result

TOKEN_IDS = {"eos_token_id": 0, "pad_token_id": 1}
MARK = "ROW "
SHOWN = (
    *("mode", "engine", "ranks", "changes", "tokens_per_s", "step_ms", "efficiency", "peak_bytes"),
    *("compute_ms", "communication_ms", "exposed_ms", "wire_bytes", "expected_wire_bytes"),
)


class Point(NamedTuple):
    """One measurement; ``changes`` are as they stood on the command line."""

    mode: str
    engine: str
    ranks: int
    changes: str = ""


def point(text: str) -> Point:
    """``mode:engine:ranks[:changes]`` as a point.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    mode, engine, ranks, changes = (*text.split(":"), "", "", "", "")[:4]
    if not re.fullmatch(r"weak([1-9]\d*)?|strong", mode) or not engine or not ranks.isdigit() or int(ranks) < 1:
        raise argparse.ArgumentTypeError(f"must be weak[N]|strong:engine:ranks[:key=value,...]; got {text}")
    try:
        changes_of(changes)
    except ValueError:
        raise argparse.ArgumentTypeError(f"changes must be key=value with JSON values; got {changes}") from None
    return Point(mode, engine, int(ranks), changes)


def changes_of(text: str) -> dict[str, Any]:
    """``key=value,...``, the values as JSON, 2e8 as a whole number."""
    pairs = [change.partition("=") for change in text.split(",") if change]
    return {key: _number(json.loads(value)) for key, _, value in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--points", type=point, nargs="+", default=[], metavar="MODE:ENGINE:RANKS[:CHANGES]")
    parser.add_argument("--preset", default="hybrid_1b3")
    parser.add_argument("--layers", help="another `layers` than the preset's, + for a space, for trying it out")
    parser.add_argument("--shrink", type=int, default=1, help="divide the preset's widths by this, for trying it out")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--global-batch-size", type=int, default=32, help="of strong points, in sequences")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="steps measured; an N-th of them, but two, of weakN")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before, compilation included; the same holds")
    parser.add_argument("--precision", choices=["bf16", "fp8", "fp32"], default="bf16")
    parser.add_argument("--residual", choices=["fp32", "bf16"], default="fp32", help="a recipe's pretrain.residual")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--launch-timeout", type=float, default=600.0, help="seconds after which a launch is ended")
    parser.add_argument("--project", type=int, metavar="RANKS", help="print what the rows of --result foretell; no run")
    parser.add_argument("--append", action="store_true", help="keep the rows that --result holds, and go by them")
    parser.add_argument("--commit", help="commit of the tree, where it is no checkout")
    parser.add_argument("--result", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        return work(arguments)
    if arguments.project:
        print(table(projections(json.loads(arguments.result.read_text())["rows"], arguments.project)))
        return 0
    if not arguments.points:
        parser.error("--points must name one point or more")
    # Whoever ends this process ends the launch too: its ranks are in a session of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
    settings["points"] = [":".join(map(str, one)).rstrip(":") for one in arguments.points]
    rows: list[dict[str, Any]] = json.loads(arguments.result.read_text())["rows"] if arguments.append else []
    origin, before = provenance(arguments.commit), len(rows)
    for launch in launches(arguments.points):
        for row in launched(launch, arguments, sys.argv[1:] if argv is None else argv):
            rows.append(origin | row)
            with_efficiency(rows)
            print({name: row[name] for name in SHOWN if name in row}, flush=True)
            write_result(arguments.result, rows, settings)
    print(table([{name: row.get(name) for name in SHOWN} for row in rows]) if rows else "nothing was measured")
    return 0 if len(rows) - before == len(arguments.points) and not any("error" in row for row in rows) else 1


def launches(points: Sequence[Point]) -> list[list[Point]]:
    """``points`` by number of ranks, in the order in which the numbers come up; ZeRO-3 last in each."""
    found: dict[int, list[Point]] = {}
    for one in points:
        found.setdefault(one.ranks, []).append(one)
    # What ZeRO-3 puts in place in torch stays for the rest of the process.
    return [sorted(group, key=lambda one: one.engine.startswith("zero3")) for group in found.values()]


def launched(launch: Sequence[Point], arguments: argparse.Namespace, argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of one launch, as they come; the launch is ended, with all its processes, when it takes too long."""
    names = [":".join(map(str, one)).rstrip(":") for one in launch]
    ranks = launch[0].ranks
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={ranks}"]
    command += [str(Path(__file__).resolve()), *argv, "--worker", "--points", *names]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(ranks)))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:ranks])}
    environment.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    timer = threading.Timer(arguments.launch_timeout, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        assert process.stdout is not None, "a pipe was asked for"
        for line in process.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            else:
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdout is not None:
            process.stdout.close()
    print(f"launch of {ranks} ended with {code} after {time.monotonic() - started:.0f} s", flush=True)


def work(arguments: argparse.Namespace) -> int:
    """As one rank of a launch: measure every point; rank 0 prints rows."""
    import torch
    import traffic as counter

    from stages.runtime.engine import prepare_environment

    prepare_environment()
    traffic = counter.install()
    from stages.runtime import distributed

    distributed.init_process_group()
    failed = 0
    for one in arguments.points:
        try:
            row = measure(one, arguments, traffic)
        except torch.cuda.OutOfMemoryError as error:
            row = {"error": str(error).splitlines()[0]}
        failed += "error" in row
        if distributed.rank() == 0:
            print(MARK + json.dumps(described(one, arguments) | row), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    distributed.close_process_group()
    return int(failed > 0)


def described(one: Point, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a point asked for, in the words of every throughput row."""
    micro, steps = shares(one, arguments)
    return {
        "implementation": "pedigree",
        "preset": arguments.preset,
        "scope": "step",
        **one._asdict(),
        "compiled": compiles(one, arguments),
        "precision": arguments.precision,
        "residual": arguments.residual,
        "micro_batch_size": micro,
        "accumulation_steps": steps,
        "global_batch_size": micro * steps * one.ranks,
        "seq_len": arguments.seq_len,
    }


def shares(one: Point, arguments: argparse.Namespace) -> tuple[int, int]:
    """Micro-batch and micro-steps of each rank.

    Raises:
        ValueError: where the ranks do not divide the global batch.
    """
    if one.mode != "strong":
        return arguments.micro_batch_size, int(one.mode.removeprefix("weak") or 1)
    rows, rest = divmod(arguments.global_batch_size, one.ranks)
    micro = min(arguments.micro_batch_size, rows)
    if rest or rows % micro:
        raise ValueError(f"--global-batch-size {arguments.global_batch_size} must divide over {one.ranks} ranks")
    return micro, rows // micro


def compiles(one: Point, arguments: argparse.Namespace) -> bool:
    return not arguments.eager and not one.engine.startswith("zero3")


def measure(one: Point, arguments: argparse.Namespace, traffic: Any) -> dict[str, Any]:
    """Build model and engine, step, time, count; collective. The slowest rank's time and memory count."""
    import torch

    from stages.runtime import distributed
    from stages.runtime.progress import peak_flops

    gpu = torch.cuda.is_available()
    settle = torch.cuda.synchronize if gpu else distributed.barrier
    started = time.perf_counter()
    step, facts = stepper(one, arguments)
    fewer = shares(one, arguments)[1] if one.mode != "strong" else 1
    steps, warm_up = (max(count // fewer, min(count, 2)) for count in (arguments.steps, arguments.warm_up))
    for _ in range(warm_up):
        step()
    settle()
    warm_up_s = time.perf_counter() - started
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    distributed.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    settle()
    seconds = distributed._all_reduce((time.perf_counter() - started) / steps, "MAX")
    peak = distributed._all_reduce(torch.cuda.max_memory_allocated() if gpu else 0, "MAX")
    tokens, norm, engine = facts.pop("tokens"), facts.pop("seen")["grad_norm"], facts.pop("stepped")
    vendor = peak_flops(torch.cuda.get_device_name()) if gpu else None
    flops = tokens * facts.pop("flops_per_token") / seconds / one.ranks
    found = communication(step, one, traffic)
    give_back(engine)
    return {
        "tokens_per_s": round(tokens / seconds),
        "step_ms": round(seconds * 1e3, 2),
        "peak_bytes": int(peak) or None,
        "mfu": round(flops / vendor, 4) if vendor else None,
        "peak_flops": vendor,
        "warm_up_s": round(warm_up_s, 1),
        "last_grad_norm": norm,
        **found,
        **facts,
    }


def stepper(one: Point, arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """A function that takes one optimizer step, and what is known of it."""
    import torch
    import traffic as counter

    from model.cost import training_flops_per_token
    from stages.runtime import distributed

    micro, steps = shares(one, arguments)
    spec = spec_of(arguments)
    engine, config = engine_of(one, arguments, spec)
    generator = torch.Generator().manual_seed(distributed.rank())
    shape = (steps, micro, arguments.seq_len)
    batches = torch.randint(5, spec.vocab_size, shape, generator=generator).to(engine.device)
    parameters, whole = sizes(engine.model, config)
    seen: dict[str, float] = {}

    def step() -> None:
        scored = micro * steps * (arguments.seq_len - 1)
        n_tokens = distributed.all_reduce_sum(scored)
        losses = [engine.accumulate({"input_ids": ids, "labels": ids}, n_tokens) for ids in batches]
        distributed.all_reduce_sum(float(torch.stack(losses).double().sum()))
        seen["grad_norm"], reason = engine.step(1e-4, lambda norm: None if norm < float("inf") else f"norm {norm}")
        if reason is not None:
            raise RuntimeError(f"the step was left out, and measures nothing: {reason}")

    zero = config["zero_optimization"]
    pieces = not zero.get("use_multi_rank_bucket_allreduce", True)
    volume = counter.expected(zero["stage"], parameters=parameters, micro_steps=steps, kept_whole=whole, pieces=pieces)
    return step, {
        "tokens": micro * steps * arguments.seq_len * one.ranks,
        "flops_per_token": training_flops_per_token(spec, arguments.seq_len),
        "zero_optimization": zero,
        "seen": seen,
        "stepped": engine,
        "expected_wire_bytes": round(volume.wire_bytes(one.ranks)),
    }


def engine_of(one: Point, arguments: argparse.Namespace, spec: Any) -> tuple[Any, dict[str, Any]]:
    """The preset's model under the point's engine, with DeepSpeed's config."""
    import torch

    from model import init
    from model.block import compile_parts
    from model.config import HybridConfig
    from model.lm import HybridForCausalLM
    from stages.runtime import ds_config
    from stages.runtime.engine import TrainingEngine
    from stages.runtime.optimizer import adamw, parameter_groups
    from stages.runtime.pretraining_engine import prepare_model

    facts = ds_config.engine_facts(one.engine)
    facts["zero_optimization"] |= changes_of(one.changes)
    micro, steps = shares(one, arguments)
    config = ds_config.engine_config(
        facts,
        global_batch_size=micro * steps * one.ranks,
        micro_batch_size=micro,
        world_size=one.ranks,
        max_grad_norm=1.0,
        precision=arguments.precision,
    )
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = HybridForCausalLM(HybridConfig.from_spec(spec, **TOKEN_IDS)).float().train()
    how = argparse.Namespace(precision=arguments.precision, residual=arguments.residual, activation_checkpointing=False)
    prepare_model(model, how)
    if compiles(one, arguments):
        compile_parts(model)
    groups = parameter_groups(model, weight_decay=0.1, decay_embeddings=False, exempt=init.no_decay)
    return TrainingEngine(model, adamw(groups, betas=(0.9, 0.95), eps=1e-8), config), config


def communication(step: Any, one: Point, traffic: Any) -> dict[str, Any]:
    """Bytes of one more step; where there are GPUs, each rank's time in kernels of its own, and the time in
    communication and the part that nothing hid, of the rank that has least: in the others' they wait for the slowest.
    """
    import torch
    import traffic as counter

    from stages.runtime import distributed

    distributed.barrier()
    timed = torch.cuda.is_available()
    with counter.kernels(timed) as found, traffic.counting():
        step()
    row: dict[str, Any] = {
        "payload_bytes": counter.as_row(traffic.payload_bytes),
        "calls": dict(traffic.calls),
        "wire_bytes": traffic.wire_bytes(one.ranks),
    }
    if timed:
        for name, value in counter.times_ms(found)._asdict().items():
            row[name] = [round(mine, 2) for mine in distributed.all_gather(value)]
        row |= {name: min(row[name]) for name in ("communication_ms", "exposed_ms")}
    return row


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


if __name__ == "__main__":
    raise SystemExit(main())
