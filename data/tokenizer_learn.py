"""Learning a vocabulary in a process of its own, which can be watched, stopped at once, and takes its memory with it.

The libraries learn inside one call that neither says how far it is nor answers Ctrl-C. Here the call runs in a worker
(``data.tokenizer_worker``), whose log is read as it comes. What it learns is a function of its job and the corpus
alone: a run that is killed at any moment starts anew and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
MODEL_FILE, REPORT_FILE = "learned", "report.json"
FAULT, SAID = "fault: ", "said: "
"""How a worker's lines begin that are for the user; after ``FAULT`` come ``DataError.faults`` as JSON."""
_MERGED = re.compile(r"bpe_model_trainer.* (?:merges|size)=(\d+) ")


@dataclasses.dataclass(frozen=True)
class LearnJob:
    """What to learn, from which sample of which corpus (``data.sample.Sample``), and how often to say how far it is.

    ``model_type`` is ``byte_level_bpe`` or ``sentencepiece_bpe``.
    """

    corpus: str
    model_type: str
    vocab_size: int
    indentation_runs: list[int]
    max_bytes: int
    language_shares: dict[str, float] | None
    seed: int
    progress_seconds: float


@dataclasses.dataclass(frozen=True)
class Learned:
    """The model as the library writes it, the bytes sampled by language, and the worker's most memory."""

    model: bytes
    sampled_bytes: dict[str, int]
    peak_rss_bytes: int


def learn(job: LearnJob, work: Path) -> Learned:
    """Learn ``job`` in a worker, which writes below ``work``, and print how far it is.

    Raises:
        DataError: if the worker found a fault in what the user gave, or ended without a model.
    """
    folder = work / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    worker = subprocess.Popen(
        [sys.executable, "-m", "data.tokenizer_worker", json.dumps(dataclasses.asdict(job)), folder, str(os.getpid())],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace",
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    try:
        fault = _follow(worker, job)
        code = worker.wait()
    finally:
        worker.kill()
        worker.communicate()
    if code != 0:
        ended = f"learning must end well; its process ended with {code}; lower max_sample_bytes"
        raise DataError([(field, message) for field, message in json.loads(fault)] if fault else ended)
    learned = Learned((folder / MODEL_FILE).read_bytes(), **json.loads((folder / REPORT_FILE).read_bytes()))
    shutil.rmtree(folder)
    return learned


def _follow(worker: subprocess.Popen[str], job: LearnJob) -> str:
    """Print what the worker says, and now and then how far it is; returns the faults that it named, if any, as JSON."""
    started = shown = time.monotonic()
    fault = ""
    assert worker.stdout is not None, "opened as a pipe"
    for line in worker.stdout:
        if line.startswith(SAID):
            print(line.removeprefix(SAID), end="", flush=True)
        elif line.startswith(FAULT):
            fault = line.removeprefix(FAULT).strip()
        elif time.monotonic() - shown >= job.progress_seconds and (progress := describe(line, job.vocab_size)):
            shown = time.monotonic()
            print(f"tokenizer: {progress}, {shown - started:.0f} s", flush=True)
    return fault


def describe(line: str, vocab_size: int) -> str:
    """How far a line of either library's log says that learning is; empty when it says nothing of it."""
    if found := _MERGED.search(line):
        return f"{int(found[1]):,} merges of about {vocab_size:,}"
    if line.startswith('{"stage"'):
        fields: dict[str, Any] = json.loads(line)
        return f"{fields['stage'].lower()} {fields['current']:,} of {fields['total']:,}"
    return "preparing words" if "trainer_interface.cc" in line else ""
