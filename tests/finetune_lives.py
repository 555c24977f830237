"""Whole lives of fine-tuning runs, killed, stopped and resumed, forked from one process that has the imports done.

``test_finetune_stages.py`` runs it as a script, a person for longer campaigns: ``finetune_lives.py ROOT [--kinds sft]
[--kills 20]`` prints one JSON object, by kind, of what was seen. Every life goes through ``stages.runtime.lifecycle``
with a real parent, tracker and checkpoints, on one or two ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path[:1] = [str(TESTS.parent), str(TESTS), str(TESTS.parent / "scripts")]
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")

import finetune_cases as cases  # noqa: E402
from kills import live  # noqa: E402

TIMED = {"time", "tokens_per_s", "mfu", "seconds", "rollout_tokens_per_s"}
SAVED = 85


class Bench:
    """One stage's lives: the same run, in any directory, on any number of ranks."""

    def __init__(self, kind: str, root: Path) -> None:
        self.case, self.root, self.kind = cases.CASES[kind], root, kind
        self.inputs = cases.make_inputs(self.case, root)
        self.chance = random.Random(kind)

    def life(self, name: str, *, ranks: int = 1, config: dict[str, Any] | None = None, **how: Any) -> int:
        """One life of the run ``name``; returns rank 0's exit code."""
        directory = self.root / name
        changes = {"checkpoint_every_steps": 2, "eval_every_steps": 3} | (config or {})
        log = directory.with_suffix(".log")
        return live(lambda: _on_ranks(ranks, lambda ready: self._execute(directory, changes, ready)), log=log, **how)

    def alone(self, body: Callable[[], int], *, ranks: int = 1) -> int:
        """A life of ``body`` on every rank, outside the lifecycle."""

        def on_rank(ready: Callable[[], Any]) -> int:
            ready()
            return body()

        return live(lambda: _on_ranks(ranks, on_rank), log=self.root / "alone.log")

    def _execute(self, directory: Path, changes: dict[str, Any], ready: Callable[[], Any] = lambda: None) -> int:
        from stages.runtime import distributed, lifecycle
        from stages.runtime.artifact import Job, canonical_digest

        identity = {"kind": self.kind, "code_version": 1, "sources": {}}
        job = Job(
            pipeline="lives", name=self.kind, kind=self.kind, key=canonical_digest(identity), identity=identity,
            extension={}, config=cases.config(self.case, **changes), model=cases.model(self.case), seed=17,
            directory=directory,
            parents={field: cases.link(field, path) for field, path in self.inputs.items()},
        )  # fmt: skip
        around = lifecycle.Surroundings(self.root / "cache")
        stage = self.case.stage_class()()
        if distributed.rank() == 0:
            return lifecycle.execute(stage, job, around, ready)
        return lifecycle.follow(stage, job, around)

    def warm_up(self) -> None:
        """Import here whatever a life imports on the way, so that a fork starts with all of it."""
        names = self.root / "modules"

        def first() -> int:
            code = self._execute(self.root / "warm-up", {})
            names.write_text("\n".join(sorted(sys.modules)))
            return code

        live(first, log=self.root / "warm-up.log")
        for name in names.read_text().splitlines() if names.exists() else []:
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def log(self, name: str) -> str:
        """The end of what a run's lives said."""
        return (self.root / name).with_suffix(".log").read_text()[-3000:]

    def unfinish(self, name: str) -> None:
        """Take a finished run's output away, as if it had died just before."""
        record = json.loads((self.root / name / "stage.json").read_text())
        (self.root / name / "stage.json").write_text(json.dumps(record | {"state": "failed"}))
        shutil.rmtree(self.root / name / "output", ignore_errors=True)

    def untrained(self, name: str) -> list[str]:
        """Tensors that the stage trains and are the parent's still; that it leaves and are not; that are not there."""
        from safetensors.torch import load_file

        parent = load_file(self.inputs["from_"] / "output" / "model.safetensors")
        output = load_file(self.root / name / "output" / "model.safetensors")
        trains = self.case.trains
        return [
            name for name in parent if name not in output or output[name].equal(parent[name]) is name.endswith(trains)
        ]

    def fingerprint(self, name: str) -> dict[str, Any]:
        """All bytes of a run's output, and every row that counts, times left out."""
        import hashlib

        from stages.runtime.tracking import read_metrics

        directory = self.root / name
        files = sorted(path for path in (directory / "output").rglob("*") if path.is_file())
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        rows = [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(directory)]
        return {"files": digests, "rows": [row for row in rows if row["event"] != "resume"]}

    def same(self, one: str, other: str) -> list[str]:
        """What differs between two finished runs."""
        a, b = self.fingerprint(one), self.fingerprint(other)
        found = [
            f"file {name}"
            for name in a["files"].keys() | b["files"].keys()
            if a["files"].get(name) != b["files"].get(name)
        ]
        found += [f"row {x} is {y}" for x, y in zip(a["rows"], b["rows"], strict=False) if x != y]
        return found if len(a["rows"]) == len(b["rows"]) else [*found, f"{len(a['rows'])} rows are {len(b['rows'])}"]


