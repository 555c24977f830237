"""Measure the training loader: tokens a second, the share of a step's time that waits for data, packing, exact shares.

    python benchmarks/loader.py --tokens runs/default/tokenize-<key>/output

Without ``--tokens`` documents of log-normal lengths are made up; the loader does not care what ids mean. A step is
stood in for by sleeping as long as a device of ``--rate`` tokens a second would compute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import record

from data import windows
from data.best_fit import best_fit
from data.loader import SHARE_TOKENS, MixtureLoader
from data.mix import SourceSchedule
from data.mixture import Mixture
from data.prefetch import Prefetcher
from data.shards import HELDOUT, TRAIN, ShardWriter, heldout_digest, open_shard, read_info
from data.stream import StreamLoader

SHARES = {"web": 0.55, "books": 0.25, "code": 0.15, "wiki": 0.04, "rare": 0.01}


def make_up(directory: Path, tokens: int) -> Path:
    """A tokens artifact of five sources; lengths have the median of web text, about 400 tokens."""
    rng, facts = np.random.default_rng(0), []
    for name in SHARES:
        splits = {}
        for split, size in ((TRAIN, tokens // len(SHARES)), (HELDOUT, 1000)):
            lengths = np.maximum(2, rng.lognormal(6, 1.2, max(1, size // 800)).astype(np.int64))
            with ShardWriter(directory, split, name, np.dtype("<u2")) as writer:
                for number, length in enumerate(lengths.tolist()):
                    ids = rng.integers(2, 60_000, size=length, dtype=np.uint16)
                    ids[-1] = 0
                    writer.append(f"{name}-{number}", ids, 4 * length)
            splits[split] = writer.facts()
        facts.append({"name": name, "language": "en", "domain": None, **splits})
    content = {
        "vocab_size": 60_000, "dtype": "uint16", "eos_id": 0, "pad_id": 1, "tokenizer_digest": "none",
        "special_token_counts": {}, "sources": facts,
        "heldout_hash": heldout_digest(directory, [(entry["name"], "en") for entry in facts]),
    }  # fmt: skip
    (directory / "tokens.json").write_text(json.dumps(content))
    return directory


def opened(tokens: Path, arguments: argparse.Namespace, packing: windows.Packing = "cut") -> MixtureLoader:
    asked = json.loads(arguments.mixture) if arguments.mixture else (None if arguments.tokens else SHARES)
    mixture = Mixture(asked, arguments.by)
    return MixtureLoader(
        tokens, seq_len=arguments.seq_len, global_batch_size=arguments.rows, seed=1, mixture=mixture, packing=packing
    )


def speed(tokens: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens a second of one thread that does nothing but read."""
    packings: tuple[windows.Packing, ...] = ("cut", "whole")
    for packing in packings:
        started = time.perf_counter()
        loader = opened(tokens, arguments, packing)
        opening_s = time.perf_counter() - started
        loader.batch(0, slice(0, arguments.rows))
        rates = []
        for repeat in range(arguments.repeats):
            started = time.perf_counter()
            for step in range(1 + repeat * 20, 21 + repeat * 20):
                loader.batch(step, slice(0, arguments.rows))
            rates.append(20 * arguments.rows * arguments.seq_len / (time.perf_counter() - started))
        started = time.perf_counter()
        loader.batch(10**9, slice(0, arguments.rows))
        yield {
            "what": "read", "packing": packing, "tokens_per_s_median": float(np.median(rates)),
            "tokens_per_s_worst": min(rates), "opening_s": opening_s,
            "seek_to_step_1e9_s": time.perf_counter() - started,
        }  # fmt: skip


def waiting(loader: Any, arguments: argparse.Namespace, *, cold: Path | None, ahead: int) -> dict[str, Any]:
    """Share of the time of steps that waits for batches at ``--rate`` tokens a second."""
    batch = Prefetcher(loader.batch, steps=ahead, last_step=10**9)
    step_s = arguments.rows * arguments.seq_len / arguments.rate
    for step in range(3):
        batch(step, slice(0, arguments.rows))
        time.sleep(step_s)
    waited, started = batch.waited_s, time.perf_counter()
    step = 3
    while time.perf_counter() - started < arguments.seconds:
        if cold is not None:
            drop_caches(cold)
        batch(step, slice(0, arguments.rows))
        time.sleep(step_s)
        step += 1
    elapsed = time.perf_counter() - started
    batch.close()
    share = (batch.waited_s - waited) / elapsed
    return {"what": "waiting", "prefetch_steps": ahead, "cold": cold is not None, "share_of_time": share,
            "steps": step - 3, "step_s": elapsed / (step - 3)}  # fmt: skip


