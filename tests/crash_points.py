"""Every crash point of a small training run: kill it before each single file operation, resume, compare.

Run as a script by ``test_torture.py``, in a process of its own because it forks. The trainer is plain Python, so that
the whole enumeration costs seconds: a chain of hashes over a data cursor and a random generator, whose end depends on
every step before it, as weights do.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kills import KILLED, live

from stages.runtime.checkpoint import CheckpointStore

MAX_STEPS, SAVE_EVERY, PINNED = 5, 2, 2


class Trainer:
    """Steps ``h <- sha256(h, batch[cursor], noise)`` with its checkpoints in ``directory``."""

    def __init__(self, directory: Path, forget: str = "") -> None:
        self.store = CheckpointStore(directory / "checkpoints", keep=1)
        self.directory, self.step, self.cursor = directory, 0, 0
        self.weights = hashlib.sha256(b"initial").digest()
        self.noise = random.Random(17)
        found = self.store.newest()
        self.store.set_aside_after(found[0] if found else -1)
        if found is not None:
            self._restore(*found, forget)

    def _restore(self, step: int, folder: Path, state: dict[str, Any], forget: str) -> None:
        self.step = step
        self.weights = (folder / "engine.bin").read_bytes()
        if forget != "cursor":
            self.cursor = state["cursor"]
        if forget != "noise":
            version, internal, gauss = state["noise"]
            self.noise.setstate((version, tuple(internal), gauss))

    def save(self) -> None:
        """Save into the store, the step ``PINNED`` for good."""
        state = {"cursor": self.cursor, "noise": self.noise.getstate()}
        self.store.save(self.step, self._write, state, pin=self.step == PINNED)

    def _write(self, folder: Path) -> None:
        (folder / "engine.bin").write_bytes(self.weights)

    def run(self) -> None:
        """Train to the end, saving on the way."""
        while self.step < MAX_STEPS:
            batch = f"batch {self.cursor} {self.noise.random()}".encode()
            self.weights = hashlib.sha256(self.weights + batch).digest()
            self.step, self.cursor = self.step + 1, self.cursor + 1
            if self.step % SAVE_EVERY == 0 or self.step == MAX_STEPS:
                self.save()
        (self.directory / "final").write_bytes(self.weights)


class InPlaceTrainer(Trainer):
    """Saves as one should not: straight into the final folder, without manifest, pointer first."""

    def save(self) -> None:
        """Write the state where it is looked for, file by file."""
        (self.directory / "step").write_text(str(self.step))
        (self.directory / "cursor").write_text(json.dumps({"cursor": self.cursor, "noise": self.noise.getstate()}))
        (self.directory / "engine.bin").write_bytes(self.weights)

    def __init__(self, directory: Path, forget: str = "") -> None:
        super().__init__(directory, forget)
        if (directory / "step").exists():
            state = json.loads((directory / "cursor").read_text())
            self._restore(int((directory / "step").read_text()), directory, state, forget)


def outcome(directory: Path, make: Callable[[Path], Trainer], kills: list[int]) -> str:
    """Train in ``directory`` with one life killed before each of the file operations ``kills``; what came of it."""
    directory.mkdir()
    log = directory.with_suffix(".log")
    for kill_at in kills:
        code = live(lambda: make(directory).run(), log=log, kill_at_event=kill_at, below=directory)
        if code not in (KILLED, 0):
            return f"a life failed with {code}: {log.read_text()[-300:]}"
    code = live(lambda: make(directory).run(), log=log)
    if code != 0:
        return f"the last life failed with {code}: {log.read_text()[-300:]}"
    return (directory / "final").read_bytes().hex()


def leftovers(directory: Path) -> list[str]:
    """Names below ``directory/checkpoints`` that a finished run should not have left."""
    expected = {"latest", f"step-{PINNED:08d}", f"step-{PINNED:08d}.pin", f"step-{MAX_STEPS:08d}"}
    return sorted({path.name for path in (directory / "checkpoints").iterdir()} - expected)


def operations(directory: Path, make: Callable[[Path], Trainer]) -> int:
    """How many file operations an uninterrupted run makes."""
    directory.mkdir()
    counted = directory.with_suffix(".count")
    live(lambda: make(directory).run(), log=directory.with_suffix(".log"), below=directory, count_to=counted)
    return int(counted.read_text())


def main(root: Path) -> dict[str, Any]:
    """Enumerate all single kills, sample double kills, and run the controls that must differ."""
    reference = outcome(root / "reference", Trainer, [])
    count = operations(root / "counted", Trainer)
    single = {str(n): outcome(root / f"kill-{n}", Trainer, [n]) for n in range(1, count + 1)}
    chance = random.Random(3)
    double = [[chance.randint(1, count), chance.randint(1, count)] for _ in range(20)]
    twice = {str(pair): outcome(root / f"twice-{number}", Trainer, pair) for number, pair in enumerate(double)}
    middle = count // 2
    results: dict[str, Any] = {
        "operations": count,
        "wrong": {kills: found for kills, found in {**single, **twice}.items() if found != reference},
        "leftovers": {n: left for n in single if (left := leftovers(root / f"kill-{n}"))},
        "cursor_forgotten": outcome(root / "cursor", lambda path: Trainer(path, "cursor"), [middle]) != reference,
        "noise_forgotten": outcome(root / "noise", lambda path: Trainer(path, "noise"), [middle]) != reference,
        "in_place_wrong": sum(
            outcome(root / f"in-place-{n}", InPlaceTrainer, [n]) != reference
            for n in range(1, operations(root / "in-place", InPlaceTrainer) + 1)
        ),
    }
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
