"""Lines that stand in many documents of a source: menus, footers, licence notes, in any language. Imports datatrove.

Lines are counted once a document, by their hash, over the texts as the other edits leave them. Every shard writes its
counts sorted by hash; each of a few tasks then adds up one range of hashes, so that memory stays a share of the counts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data.clean_config import FormConfig
from data.clean_form import Form, line_hash
from data.source_config import Source

RANGES = 16
"""Tasks that add up counts, each over one range of hashes."""


class CountLines(PipelineStep):
    """Task n counts the lines of shard n, which is of one source."""

    name = "count lines"
    type = "counter"

    def __init__(self, sources: Sequence[Source], config: FormConfig, folder: Path) -> None:
        super().__init__()
        self.sources, self.config, self.folder = {source.name: source for source in sources}, config, folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Nothing goes on from here; the counts lie in ``<folder>/<source>/<shard>.npy``."""
        counts: Counter[int] = Counter()
        name = None
        for document in data:
            name = document.metadata["source"]
            form = Form(self.sources[name].rules, self.config)
            if form.boilerplate:
                counts.update(line_hashes(form.settle(document.text).text))
        if name is not None and counts:
            _write(self.folder / name / f"{rank:05d}.npy", counts)
        return
        yield


def line_hashes(text: str) -> set[int]:
    """Hashes of the lines of ``text``, without what surrounds them; empty ones have none."""
    return {line_hash(plain) for line in text.split("\n") if (plain := line.strip())}


def _write(path: Path, counts: Counter[int]) -> None:
    rows = np.array(list(counts.items()), np.uint64)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, rows[np.argsort(rows[:, 0])])
    os.replace(partial, path)


class FindRepeated(PipelineStep):
    """Task n adds up range n of the hashes and writes those of lines in more than ``limit`` documents of a source."""

    name = "repeated lines"
    type = "counter"

    def __init__(self, folder: Path, found: Path, limit: int) -> None:
        super().__init__()
        self.folder, self.found, self.limit = folder, found, limit

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Nothing goes on from here; the hashes lie in ``<found>/<source>/<range>.npy``."""
        for source in sorted(self.folder.glob("*")):
            repeated = _over(_in_range(source, rank, world_size), self.limit)
            target = self.found / source.name / f"{rank:05d}.npy"
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                np.save(file, repeated)
        return
        yield


def _in_range(source: Path, number: int, ranges: int) -> list[np.ndarray]:
    width = 2**64 // ranges
    first, last = number * width, 2**64 - 1 if number == ranges - 1 else (number + 1) * width - 1
    parts = []
    for path in sorted(source.glob("*.npy")):
        rows = np.load(path, mmap_mode="r")
        start = np.searchsorted(rows[:, 0], np.uint64(first))
        stop = np.searchsorted(rows[:, 0], np.uint64(last), side="right")
        parts.append(np.array(rows[start:stop]))
    return parts


def _over(parts: Iterable[np.ndarray], limit: int) -> np.ndarray:
    rows = np.concatenate([*parts, np.empty((0, 2), np.uint64)])
    hashes, where = np.unique(rows[:, 0], return_inverse=True)
    return hashes[np.bincount(where, rows[:, 1], len(hashes)) > limit]


def repeated_lines(found: Path, source: str) -> frozenset[int]:
    """Hashes of a source's repeated lines."""
    return frozenset(int(one) for path in sorted((found / source).glob("*.npy")) for one in np.load(path))