def drop_caches(tokens: Path) -> None:
    """Ask the system to forget the shards' pages, so that the next reads go to the disk."""
    for path in (tokens / TRAIN).glob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def packing_facts(tokens: Path) -> Iterator[dict[str, Any]]:
    """What either packing costs: padding, documents broken, and context lost, by length of rows."""
    info = read_info(tokens)
    for source, seq_len in itertools.product(info.sources, (512, 2048, 4096, 8192)):
        if not source[TRAIN]["tokens"]:
            continue
        shard = open_shard(info, TRAIN, source["name"])
        lengths = np.diff(shard.offsets)
        bins = best_fit(shard.offsets, seq_len)
        # Cut at every seq_len: a document is whole when both its ends lie in one row; its tokens before the first cut
        # keep their context, the others lose what lies before the last cut.
        first, last = shard.offsets[:-1] // seq_len, (shard.offsets[1:] - 1) // seq_len
        cut_tokens = np.where(first == last, 0, shard.offsets[1:] - (first + 1) * seq_len)
        long = np.where(lengths > seq_len, lengths - seq_len, 0)
        yield {
            "what": "packing", "source": source["name"], "seq_len": seq_len, "documents": len(shard),
            "longer_than_a_row": float((lengths > seq_len).mean()),
            "cut_documents_broken": float((first != last).mean()),
            "cut_tokens_without_their_beginning": float(cut_tokens.sum() / lengths.sum()),
            "whole_tokens_without_their_beginning": float(long.sum() / lengths.sum()),
            "whole_padding": bins.waste,
        }  # fmt: skip


def exactness(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Worst distance from the shares asked, over any ten million tokens, of random mixtures."""
    for n_sources, seq_len in itertools.product((2, 5, 20), (1024, 4096, 16384)):
        errors = []
        for seed in range(6):
            shares = np.random.default_rng(seed).dirichlet(np.full(n_sources, (0.3, 1, 5)[seed % 3])) + 1e-6
            errors.append(SourceSchedule(shares).worst_error(SHARE_TOKENS // seq_len))
        yield {"what": "shares", "sources": n_sources, "seq_len": seq_len, "mixtures": 6, "worst_error": max(errors)}


def realised(loader: MixtureLoader, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Shares asked, and those of the rows of ten million tokens from three places of a run, counted row by row."""
    info, steps = loader.info, -(-SHARE_TOKENS // (arguments.rows * arguments.seq_len))
    plan = loader.plan(0)
    for start in (0, 1000, 12_345):
        counts = dict.fromkeys(plan, 0)
        names = list(plan)
        for step in range(start, start + steps):
            numbers = step * arguments.rows + np.arange(arguments.rows)
            owners, _ = loader._schedule.locate(numbers)
            for owner in owners.tolist():
                counts[names[owner]] += arguments.seq_len
        total = sum(counts.values())
        for name, count in counts.items():
            yield {"what": "realised", "from_step": start, "tokens": total, "source": name,
                   "asked": plan[name]["share_asked"], "realised": count / total,
                   "epochs": count / info.source(name)[TRAIN]["tokens"]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=Path, help="output folder of tokenize (default: made-up documents)")
    parser.add_argument("--stream", type=Path, help="output folder of a stream stage, to measure waiting on it as well")
    parser.add_argument("--mixture", help="weights as JSON (default: by tokens)")
    parser.add_argument("--by", default="source", help="what they weigh: source, language, domain, language_domain")
    parser.add_argument("--made_up_tokens", type=int, default=50_000_000)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--rate", type=float, default=100_000, help="tokens a second that the device takes")
    parser.add_argument("--seconds", type=float, default=20, help="how long to measure waiting, each time")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=record.RESULTS / "loader.json")
    arguments = parser.parse_args()
    made = None if arguments.tokens else Path(tempfile.mkdtemp(prefix="loader-"))
    try:
        tokens = arguments.tokens or make_up(made, arguments.made_up_tokens)
        rows = [*speed(tokens, arguments), *packing_facts(tokens), *exactness(arguments)]
        rows += realised(opened(tokens, arguments), arguments)
        for ahead, cold in ((0, None), (2, None), (0, tokens), (2, tokens)):
            rows.append({"data": "shards"} | waiting(opened(tokens, arguments), arguments, cold=cold, ahead=ahead))
        if arguments.stream:
            for ahead in (0, 2):
                names = {source["name"]: 1.0 for source in read_info(arguments.stream).sources}
                loader = StreamLoader(
                    arguments.stream, seq_len=arguments.seq_len, global_batch_size=arguments.rows, seed=1,
                    mixture=Mixture(names),
                )  # fmt: skip
                rows.append({"data": "stream"} | waiting(loader, arguments, cold=None, ahead=ahead))
    finally:
        if made is not None:
            shutil.rmtree(made)
    for what in dict.fromkeys(row["what"] for row in rows):
        print(record.table([row for row in rows if row["what"] == what]), end="\n\n")
    settings = {"seq_len": arguments.seq_len, "rows": arguments.rows, "rate_tokens_per_s": arguments.rate,
                "made_up_tokens": None if arguments.tokens else arguments.made_up_tokens}  # fmt: skip
    record.write_result(arguments.output, rows, settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
