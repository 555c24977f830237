"""Kill a real pretraining run again and again, and show that it ends as if nothing had happened.

``make torture`` runs 60 SIGKILLs at random moments and at random file operations (so in and between saves), some
SIGTERMs, a flipped byte in each file of a checkpoint, a full disk, and controls that must be told apart from the
uninterrupted run. Every finished run is compared with one that was never disturbed: all bytes of its output, and every
metric of every step. Then the making and the reading of data are killed 200 times (``torture_data.py``). SIGKILL leaves
the page cache alone, so a power cut is not what is shown here.
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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMED = {"time", "tokens_per_s", "mfu", "seconds", "data_wait_share"}
MAX_STEPS = 12
SETTINGS = {
    "max_steps": MAX_STEPS,
    "checkpoint_every_steps": 2,
    "eval_every_steps": 5,
    "keep_checkpoints": 2,
    "precision": "bf16",
    "deepspeed": "zero1",
}


class Bench:
    """The same tiny pretraining run, in any directory; ``lives`` counts the processes that lived for it."""

    def __init__(self, root: Path) -> None:
        import tiny_run

        from stages.runtime import artifact
        from stages.runtime.manifest import write_manifest

        self.root, self.lives = root, 0
        self.tokens = tiny_run.make_tokens(root / "tokens")
        self.digest = write_manifest(self.tokens / "output")
        record = {"format": artifact.FORMAT, "state": "done", "key": "0" * 64, "output_digest": self.digest}
        artifact.write_record(self.tokens, record)

    def life(self, directory: Path, patch: Any = None, **how: Any) -> int:
        """One life of the run in ``directory``, as ``kills.live`` has it; returns its exit code."""
        import kills

        self.lives += 1

        def body() -> int:
            if patch is not None:
                patch()
            return self._execute(directory)

        return kills.live(body, **how)

    def _execute(self, directory: Path) -> int:
        import tiny_run

        from stages.pretrain import Pretrain
        from stages.runtime import lifecycle
        from stages.runtime.artifact import Job, ParentLink, canonical_digest

        identity = {"kind": "pretrain", "code_version": 1, "sources": {}}
        job = Job(
            pipeline="torture",
            name="pretrain",
            kind="pretrain",
            key=canonical_digest(identity),
            identity=identity,
            extension={},
            config=tiny_run.config(**SETTINGS),
            model=tiny_run.spec(),
            seed=17,
            directory=directory,
            parents={"data": ParentLink("tokenize", "0" * 64, self.digest, self.tokens)},
        )
        return lifecycle.execute(Pretrain(), job, lifecycle.Surroundings(self.root / "cache"))


class Campaign:
    """The undisturbed run, and everything that is compared with it. ``faults`` gathers what went wrong."""

    def __init__(self, root: Path, seed: int) -> None:
        self.bench, self.root = Bench(root), root
        self.chance = random.Random(seed)
        self.faults: list[str] = []
        self._warm_up()
        reference = root / "reference"
        self._expect(reference, {0}, below=reference, count_to=root / "operations")
        self.operations = int((root / "operations").read_text())
        self.reference = fingerprint(reference)

    def flip(self) -> None:
        """A flipped byte in each file of the newest checkpoint is found and named, and the one before is taken."""
        from stages.runtime.checkpoint import CheckpointStore

        store = CheckpointStore(self.root / "reference/checkpoints", keep=2)
        newest = store.path(store.steps()[-1])
        files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
        for path in files:
            content = path.read_bytes()
            place = self.chance.randrange(len(content))
            flipped = content[place] ^ 1 << self.chance.randrange(8)
            path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
            self._check_flip(store, newest, path.name)
            path.write_bytes(content)
        print(f"flips: one in each of the {len(files)} files of {newest.name}")

    def control(self) -> None:
        """Faults on purpose: a resume that is not exact must be told from one that is."""
        import sabotage

        killed = self.root / "control"
        self._expect(killed, {-signal.SIGKILL}, patch=sabotage.die_after_step_7)
        for name, patch in sabotage.CONTROLS.items():
            directory = self.root / f"control-{name.replace(' ', '-')}"
            shutil.copytree(killed, directory)
            self._expect(directory, {0}, patch=patch)
            found = differences(directory, self.reference)
            if not any(fault.startswith("files: model.safetensors") for fault in found):
                self.faults.append(f"control {name}: other weights were not seen")
            print(f"control: a resume with {name} differs in {len(found)} places")

    def fill(self) -> None:
        """A save that finds no room ends the run with code 1, and costs nothing but the time.

        Once the room ends in the middle of the save (the kernel lets no file grow), and once, where we may mount
        a small disk in memory, it is seen to be too little before anything is written.
        """
        import sabotage

        directory = self.root / "limited"
        self._expect(directory, {1}, patch=sabotage.no_room_at_second_save)
        self._check_failed_save(directory, "could not be saved")
        self._finish(directory)
        disk = self.root / "disk"
        disk.mkdir()
        # Room for one checkpoint and most of a second.
        if not _mount(disk, f"size={int(1.7 * _size_bytes(self.root / 'reference/checkpoints') / 2)}"):
            print("no room: a small disk could not be mounted, so the check before the save was not tried")
            return
        try:
            self._expect(disk / "full", {1}, log=self.root / "full.log")
            self._check_failed_save(disk / "full", "nothing was written")
            _mount(disk, "remount,size=64m")
            self._finish(disk / "full", log=self.root / "full.log")
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def stop(self, stops: int) -> None:
        """``stops`` SIGTERMs, each after some more steps of one run: all end with exit code 85, and the run goes on."""
        directory = self.root / "stopped"
        for _ in range(stops):
            moment = _Moment(directory, max(1, MAX_STEPS // (stops + 1)), 0.0)
            self._expect(directory, {85}, signal_when=moment, signal_number=signal.SIGTERM)
        self._finish(directory)
        print(f"stops: {stops} SIGTERMs, each saved and ended in exit code 85")

    def kill(self, kills: int) -> None:
        """``kills`` SIGKILLs over as many runs as they take: half at a random moment, half at a random operation."""
        done = number = saving = 0
        while done < kills:
            directory = self.root / f"killed-{number}"
            code = self._deadly_life(directory)
            done += code != 0
            saving += code != 0 and any(directory.glob("checkpoints/*.tmp"))
            if code == 0 or done == kills:
                self._finish(directory)
                number += 1
        print(f"kills: {done} in {number} runs, {saving} of them in the middle of a save")

    def _warm_up(self) -> None:
        """Import here whatever a life imports on the way, so that a fork starts with all of it."""
        import sabotage

        names = self.root / "modules"
        self._expect(self.root / "warm-up", {0}, patch=sabotage.leave_modules(names))
        for name in names.read_text().splitlines():
            # Some are made on the fly and cannot be imported by name.
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def _deadly_life(self, directory: Path) -> int:
        codes = {0, -signal.SIGKILL}
        if self.chance.random() < 0.5:
            moment = _Moment(directory, self.chance.randint(0, MAX_STEPS // 2), self.chance.uniform(0, 0.2))
            return self._expect(directory, codes, signal_when=moment)
        # A resumed life has fewer operations than a whole one.
        event = self.chance.randint(1, self.operations // (2 if directory.exists() else 1))
        return self._expect(directory, codes, below=directory, kill_at_event=event)

    def _finish(self, directory: Path, **how: Any) -> None:
        """Let the run end undisturbed (nothing happens when it has), and compare."""
        self._expect(directory, {0}, **how)
        self.faults += [f"{directory.name}: {fault}" for fault in differences(directory, self.reference)]

    def _expect(self, directory: Path, codes: set[int], **how: Any) -> int:
        how.setdefault("log", directory.with_suffix(".log"))
        code = self.bench.life(directory, **how)
        if code not in codes:
            log = how["log"].read_text()[-2000:]
            raise SystemExit(f"{directory.name}: a life ended with {code}, not in {codes}; its log ends:\n{log}")
        return code

    def _check_flip(self, store: Any, newest: Path, name: str) -> None:
        from stages.runtime.checkpoint import CheckpointError, verify_manifest

        try:
            verify_manifest(newest)
            self.faults.append(f"flip: the flipped byte of {name} was not found")
        except CheckpointError as error:
            if name not in str(error):
                self.faults.append(f"flip: {name} was not named: {error}")
        found = store.newest()
        if found is None or found[0] != store.steps()[-2]:
            self.faults.append(f"flip: {name} did not lead back to the checkpoint before")

    def _check_failed_save(self, directory: Path, said: str) -> None:
        record = json.loads((directory / "stage.json").read_text())
        if record["state"] != "failed" or said not in str(record["error"]):
            self.faults.append(f"{directory.name}: stage.json says {record['state']}: {record['error']}")
        left = sorted(path.name for path in (directory / "checkpoints").iterdir() if path.name.startswith("step-"))
        if left != ["step-00000002"]:
            self.faults.append(f"{directory.name}: checkpoints are {left}")
        print(f"no room: {record['error']}")


class _Moment:
    """True some time after the run in ``directory`` has trained ``steps`` more steps than now."""

    def __init__(self, directory: Path, steps: int, delay_s: float) -> None:
        self._metrics = directory / "metrics.jsonl"
        self._rows = self._trained() + steps
        self._delay_s = delay_s
        self._reached_s: float | None = None

    def __call__(self, seconds: float) -> bool:
        if self._reached_s is None and self._trained() >= self._rows:
            self._reached_s = seconds
        return self._reached_s is not None and seconds >= self._reached_s + self._delay_s

    def _trained(self) -> int:
        return self._metrics.read_bytes().count(b'"event": "train"') if self._metrics.exists() else 0


def fingerprint(directory: Path) -> dict[str, Any]:
    """What no interruption may change: hashes of all output files, and the metrics that hold, by event and step."""
    from stages.runtime.journal import HISTORY, current_rows

    files = json.loads((directory / "output/manifest.json").read_text())["files"]
    # Speed is among the final metrics, so this one file is compared by its content.
    files["evaluation.json"] = untimed(json.loads((directory / "output/evaluation.json").read_text())["metrics"])
    metrics = {
        f"{row.values['event']} {row.values['step']}": untimed(row.values)
        for row in current_rows(directory)
        if row.values["event"] not in HISTORY
    }
    return {"files": files, "metrics": metrics}


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    """Metrics without what depends on the clock."""
    return {name: value for name, value in values.items() if name not in TIMED}


def differences(directory: Path, reference: dict[str, Any]) -> list[str]:
    """In words, how a finished run differs from the undisturbed one; rows that a kill made obsolete count too."""
    from stages.runtime.journal import HISTORY, read_rows

    found = fingerprint(directory)
    faults = []
    for part in ("files", "metrics"):
        names = sorted(found[part].keys() | reference[part].keys())
        faults += [f"{part}: {name}" for name in names if found[part].get(name) != reference[part].get(name)]
    for row in read_rows(directory):
        name = f"{row.values['event']} {row.values['step']}"
        if row.values["event"] not in HISTORY and untimed(row.values) != reference["metrics"].get(name):
            faults.append(f"row {row.number}: {name}")
    leftovers = sorted(path.name for path in (directory / "checkpoints").glob("*.tmp"))
    return faults + [f"left behind: {name}" for name in leftovers]


def _size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _mount(disk: Path, options: str) -> bool:
    """Mount a file system in memory, or change its options; whether that was allowed."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs (default 60)")
    parser.add_argument("--stops", type=int, default=4, help="SIGTERMs, at most 11 (default 4)")
    parser.add_argument("--data_kills", type=int, default=200, help="SIGKILLs over shards, tokenizers, loading (200)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parser.add_argument("--directory", type=Path, help="where to work; kept (default: a temporary one, removed)")
    return parser.parse_args(argv)


def prepare() -> None:
    """Settings and imports that every life needs, before the first fork."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled")
    sys.path[:1] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; 0 when every comparison held."""
    arguments = parse(argv)
    prepare()
    started = time.monotonic()
    root = Path(arguments.directory or tempfile.mkdtemp(prefix="torture-")).resolve()
    root.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(root, arguments.seed)
    print(f"a whole life has {campaign.operations} file operations; seed {arguments.seed}")
    campaign.flip()
    campaign.control()
    campaign.fill()
    campaign.stop(arguments.stops)
    campaign.kill(arguments.kills)
    if arguments.data_kills:
        import torture_data

        campaign.faults += torture_data.run(root / "data", arguments.data_kills, arguments.seed)
    for fault in campaign.faults:
        print(f"FAULT {fault}")
    verdict = f"{len(campaign.faults)} faults" if campaign.faults else "every run ended bit-equal"
    print(f"{verdict}; {campaign.bench.lives} lives in {time.monotonic() - started:.0f} s")
    if arguments.directory is None and not campaign.faults:
        shutil.rmtree(root)
    return 1 if campaign.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
