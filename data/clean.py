"""Cleaning as a datatrove pipeline: form, rules, content, exact and near duplicates. Imports datatrove: import late.

Each step runs over the same shards and leaves its result in the work folder; datatrove's completion marks make a killed
run go on where it stopped. The number of shards follows from the data alone, so the result does not depend on workers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document, DocumentsPipeline
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

from data.clean_config import FormConfig
from data.clean_executor import Steps
from data.clean_form import Form
from data.clean_lines import RANGES, CountLines, FindRepeated, repeated_lines
from data.rules import WORDS, Content, SourceRules
from data.source_config import DedupConfig, Source
from data.sources import RawDocument, look_at, read_source
from data.words import WordRuns

SHARD_BYTES = 4_000_000
# SHA-1 takes text whatever the installed xxhash accepts.
HASHES = HashConfig(precision=64, hash_fc="sha1")


class Cleaned(NamedTuple):
    """Folders of shards (``00000.jsonl`` ...): as read, surviving, and dropped, whose metadata hold the reason."""

    raw: Path
    survivors: Path
    dropped: list[Path]


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """What is done to the documents of ``sources``; ``content`` names files of the work folder."""

    sources: Sequence[Source]
    dedup: DedupConfig
    form: FormConfig
    content: Content


def clean_documents(cleaning: Cleaning, cache: Path, steps: Steps, say: Callable[[str], None]) -> Cleaned:
    """Read, edit, filter and deduplicate documents in ``steps.work``; ``say`` receives progress, a line at a time.

    Raises:
        SourceError: for a source that cannot be read as configured.
        DataError: for a step that a cluster did not finish.
    """
    work, sources, dedup = steps.work, cleaning.sources, cleaning.dedup
    shards = ingest(sources, cache, work / "raw", say)
    form = FormStep(sources, cleaning.form, _count_lines(cleaning, steps, shards, say))
    say(f"form and rules over {shards} shards")
    filtered, exact = work / "filtered", work / "exact"
    dropped = [work / "dropped" / step for step in ("rules", "exact", "near")]
    exact_config = ExactDedupConfig(_content, document_priority=_priority, hash_config=HASHES)
    steps("filter", shards, [
        ShardReader(work / "raw"), form, SourceRules(sources, _writer(dropped[0]), cleaning.content),
        _writer(filtered), ExactDedupSignature(str(work / "exact_signatures"), exact_config),
    ])  # fmt: skip
    say("exact duplicates")
    steps("exact_find", 1, [ExactFindDedups(str(work / "exact_signatures"), str(work / "exact_found"), exact_config)])
    minhash = MinhashConfig(dedup.shingle_words, dedup.buckets, dedup.hashes_per_bucket, hash_config=HASHES)
    signature = [RunSignature(str(work / "signatures"), minhash, language=WORDS)] if dedup.near else []
    steps("exact_filter", shards, [
        ShardReader(filtered), ExactDedupFilter(str(work / "exact_found"), exact_config, _writer(dropped[1])),
        _writer(exact), *signature,
    ])  # fmt: skip
    if not dedup.near:
        return Cleaned(work / "raw", exact, dropped[:2])
    say("near duplicates")
    _near(steps, minhash, shards, dropped[2])
    return Cleaned(work / "raw", work / "unique", dropped)


def _count_lines(cleaning: Cleaning, steps: Steps, shards: int, say: Callable[[str], None]) -> Path | None:
    """The folder of each source's repeated lines, where they are asked for."""
    if not cleaning.form.repeated_lines:
        return None
    say("lines that repeat")
    counts, found = steps.work / "line_counts", steps.work / "repeated_lines"
    steps("count_lines", shards, [ShardReader(steps.work / "raw"), CountLines(cleaning.sources, cleaning.form, counts)])
    steps("find_lines", RANGES, [FindRepeated(counts, found, cleaning.form.repeated_lines)])
    return found


def _near(steps: Steps, config: MinhashConfig, shards: int, dropped: Path) -> None:
    work = steps.work
    found, clusters = str(work / "near_pairs"), str(work / "near_clusters")
    buckets = MinhashDedupBuckets(str(work / "signatures"), found, config=config, lines_to_buffer=1000)
    steps("near_pairs", config.num_buckets, [buckets])
    steps("near_cluster", 1, [MinhashDedupCluster(found, clusters, config)])
    near_filter = MinhashDedupFilter(clusters, _writer(dropped))
    steps("near_filter", shards, [ShardReader(work / "exact"), near_filter, _writer(work / "unique")])


def ingest(sources: Sequence[Source], cache: Path, folder: Path, say: Callable[[str], None]) -> int:
    """Read all sources into numbered shards of one source each; the number of shards.

    The folder appears by one rename, so a killed ingest starts over.
    """
    if not folder.is_dir():
        partial_folder = folder.with_suffix(".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        for source in sources:
            # One that cannot be read as configured is told before the others are read for nothing.
            look_at(source, read_source(source, cache))
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
            metadata |= {"fault": fault, "bytes": raw.read_bytes, **({"detail": raw.detail} if raw.detail else {})}
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


class FormStep(PipelineStep):
    """Bring every document into form; what was edited is noted in its metadata."""

    name = "form"
    type = "formatter"

    def __init__(self, sources: Sequence[Source], config: FormConfig, repeated: Path | None = None) -> None:
        super().__init__()
        self.sources, self.config, self.repeated = {source.name: source for source in sources}, config, repeated
        self._forms: dict[str, Form] = {}

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """The documents, edited."""
        for document in data:
            if "fault" not in document.metadata:
                edited = self._form(document.metadata["source"]).settle(document.text)
                document.text = edited.text
                if edited.counts:
                    document.metadata |= {"edits": dict(edited.counts), "excerpts": edited.excerpts}
                if not edited.settled:
                    document.metadata["fault"] = "unsettled"
            yield document

    def _form(self, name: str) -> Form:
        if name not in self._forms:
            lines = repeated_lines(self.repeated, name) if self.repeated else frozenset()
            self._forms[name] = Form(self.sources[name].rules, self.config, lines)
        return self._forms[name]


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


def _writer(folder: Path) -> JsonlWriter:
    return ShardWriter(str(folder), "${rank}.jsonl", compression=None)


def _content(document: Document) -> str:
    return document.text


def _priority(document: Document) -> int:
    """Of equal documents the one of the earliest source stays."""
    return max(1, 65535 - int(document.metadata["order"]))
