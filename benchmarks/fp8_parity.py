"""Does training in fp8 end where bf16 ends? One model, twice from one initialisation over one order of real text.

    python benchmarks/fp8_parity.py --make tokens.bin --text corpus/*.txt --tokenizer TOKENIZER_FOLDER
    python benchmarks/fp8_parity.py --tokens tokens.bin

The first command tokenises text files (documents between blank lines) into 16-bit ids, the second trains on them and
needs no network. The last rows are held out; fp8 passes when its loss there (both evaluate in bf16) is within half a
percent of bf16's. Which projections ran in 8 bits, and whether the head's gradients did, is printed.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, provenance, table, write_result

TOLERANCE = 0.005
"""Of bf16's held-out loss: how far fp8's may lie from it."""
SEED = 17


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files to tokenise")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder of a tokenize stage")
    parser.add_argument("--make", type=Path, help="tokenise --text into this file, and train nothing")
    parser.add_argument("--limit-tokens", type=int, default=16_000_000, help="of --make")
    parser.add_argument("--tokens", type=Path, help="what --make wrote")
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--d-ff", type=int, default=2560)
    parser.add_argument("--layers", default="(2*mamba2 1*gated)*2")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--heldout-rows", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--residual", choices=["fp32", "bf16"], default="bf16", help="a recipe's pretrain.residual")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--commit", help="commit of the tree, where it is no checkout")
    parser.add_argument("--result", type=Path, default=RESULTS / "fp8_parity.json")
    arguments = parser.parse_args(argv)
    if arguments.make:
        return make(arguments)
    if arguments.tokens is None:
        parser.error("--tokens or --make is needed")
    rows = [train(arguments, precision) for precision in ("bf16", "fp8")]
    bf16, fp8 = (row["heldout_nats_per_token"] for row in rows)
    gap = abs(fp8 - bf16) / bf16
    origin = provenance(arguments.commit)
    for row in rows:
        row["gap"] = round(row["heldout_nats_per_token"] / bf16 - 1, 6)
    print(table(rows))
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path | list)}
    write_result(arguments.result, [row | origin for row in rows], settings)
    passed = math.isfinite(gap) and gap <= TOLERANCE
    print(f"fp8 {'passes' if passed else 'FAILS'}: {gap:.3%} from bf16 on held-out text, {TOLERANCE:.1%} allowed")
    return 0 if passed else 1


def make(arguments: argparse.Namespace) -> int:
    """Write ids of the files, drawn file by file so that a limit leaves none out, each document ended."""
    from data.tokenizer import encode_text, load

    tokenizer = load(arguments.tokenizer)
    share = arguments.limit_tokens // len(arguments.text)
    found: list[np.ndarray] = []
    for path in sorted(arguments.text, key=lambda path: path.stat().st_size):
        left = share + max(0, share * len(found) - sum(map(len, found)))
        ids: list[int] = []
        for document in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            ids += [*encode_text(tokenizer, document), tokenizer.eos_token_id]
            if len(ids) >= left:
                break
        found.append(np.array(ids[:left], dtype="<u2"))
    # Blocks of every file in one fixed order: a step sees all kinds of text, and so does what is held out.
    blocks = [block for ids in found for block in np.array_split(ids, max(1, len(ids) // 8192))]
    order = np.random.default_rng(SEED).permutation(len(blocks))
    stream = np.concatenate([blocks[index] for index in order])
    header = np.array([tokenizer.eos_token_id, len(tokenizer)], dtype="<u2")
    np.concatenate([header, stream]).tofile(arguments.make)
    print(f"{len(stream):,} tokens of {len(arguments.text)} files, vocabulary {len(tokenizer):,}: {arguments.make}")
    return 0


def train(arguments: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Train in ``precision`` and measure on what is held out."""
    import torch

    from stages.runtime import distributed, ds_config, rng
    from stages.runtime.engine import prepare_environment
    from stages.runtime.fp8_limits import fp8_lines
    from stages.runtime.pretraining_engine import build_engine
    from stages.runtime.schedule import lr_at

    stream = np.fromfile(arguments.tokens, dtype="<u2")
    eos_id, vocab_size = int(stream[0]), int(stream[1])
    rows = stream[2 : 2 + (len(stream) - 2) // arguments.seq_len * arguments.seq_len].reshape(-1, arguments.seq_len)
    config, spec = recipe(arguments, precision, -(-vocab_size // 64) * 64)
    prepare_environment()
    distributed.init_process_group()
    rng.seed_all(SEED)
    sizes = {"global_batch_size": arguments.rows, "micro_batch_size": arguments.rows, "world_size": 1}
    engine_config = ds_config.engine_config(
        ds_config.engine_facts("zero1"), **sizes, max_grad_norm=1.0, precision=precision
    )
    _, engine = build_engine(config, spec, engine_config, eos_id=eos_id, pad_id=eos_id)
    print(*fp8_lines(spec, precision), sep="\n", flush=True)
    training, heldout = rows[: -arguments.heldout_rows], rows[-arguments.heldout_rows :]
    started = time.perf_counter()
    for step in range(arguments.steps):
        at = (step * arguments.rows + np.arange(arguments.rows)) % len(training)
        loss = _step(engine, _batch(training[at], eos_id), lr_at(step, config.schedule, lr=config.lr,
                     max_steps=config.max_steps, min_lr_ratio=config.min_lr_ratio))  # fmt: skip
        if step % 100 == 0 or step == arguments.steps - 1:
            print(f"{precision} step {step + 1}/{arguments.steps} loss {float(loss):.4f}", flush=True)
    seconds = time.perf_counter() - started
    measured = {
        "preset": f"{engine.model.num_parameters() / 1e6:.0f}M hybrid",
        "scope": "step",
        "precision": precision,
        "tokens_per_s": round(arguments.steps * arguments.rows * arguments.seq_len / seconds),
        "micro_batch_size": arguments.rows,
        "seq_len": arguments.seq_len,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "steps": arguments.steps,
        "final_loss": round(float(loss), 5),
        "heldout_nats_per_token": round(_heldout(engine, heldout, eos_id, arguments.rows), 6),
    }
    del engine
    gc.collect()
    torch._dynamo.reset()
    return measured


def recipe(arguments: argparse.Namespace, precision: str, vocab_size: int) -> tuple[Any, Any]:
    """The pretrain section and the model that a recipe would have."""
    from model.spec import ModelSpec
    from stages.pretrain import PretrainConfig

    heads = {"n_heads": arguments.d_model // 128, "n_kv_heads": max(1, arguments.d_model // 512), "head_dim": 128}
    spec = ModelSpec.model_validate({
        "d_model": arguments.d_model, "d_ff": arguments.d_ff, "vocab_size": vocab_size,
        "max_seq_len": arguments.seq_len, "layers": arguments.layers,
        "mixers": {"mamba2": {"mixer": "mamba2"}, "gated": {"mixer": "attention", "output_gate": True, **heads}},
    })  # fmt: skip
    steps = arguments.steps
    config = PretrainConfig.model_validate({
        "kind": "pretrain", "seq_len": arguments.seq_len, "global_batch_size": arguments.rows,
        "micro_batch_size": arguments.rows, "max_steps": steps, "lr": arguments.lr, "precision": precision,
        "residual": arguments.residual, "compile": not arguments.eager,
        "schedule": {"kind": "cosine", "warmup_steps": min(100, steps // 2)},
    })  # fmt: skip
    return config, spec


def _batch(rows: np.ndarray, eos_id: int) -> dict[str, Any]:
    from data.loader import make_batch

    return make_batch(rows.astype(np.int64), eos_id, None)._asdict()


def _step(engine: Any, batch: dict[str, Any], lr: float) -> Any:
    loss = engine.accumulate(batch, float((batch["labels"][:, 1:] != -100).sum()))
    norm, reason = engine.step(lr, lambda norm: None if math.isfinite(norm) else "not finite")
    if reason is not None:
        raise RuntimeError(f"a step was left out: gradient norm {norm}, loss {float(loss)}")
    return loss


def _heldout(engine: Any, rows: np.ndarray, eos_id: int, size: int) -> float:
    """Mean nats a token; the model as a run's own evaluation has it."""
    import torch

    engine.model.eval()
    total, scored = 0.0, 0
    with torch.no_grad():
        for batch in _batches(rows, eos_id, size):
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += count * float(engine.forward(**batch, num_items_in_batch=float(count), return_logits=False).loss)
            scored += count
    return total / scored


def _batches(rows: np.ndarray, eos_id: int, size: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows) - size + 1, size):
        yield _batch(rows[start : start + size], eos_id)


if __name__ == "__main__":
    raise SystemExit(main())
