"""The process in which ``data.tokenizer_learn`` has a vocabulary learned; ends with the process that asked for it."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from data.errors import DataError
from data.sample import Sample
from data.tokenizer_learn import FAULT, MODEL_FILE, REPORT_FILE, SAID, LearnJob

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def main(argv: Sequence[str]) -> int:
    """Learn the job ``argv[0]`` (JSON) into the folder ``argv[1]`` for the process ``argv[2]``; 1 means a fault."""
    _die_with(int(argv[2]))
    job, folder = LearnJob(**json.loads(argv[0])), Path(argv[1])
    try:
        sample = Sample(Path(job.corpus), job.max_bytes, job.language_shares, job.seed, job.progress_seconds, _say)
        model = _learn(job, sample)
    except (DataError, ValueError) as error:
        faults = error.faults if isinstance(error, DataError) else [("", str(error))]
        print(FAULT + json.dumps(faults), flush=True)
        return 1
    (folder / MODEL_FILE).write_bytes(model)
    report = {"sampled_bytes": sample.taken, "peak_rss_bytes": _peak_rss_bytes()}
    (folder / REPORT_FILE).write_text(json.dumps(report))
    return 0


def _learn(job: LearnJob, sample: Sample) -> bytes:
    from data.tokenizer_train import learn_byte_level, learn_sentencepiece

    if job.model_type == "sentencepiece_bpe":
        return learn_sentencepiece(sample, job.vocab_size, job.indentation_runs, is_watched=True)
    return learn_byte_level(sample, job.vocab_size, is_watched=True)


def _peak_rss_bytes() -> int:
    """The most memory of this program; Linux's ``getrusage`` would count that of the process it was forked from."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT_BYTES


def _say(line: str) -> None:
    print(SAID + line, flush=True)


def _die_with(parent: int) -> None:
    """Be killed when the process that asked ends, however it ends: learning answers no other request (TRAPS O7)."""
    import ctypes

    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the process that asked for a tokenizer has ended")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
