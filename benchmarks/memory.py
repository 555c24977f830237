"""Bytes of a training step on one GPU: what ``--plan`` predicts, and what is allocated at most.

    python benchmarks/memory.py --preset hybrid_1b3 chimera_700m helix_900m --micro-batch-size 2 8

The whole step under DeepSpeed ZeRO-1 with fused AdamW, compiled by blocks, on rows of one document and on packed ones.
``off`` is predicted over measured, less one; the aim is 10%.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, provenance, table, write_result
from throughput import engine_of, our_model, random_batch, refuse_nonfinite, require_taken, with_backends

DOCUMENT_TOKENS = 700
"""Mean length of the documents of packed rows."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", nargs="+", default=["hybrid_1b3", "chimera_700m", "helix_900m"])
    parser.add_argument("--micro-batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[4096])
    parser.add_argument("--precision", choices=["bf16", "fp8"], nargs="+", default=["bf16"])
    parser.add_argument("--residual", choices=["fp32", "bf16"], default="bf16", help="a recipe's pretrain.residual")
    parser.add_argument("--backend", action="append", default=[], metavar="MIXER=NAME", help="mamba2=mamba_ssm, say")
    parser.add_argument("--dense", action="store_true", help="rows of one document only; packed ones compile anew")
    parser.add_argument("--steps", type=int, default=2, help="steps measured, after two")
    parser.add_argument("--tune", action="store_true", help="autotune kernels as a run does, which takes minutes")
    parser.add_argument("--commit", help="commit of the tree, where it is no checkout")
    parser.add_argument("--result", type=Path, default=RESULTS / "memory.json")
    arguments = parser.parse_args(argv)
    rows = measure(arguments)
    print(table(rows))
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
    origin = provenance(arguments.commit)
    write_result(arguments.result, [row | origin for row in rows], settings)
    return 0


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from stages.runtime import distributed
    from stages.runtime.engine import prepare_environment

    if not arguments.tune:
        leave_kernels_untuned()
    prepare_environment()
    distributed.init_process_group()
    rows: list[dict[str, Any]] = []
    for preset in arguments.preset:
        for precision in arguments.precision:
            for row in measured(arguments, preset, precision):
                rows.append(row)
                print(row, flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()
    return rows


def measured(arguments: argparse.Namespace, preset: str, precision: str) -> Iterator[dict[str, Any]]:
    """A row for each shape, smallest first, on one engine."""
    import torch

    shapes = sorted((rows, length) for rows in arguments.micro_batch_size for length in arguments.seq_len)
    options = argparse.Namespace(
        preset=preset, precision=precision, residual=arguments.residual, backend=arguments.backend, eager=False,
        micro_batch_size=shapes[0][0], micro_batches=1, seq_len=shapes[0][1],
    )  # fmt: skip
    torch.manual_seed(0)
    _, model = our_model(options)
    engine = engine_of(model, options)
    for options.micro_batch_size, options.seq_len in shapes:
        for document_tokens in (None,) if arguments.dense else (None, DOCUMENT_TOKENS):
            batch = random_batch(options, model.config.vocab_size, document_tokens)
            yield row(arguments, options, document_tokens, engine, batch)
    release(engine)


def release(engine: Any) -> None:
    """Give the bytes of weights, gradients and moments back: DeepSpeed's hooks keep a model that nobody else holds."""
    optimizer = engine.optimizer
    held = [*engine.model.parameters(), *(weight for group in optimizer.param_groups for weight in group["params"])]
    held += [part for state in optimizer.state.values() for part in state.values() if hasattr(part, "untyped_storage")]
    for tensor in held:
        for part in (tensor, tensor.grad):
            if part is not None:
                part.untyped_storage().resize_(0)


def row(
    arguments: argparse.Namespace,
    options: argparse.Namespace,
    document_tokens: int | None,
    engine: Any,
    batch: dict[str, Any],
) -> dict[str, Any]:
    import torch

    n_tokens = batch["input_ids"].numel()

    def steps(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            engine.accumulate(batch, float(n_tokens))
            require_taken(engine.step(1e-4, refuse_nonfinite))
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / count

    steps(2)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = steps(arguments.steps)
    peak, wanted = torch.cuda.max_memory_allocated(), predicted(options, packed=document_tokens is not None)
    return {
        "preset": options.preset,
        "scope": "step",
        "precision": options.precision,
        "tokens_per_s": round(n_tokens / seconds),
        "micro_batch_size": options.micro_batch_size,
        "seq_len": options.seq_len,
        "document_tokens": document_tokens,
        "residual": options.residual,
        "predicted_bytes": wanted,
        "peak_bytes": peak,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "off": round(wanted / peak - 1, 4),
    }


def predicted(options: argparse.Namespace, *, packed: bool) -> int:
    """What ``--plan`` says of the same step; it takes rows to be packed."""
    from model import cost
    from model.presets import preset

    estimate = cost.memory_per_gpu(
        with_backends(preset(options.preset), options.backend),
        zero_stage=1,
        world_size=1,
        micro_batch_size=options.micro_batch_size,
        seq_len=options.seq_len,
        precision=options.precision,
        path=cost.Path(kernels=True, residual=options.residual, packed=packed),
        accumulation_steps=1,
    )
    return estimate.total_bytes


def leave_kernels_untuned() -> None:
    """Let every Triton kernel take its first configuration: slower steps of the same size, minutes earlier."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def first(tuner: Any, *arguments: Any, **named: Any) -> Any:
        return prune(tuner, *arguments, **named)[:1]

    Autotuner.prune_configs = first


if __name__ == "__main__":
    raise SystemExit(main())
