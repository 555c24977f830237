"""Kill the making and the reading of data again and again, and show that what comes out is the same to the bit.

Three things are killed by SIGKILL, at random moments and at random file operations: writing token shards, training a
tokenizer, and loading batches (from shards and from a stream, read ahead by a thread). Each is started again until it
ends, and compared with one that nobody disturbed: all bytes of shards and tokenizers, and a digest of every batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 40
SAVE_EVERY = 3
_KILLED = -int(signal.SIGKILL)


class Subject:
    """Something that is made in a folder, in as many lives as it takes; ``fingerprint`` says what came out."""

    def __init__(self, name: str, make: Callable[[Path], None], fingerprint: Callable[[Path], dict[str, str]]) -> None:
        self.name, self.make, self.fingerprint = name, make, fingerprint
        self.operations = 0
        self.seconds = 0.0
        self.reference: dict[str, str] = {}


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file below ``folder``."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shards(corpus: Path, tokenizer: Path) -> Subject:
    """Tokenizing a corpus in parts of a few documents."""
    from data import encode_parts
    from data.tokenize_corpus import tokenize_corpus

    encode_parts.PART_BYTES = 3_000

    def make(folder: Path) -> None:
        output, work = folder / "output", folder / "work"
        # As a stage's lifecycle does: the work survives, what is half written does not.
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        work.mkdir(exist_ok=True)
        tokenize_corpus(corpus, tokenizer, output, work=work, seed=3, chat_share=0.2, min_special_count=1)

    return Subject("shards", make, lambda folder: tree(folder / "output"))


def tokenizers(corpus: Path) -> Subject:
    """Training both kinds of tokenizer, each of which starts over when it is killed."""
    from data.corpus import read_documents
    from data.tokenizer_train import train_byte_level, train_sentencepiece

    def texts() -> Iterator[str]:
        return (document["text"] for document in read_documents(corpus, "train"))

    def make(folder: Path) -> None:
        for name, train in (("bytes", train_byte_level), ("pieces", train_sentencepiece)):
            output = folder / name
            if (output / "done").exists():
                continue
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True)
            train(texts(), 450, output)
            (output / "done").touch()

    return Subject("tokenizer training", make, tree)


def loading(name: str, open_loader: Callable[[], Any]) -> Subject:
    """Reading batches as a run does: the place is saved every few steps, what came after it is read again."""

    def make(folder: Path) -> None:
        from data.prefetch import Prefetcher

        folder.mkdir(exist_ok=True)
        loader, step, digests = open_loader(), 0, []
        saved = folder / "place.json"
        if saved.exists():
            content = json.loads(saved.read_text())
            step, digests = content["step"], content["digests"]
            if content["place"]:
                loader.restore(content["place"])
        position = getattr(loader, "position", lambda: None)
        batch = Prefetcher(loader.batch, steps=2, last_step=STEPS, position=position)
        while step < STEPS:
            found = [batch(step, slice(at, at + 2)) for at in (0, 2)]
            content = b"".join(tensor.numpy().tobytes() for part in found for tensor in part)
            digests.append(hashlib.sha256(content).hexdigest())
            step += 1
            if step % SAVE_EVERY == 0 or step == STEPS:
                save(saved, {"step": step, "digests": digests, "place": batch.position})
            # As long as a small model would take.
            time.sleep(0.002)
        batch.close()

    def fingerprint(folder: Path) -> dict[str, str]:
        digests = json.loads((folder / "place.json").read_text())["digests"]
        return {f"step {step}": digest for step, digest in enumerate(digests)}

    return Subject(name, make, fingerprint)


def save(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the old file or the whole new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def subjects(root: Path) -> list[Subject]:
    """All that is killed; corpus, tokenizer, shards and stream are made first."""
    import stream_cases
    import tiny_corpus

    from data.loader import MixtureLoader
    from data.mixture import Mixture, Phase
    from data.stream import StreamLoader

    corpus, tokenizer = tiny_corpus.build_corpus(root / "corpus"), stream_cases.make_tokenizer(root / "tokenizer")
    of_shards = shards(corpus, tokenizer)
    (root / "tokens").mkdir()
    of_shards.make(root / "tokens")
    described = stream_cases.write_sources(root / "text")
    stream_cases.freeze(root / "stream", tokenizer, described, passes={"web-en": 50, "buch-de": 50})
    sizes = {"seq_len": 64, "global_batch_size": 4, "seed": 5}
    later = (Phase(20, {"wiki": 0, "netz": 3, "gaon": 1, "python": 1}, "phases.0.mixture"),)
    mixture = Mixture({"wiki": 2, "netz": 1, "gaon": 1, "python": 1}, later=later)
    weights = Mixture({"web-en": 1.0, "buch-de": 2.0})

    def whole() -> Any:
        return MixtureLoader(root / "tokens/output", mixture=mixture, max_epochs=1e9, packing="whole", **sizes)

    return [
        of_shards,
        tokenizers(corpus),
        loading("loading shards", lambda: MixtureLoader(root / "tokens/output", mixture=mixture, **sizes)),
        loading("loading whole documents", whole),
        loading("loading a stream", lambda: StreamLoader(root / "stream/output", mixture=weights, **sizes)),
    ]


class Campaign:
    """Kills shared out among the subjects; ``faults`` gathers what came out differently."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.chance = root, random.Random(seed)
        self.faults: list[str] = []
        self.lives = 0
        self.subjects = subjects(root)
        for number, subject in enumerate(self.subjects):
            folder, count = root / f"reference-{number}", root / f"operations-{number}"
            started = time.monotonic()
            self._expect(subject, folder, {0}, below=folder, count_to=count)
            subject.seconds, subject.operations = time.monotonic() - started, int(count.read_text())
            subject.reference = subject.fingerprint(folder)

    def kill(self, kills: int) -> None:
        """Deal ``kills`` out to the subjects in turn, then let every one that was killed end, and compare."""
        done = [0] * len(self.subjects)
        at = [self.root / f"{number}-0" for number in range(len(self.subjects))]
        while sum(done) < kills:
            number = sum(done) % len(self.subjects)
            subject, folder = self.subjects[number], at[number]
            code = self._deadly_life(subject, folder)
            if code == 0:
                self._compare(subject, folder)
                at[number] = folder.with_name(f"{number}-{int(folder.name.split('-')[1]) + 1}")
                continue
            done[number] += 1
        for subject, folder, count in zip(self.subjects, at, done, strict=True):
            if folder.exists():
                self._expect(subject, folder, {0})
                self._compare(subject, folder)
            runs = int(folder.name.split("-")[1]) + 1
            print(f"{subject.name}: {count} kills in {runs} runs, {subject.operations} file operations in a whole life")

    def control(self) -> None:
        """A place that is forgotten, or is off by one step, must be told from one that is kept."""
        for subject in self.subjects:
            if not subject.name.startswith("loading"):
                continue
            folder = self.root / f"control-{subject.name.replace(' ', '-')}"
            folder.mkdir()
            save(folder / "place.json", {"step": 7, "digests": [], "place": None})
            # A stream refuses to go on without its place; shards go on, and give other steps.
            if self._expect(subject, folder, {0, 1}) == 0:
                found = list(subject.fingerprint(folder).values())
                if found == list(subject.reference.values())[: len(found)]:
                    self.faults.append(f"control: {subject.name} was not told from one that starts elsewhere")

    def _deadly_life(self, subject: Subject, folder: Path) -> int:
        if self.chance.random() < 0.5:
            moment = self.chance.uniform(0, subject.seconds)
            return self._expect(subject, folder, {0, _KILLED}, signal_when=lambda seconds: seconds >= moment)
        event = self.chance.randint(1, subject.operations)
        return self._expect(subject, folder, {0, _KILLED}, below=folder, kill_at_event=event)

    def _compare(self, subject: Subject, folder: Path) -> None:
        found = subject.fingerprint(folder)
        names = sorted(found.keys() | subject.reference.keys())
        wrong = [name for name in names if found.get(name) != subject.reference.get(name)]
        self.faults += [f"{subject.name}, {folder.name}: {name}" for name in wrong[:5]]
        shutil.rmtree(folder)

    def _expect(self, subject: Subject, folder: Path, codes: set[int], **how: Any) -> int:
        import kills

        self.lives += 1
        log = folder.with_suffix(".log")
        code = kills.live(lambda: subject.make(folder), log=log, **how)
        if code not in codes:
            raise SystemExit(f"{subject.name}: a life ended with {code}, not in {codes}:\n{log.read_text()[-2000:]}")
        return code


def run(root: Path, kills: int, seed: int) -> list[str]:
    """The whole campaign in ``root``; what came out differently."""
    started = time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(root, seed)
    campaign.control()
    campaign.kill(kills)
    for fault in campaign.faults:
        print(f"FAULT {fault}")
    verdict = f"{len(campaign.faults)} faults" if campaign.faults else "everything came out bit-equal"
    print(f"data: {kills} kills, {verdict}; {campaign.lives} lives in {time.monotonic() - started:.0f} s; seed {seed}")
    return campaign.faults


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; 0 when every comparison held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parser.add_argument("--directory", type=Path, help="where to work; kept (default: a temporary one, removed)")
    arguments = parser.parse_args(argv)
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    sys.path[:1] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
    root = Path(arguments.directory or tempfile.mkdtemp(prefix="torture-data-")).resolve()
    faults = run(root, arguments.kills, arguments.seed)
    if arguments.directory is None and not faults:
        shutil.rmtree(root)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