def _on_ranks(ranks: int, body: Callable[[Callable[[], Any]], int]) -> int:
    """``body(ready)`` on that many ranks, processes of one group; the other ranks begin when rank 0 calls ``ready``."""
    if ranks == 1:
        return body(lambda: None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    # The other ranks follow in the same process group, so that one signal ends all, as a lost machine does. As
    # under the launcher they begin when rank 0 has found nothing to refuse; else they are not needed.
    begin, begun = os.pipe()
    children = []
    for rank in range(1, ranks):
        child = os.fork()
        if child == 0:
            os.close(begun)
            os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(body(lambda: None) if os.read(begin, 1) else 0)
        children.append(child)
    os.environ.update(common, RANK="0", LOCAL_RANK="0")
    code = body(lambda: os.write(begun, b"." * len(children)))
    os.close(begun)
    for child in children:
        os.waitpid(child, 0)
    return code


def killed(bench: Bench, kills: int, *, name: str, whole: str, first: int, **how: Any) -> dict[str, Any]:
    """A run that is interrupted again and again, against the uninterrupted run ``whole``.

    The signal ``first`` ends it on all ranks: SIGTERM in its first steps, SIGKILL after the step that follows a
    checkpoint, so that there is something to go on from. Then it dies ``kills`` times before random file operations.
    """
    count_file = bench.root / f"{name}.operations"
    codes = [bench.life(whole, below=bench.root / whole, count_to=count_file, **how)]
    count = int(count_file.read_text()) if count_file.exists() else 0
    moment = _Logged(bench.root / name / "metrics.jsonl", step=1 if first == signal.SIGTERM else cases.STEPS - 1)
    codes.append(bench.life(name, signal_when=moment, signal_number=first, **how))
    # A resumed life has fewer operations than a whole one.
    places = [bench.chance.randint(1, max(2, count // 3)) for _ in range(kills)]
    for place in places:
        codes.append(bench.life(name, below=bench.root / name, kill_at_event=place, **how))
    codes.append(bench.life(name, **how))
    return {"codes": codes, "operations": count, "places": places, "differences": _compared(bench, whole, name, codes)}


class _Logged:
    """Whether a run has logged that training step."""

    def __init__(self, metrics: Path, step: int) -> None:
        self.metrics, self.row = metrics, f'"event": "train", "step": {step},'

    def __call__(self, seconds: float) -> bool:
        return self.metrics.exists() and self.row in self.metrics.read_text()


def _compared(bench: Bench, whole: str, name: str, codes: list[int]) -> list[str]:
    if codes[0] != 0 or codes[-1] != 0:
        return [f"a life that should end well did not: {bench.log(whole if codes[0] else name)}"]
    return bench.same(whole, name)


def flipped(bench: Bench, whole: str) -> list[str]:
    """Files of the newest checkpoint in which a flipped bit goes unseen; and the resume from the one before."""
    from stages.runtime.checkpoint import CheckpointStore

    name = "flipped"
    shutil.copytree(bench.root / whole, bench.root / name)
    store = CheckpointStore(bench.root / name / "checkpoints", keep=2)
    newest = store.path(store.steps()[-1])
    unseen = []
    for path in [path for path in sorted(newest.rglob("*")) if path.is_file()]:
        content = path.read_bytes()
        place = bench.chance.randrange(len(content))
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << bench.chance.randrange(8)]) + content[place + 1 :]
        )
        found = store.newest()
        if found is None or found[0] == store.steps()[-1]:
            unseen.append(path.name)
        if path.name != "manifest.json":
            path.write_bytes(content)
    # The last flip stays; the run must go back one checkpoint and end as the undisturbed one.
    bench.unfinish(name)
    code = bench.life(name)
    return unseen + ([] if code == 0 else [bench.log(name)]) + ([] if code else bench.same(whole, name))


def refused(bench: Bench, whole: str) -> list[Any]:
    """Exit code and last words when a checkpoint of two ranks meets one."""
    shutil.copytree(bench.root / whole, bench.root / "refused")
    bench.unfinish("refused")
    return [bench.life("refused", config={"deepspeed": "zero2"}), bench.log("refused")[-600:]]


def lives(bench: Bench, kills: int) -> dict[str, Any]:
    """Kills, stops and flips; what should end alike is compared."""
    two = {"ranks": 2, "config": {"deepspeed": "zero2", "micro_batch_size": 1}}
    result: dict[str, Any] = {"one_rank": killed(bench, kills, name="killed", whole="whole", first=signal.SIGKILL)}
    if result["one_rank"]["codes"][0] != 0:
        return result | {"fault": bench.log("whole")}
    result["untrained"] = bench.untrained("whole")
    result["two_ranks"] = killed(bench, kills, name="killed-two", whole="whole-two", first=signal.SIGTERM, **two)
    result["flips"] = flipped(bench, "whole")
    result["other_ranks"] = refused(bench, "killed-two")
    return result


def two_ranks_zero1(bench: Bench, kills: int) -> dict[str, Any]:
    """Two ranks under ZeRO-1; CI kills those of ZeRO-2, which partitions the gradients besides."""
    how = {"ranks": 2, "config": {"deepspeed": "zero1", "micro_batch_size": 1}}
    return killed(bench, kills, name="killed-zero1", whole="whole-zero1", first=signal.SIGTERM, **how)


def campaign(kind: str, root: Path, kills: int, parts: list[str]) -> dict[str, Any]:
    """All that is asked of one stage, or the ``parts`` of it."""
    started = time.monotonic()
    root.mkdir(parents=True)
    bench = Bench(kind, root)
    bench.warm_up()
    result: dict[str, Any] = {"import_s": time.monotonic() - started}
    if "lives" in parts:
        result |= lives(bench, kills)
    if "zero1" in parts:
        result["two_ranks_zero1"] = two_ranks_zero1(bench, kills)
    if "probes" in parts and bench.case.probes is not None:
        result["probes"] = bench.case.probes(bench)
    return result | {"seconds": time.monotonic() - started}


def main(argv: list[str] | None = None) -> int:
    """Run the campaigns and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("root", type=Path)
    parser.add_argument("--kinds", nargs="*", default=sorted(cases.CASES))
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--parts", nargs="*", choices=["lives", "zero1", "probes"], default=["lives", "probes"])
    options = parser.parse_args(argv)
    found = {kind: campaign(kind, options.root / kind, options.kills, options.parts) for kind in options.kinds}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
