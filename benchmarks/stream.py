"""Measure a stream: tokens a second of one core, where its time goes, and the share of a step's time that waits for it.

    python benchmarks/stream.py --stream runs/NAME/stream-KEY/output

A step is stood in for by sleeping as long as a device of ``--rate`` tokens a second would compute. Processor time is
that of this process, tokenizer included, on one thread; a busy machine makes it longer too, by its caches.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent))
import loader as waiting_for
import record

from data.mixture import Mixture
from data.shards import read_info
from data.stream import StreamLoader
from data.stream_workers import ParallelStream

WARM_STEPS = 3
PARTS = {"encode": "tokenizing", "_next_row": "reading and parsing rows", "overlaps": "overlap with held-out text",
         "find": "evaluation sets"}  # fmt: skip
"""What takes time, by the function that does it."""


def opened(arguments: argparse.Namespace, workers: int = 0) -> StreamLoader:
    """The stream with equal weights, read here or by processes."""
    weights = {source["name"]: 1.0 for source in read_info(arguments.stream).sources}
    plain: dict[str, Any] = {
        "seq_len": arguments.seq_len, "global_batch_size": arguments.rows, "seed": 1, "mixture": Mixture(weights),
    }  # fmt: skip
    if not workers:
        return StreamLoader(arguments.stream, **plain)
    lanes = range(StreamLoader.lanes_of(arguments.stream))
    return ParallelStream(arguments.stream, lanes=lanes, workers=workers, steps_ahead=2, **plain)


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one thread reads that does nothing else, once every source has its first window."""
    stream, rows = opened(arguments), slice(0, arguments.rows)
    for step in range(WARM_STEPS):
        stream.batch(step, rows)
    started, used, steps = time.perf_counter(), time.process_time(), []
    for step in range(WARM_STEPS, WARM_STEPS + arguments.steps):
        before = time.process_time()
        stream.batch(step, rows)
        steps.append(time.process_time() - before)
    tokens = arguments.steps * arguments.rows * arguments.seq_len
    return {
        "what": "read", "tokens": tokens, "tokens_per_core_second": tokens / (time.process_time() - used),
        "tokens_per_s": tokens / (time.perf_counter() - started), "median_step_core_s": sorted(steps)[len(steps) // 2],
        "slowest_step_core_s": max(steps), "load_average": os.getloadavg()[0],
    }  # fmt: skip


def parts(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Shares of the time of reading by what it goes into; the profiler slows Python more than the tokenizer."""
    stream, rows, profile = opened(arguments), slice(0, arguments.rows), cProfile.Profile()
    for step in range(WARM_STEPS):
        stream.batch(step, rows)
    profile.enable()
    for step in range(WARM_STEPS, WARM_STEPS + arguments.steps):
        stream.batch(step, rows)
    profile.disable()
    found = pstats.Stats(profile)
    spent = {what: 0.0 for what in PARTS.values()}
    for (file, _, function), (_, _, _, cumulative, _) in found.stats.items():  # type: ignore[attr-defined]
        if "/data/" in file and function in PARTS:
            spent[PARTS[function]] += cumulative
    for what, seconds in spent.items():
        yield {"what": "part", "part": what, "share_of_time": seconds / found.total_tt}  # type: ignore[attr-defined]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--stream", type=Path, required=True, help="output folder of a stream stage")
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--steps", type=int, default=100, help="steps to read for the speed")
    parser.add_argument("--rate", type=float, default=100_000, help="tokens a second that the device takes")
    parser.add_argument("--seconds", type=float, default=30, help="how long to measure waiting, each time")
    parser.add_argument("--workers", type=int, nargs="*", default=[1], help="numbers of processes to measure with")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "stream.json")
    arguments = parser.parse_args()
    rows = [speed(arguments), *parts(arguments)]
    for workers, ahead in ((0, 0), (0, 2), *((workers, 2) for workers in arguments.workers)):
        stream = opened(arguments, workers)
        found = waiting_for.waiting(stream, arguments, cold=None, ahead=ahead)
        stream.close()
        rows.append({"data_workers": workers} | found | {"load_average": os.getloadavg()[0]})
    for what in dict.fromkeys(row["what"] for row in rows):
        print(record.table([row for row in rows if row["what"] == what]), end="\n\n")
    settings = {"seq_len": arguments.seq_len, "rows": arguments.rows, "rate_tokens_per_s": arguments.rate,
                "lanes": StreamLoader.lanes_of(arguments.stream)}  # fmt: skip
    record.write_result(arguments.output, rows, settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
