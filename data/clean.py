"""Cleaning as a datatrove pipeline: quality rules, exact and near duplicates. Imports datatrove: import late.

Each step runs over the same shards and leaves its result in the work folder; datatrove's completion marks make a killed
run go on where it stopped. The number of shards follows from the data alone, so the result does not depend on workers.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.logging import logger

from data.rules import WORDS, Normalise, SourceRules
from data.source_config import DedupConfig, Source
from data.sources import RawDocument, read_source
from data.words import WordRuns

SHARD_BYTES = 4_000_000
# SHA-1 takes text whatever the installed xxhash accepts.
HASHES = HashConfig(precision=64, hash_fc="sha1")


def clean_documents(
    sources: Sequence[Source], dedup: DedupConfig, cache: Path, work: Path, workers: int, say: Callable[[str], None]
) -> tuple[Path, list[Path]]:
    """Read, filter and deduplicate ``sources`` in ``work``.

    Returns the folder of surviving shards (``00000.jsonl`` ...) and the folders of dropped documents, whose metadata
    hold ``filter_reason``. ``say`` receives progress, one line at a time.
    """
    shards = ingest(sources, cache, work / "raw", say)
    run = partial(_run, work=work, workers=workers)
    say(f"quality rules over {shards} shards")
    filtered, exact, unique = work / "filtered", work / "exact", work / "unique"
    dropped = [work / "dropped" / step for step in ("rules", "exact", "near")]
    exact_config = ExactDedupConfig(_content, document_priority=_priority, hash_config=HASHES)
    run("filter", shards, [
        ShardReader(work / "raw"), Normalise(), SourceRules(sources, _writer(dropped[0])), _writer(filtered),
        ExactDedupSignature(str(work / "exact_signatures"), exact_config),
    ])  # fmt: skip
    say("exact duplicates")
    run("exact_find", 1, [ExactFindDedups(str(work / "exact_signatures"), str(work / "exact_found"), exact_config)])
    minhash = MinhashConfig(dedup.shingle_words, dedup.buckets, dedup.hashes_per_bucket, hash_config=HASHES)
    signature = [RunSignature(str(work / "signatures"), minhash, language=WORDS)] if dedup.near else []
    run("exact_filter", shards, [
        ShardReader(filtered), ExactDedupFilter(str(work / "exact_found"), exact_config, _writer(dropped[1])),
        _writer(exact), *signature,
    ])  # fmt: skip
    if not dedup.near:
        return exact, dropped[:2]
    say("near duplicates")
    _near(run, minhash, work, shards, dropped[2])
    return unique, dropped


def _near(run: Callable[..., None], config: MinhashConfig, work: Path, shards: int, dropped: Path) -> None:
    found, clusters = str(work / "near_pairs"), str(work / "near_clusters")
    buckets = MinhashDedupBuckets(str(work / "signatures"), found, config=config, lines_to_buffer=1000)
    run("near_pairs", config.num_buckets, [buckets])
    run("near_cluster", 1, [MinhashDedupCluster(found, clusters, config)])
    near_filter = MinhashDedupFilter(clusters, _writer(dropped))
    run("near_filter", shards, [ShardReader(work / "exact"), near_filter, _writer(work / "unique")])


def ingest(sources: Sequence[Source], cache: Path, folder: Path, say: Callable[[str], None]) -> int:
    """Read all sources into numbered shards of one source each; the number of shards.

    The folder appears by one rename, so a killed ingest starts over.
    """
    if not folder.is_dir():
        partial_folder = folder.with_suffix(".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        number = 0
        for order, source in enumerate(sources):
            for shard in _shards(_documents(source, order, cache, say)):
                (partial_folder / f"{number:05d}.jsonl").write_bytes(b"".join(shard))
                number += 1
        os.replace(partial_folder, folder)
    return len(list(folder.glob("*.jsonl")))


def _documents(source: Source, order: int, cache: Path, say: Callable[[str], None]) -> Iterator[bytes]:
    for raw in read_source(source, cache, say):
        metadata = {"source": source.name, "order": order, "title": raw.title, "origin": raw.origin}
        if fault := raw.fault or _fault(raw):
            metadata["fault"] = fault
        text = "" if fault else raw.text
        yield json.dumps({"text": text, "id": raw.origin, "metadata": metadata}, ensure_ascii=True).encode() + b"\n"


def _fault(raw: RawDocument) -> str | None:
    """Lone surrogates (from JSON escapes) cannot be written as UTF-8 by anybody further down."""
    try:
        raw.text.encode()
        (raw.title or "").encode()
    except UnicodeEncodeError:
        return "invalid_unicode"
    return None


def _shards(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    shard: list[bytes] = []
    size = 0
    for line in lines:
        shard.append(line)
        size += len(line)
        if size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one shard (``text``, ``id``, ``metadata``); none when a step kept nothing of it and wrote no file."""
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


class ShardReader(PipelineStep):
    """Task n reads shard n; unlike datatrove's reader it keeps empty documents, to be counted by a rule."""

    name = "shards"
    type = "reader"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """The shard's documents."""
        for row in read_shard(self.folder / f"{rank:05d}.jsonl"):
            yield Document(text=row["text"], id=row["id"], metadata=row["metadata"])


class ShardWriter(JsonlWriter):
    """Writes shards; datatrove's own adapter copies every document deeply, which costs more than the rules."""

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        return {"text": document.text, "id": document.id, "metadata": document.metadata}


class RunSignature(MinhashDedupSignature):
    """MinHash signatures over hashed runs of words: case and signs do not count, marks (matras, umlauts) do.

    datatrove's own shingles strip combining marks, which leaves Hindi with its consonants alone.
    """

    def get_shingles(self, text: str) -> Any:
        """Hashes of the text's shingles, uint64, (N, 1)."""
        return _word_runs(self.config.n_grams).of(text).reshape(-1, 1)


@lru_cache(maxsize=1)
def _word_runs(length: int) -> WordRuns:
    """One a process, since it remembers the hashes of words."""
    return WordRuns(length)


class QuietExecutor(LocalPipelineExecutor):
    """datatrove's local executor, its console output in files, without a helper process for one worker."""

    pipeline: list[Any]

    def run(self) -> None:
        """Run the incomplete tasks, in this process or in a pool."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1 or len(ranks) == 1:
            steps = self.pipeline
            for rank in ranks:
                self.pipeline = deepcopy(steps)
                _run_task(self, rank)
            return
        # Unlike datatrove's pool this one fails, rather than waits for ever, when a worker dies.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(min(self.workers, len(ranks)), mp_context=context) as pool:
            list(pool.map(partial(_run_task, self), ranks))


def _run_task(executor: LocalPipelineExecutor, rank: int) -> None:
    """Run one task; what datatrove prints (progress bars, log lines) goes to a file beside its logs."""
    console = Path(executor.logging_dir.path) / f"console_{rank:05d}.txt"
    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("w") as stream, contextlib.redirect_stderr(stream):
        try:
            executor._run_for_rank(rank, local_rank=1)
        finally:
            logger.remove()  # datatrove has just pointed its log at the stream that closes here


def _run(name: str, tasks: int, steps: list[Any], *, work: Path, workers: int) -> None:
    QuietExecutor(steps, tasks=tasks, workers=workers, logging_dir=str(work / "logs" / name)).run()


def _writer(folder: Path) -> JsonlWriter:
    return ShardWriter(str(folder), "${rank}.jsonl", compression=None)


def _content(document: Document) -> str:
    return document.text


def _priority(document: Document) -> int:
    """Of equal documents the one of the earliest source stays."""
    return max(1, 65535 - int(document.metadata["order"]))
