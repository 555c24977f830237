"""Encoding one source in parts, by as many processes as wanted; finished parts survive a restart.

A part is a run of documents of the corpus, cut by bytes of text alone, so that parts are the same whatever the number
of workers. Its record is written last and names the documents and the digests of what was written: a part without
one, or that differs from it, is encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np

from data.encoding import Encoder
from data.errors import DataError
from data.shards import TRAIN, ShardWriter, file_digest, shard_paths

PART_BYTES = 4_000_000
_BATCH_DOCUMENTS = 256
Document = Mapping[str, Any]


class PartsEncoder:
    """Encodes sources in parts; a context manager that owns the worker processes.

    Args:
        tokenizer_dir: output of the tokenizer stage.
        folder: where parts lie between restarts.
        workers: processes; 1 encodes in this one.
    """

    def __init__(
        self,
        tokenizer_dir: Path,
        folder: Path,
        *,
        seed: int,
        chat_share: float,
        workers: int,
        progress_seconds: float,
    ) -> None:
        self.encoder = Encoder(tokenizer_dir, seed=seed, chat_share=chat_share)
        self.folder, self.workers, self._progress_seconds = folder, workers, progress_seconds
        self._settings = (tokenizer_dir, seed, chat_share)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> PartsEncoder:
        if self.workers > 1:
            self._pool = ProcessPoolExecutor(
                self.workers, multiprocessing.get_context("forkserver"), _start_worker, self._settings
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, documents: Iterable[Document], split: str, name: str) -> list[str]:
        """Encode the documents of ``split`` of source ``name``; the names of its parts, in the corpus's order.

        Raises:
            DataError: if a document is empty.
        """
        progress = _Progress(split, name, self._progress_seconds)
        names, running = [], set[Future[int]]()
        for number, part in enumerate(_parts(documents)):
            names.append(f"{name}.{number:05d}")
            if _is_done(self.folder, split, names[-1], part):
                progress.skip()
                continue
            if self._pool is None:
                progress.add(_write_part(self.encoder, self.folder, split, names[-1], part))
                continue
            running.add(self._pool.submit(_work, self.folder, split, names[-1], part))
            if len(running) > 2 * self.workers:
                # What waits is held in memory, so the corpus is read no faster than it is encoded.
                running = _settle(running, progress, wait(running, return_when=FIRST_COMPLETED).done)
        _settle(running, progress, wait(running).done)
        progress.end()
        return names


def _settle(running: set[Future[int]], progress: _Progress, done: set[Future[int]]) -> set[Future[int]]:
    for future in done:
        progress.add(future.result())
    return running - done


def _parts(documents: Iterable[Document]) -> Iterator[list[Document]]:
    part: list[Document] = []
    size = 0
    for document in documents:
        part.append(document)
        size += len(document["text"].encode())
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _write_part(encoder: Encoder, folder: Path, split: str, name: str, documents: Sequence[Document]) -> int:
    """Write one part and its record; the bytes of text in it."""
    size = 0
    with ShardWriter(folder, split, name, encoder.dtype) as writer:
        for start in range(0, len(documents), _BATCH_DOCUMENTS):
            batch = documents[start : start + _BATCH_DOCUMENTS]
            for document, ids in zip(batch, encoder.encode(batch, chat=split == TRAIN), strict=True):
                if len(ids) == 1:
                    source = name.rsplit(".", 1)[0]
                    message = f"document {document['id']} of {split}/{source} must hold text; it is empty; clean it"
                    raise DataError(message)
                writer.append(document["id"], ids, encoder.text_bytes(ids))
                size += len(document["text"].encode())
    record = {"documents": _identity(documents), "files": _digests(folder, split, name)}
    write_json(_record(folder, split, name), record)
    return size


def _is_done(folder: Path, split: str, name: str, documents: Sequence[Document]) -> bool:
    try:
        record = json.loads(_record(folder, split, name).read_text(encoding="utf-8"))
        return record == {"documents": _identity(documents), "files": _digests(folder, split, name)}
    except (OSError, ValueError):
        # A record that is not whole is none.
        return False


def _record(folder: Path, split: str, name: str) -> Path:
    return folder / split / f"{name}.done.json"


def _identity(documents: Sequence[Document]) -> str:
    return hashlib.sha256("\n".join(document["id"] for document in documents).encode()).hexdigest()


def _digests(folder: Path, split: str, name: str) -> list[str]:
    return [file_digest(path) for path in shard_paths(folder, split, name)]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that a reader finds the old file or the whole new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


class _Progress:
    """Lines of progress of one source."""

    def __init__(self, split: str, name: str, every_s: float) -> None:
        self._what, self._every_s = f"tokenize: {split}/{name}", every_s
        self._started = self._shown = time.monotonic()
        self._bytes = self._parts = self._skipped = 0

    def skip(self) -> None:
        self._skipped += 1

    def add(self, n_bytes: int) -> None:
        self._bytes += n_bytes
        self._parts += 1
        if time.monotonic() - self._shown > self._every_s:
            self._shown = time.monotonic()
            self._say("")

    def end(self) -> None:
        before = f", {self._skipped} parts were encoded before" if self._skipped else ""
        self._say(before)

    def _say(self, more: str) -> None:
        elapsed, size = max(time.monotonic() - self._started, 1e-9), self._bytes / 1e6
        print(f"{self._what} {size:.2f} MB in {elapsed:.1f} s, {size / elapsed:.2f} MB/s{more}", flush=True)


_encoder: Encoder | None = None


def _start_worker(tokenizer_dir: Path, seed: int, chat_share: float) -> None:
    global _encoder
    # The processes share the cores already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer_dir, seed=seed, chat_share=chat_share)


def _die_with_parent() -> None:
    """A killed parent closes nothing that its workers wait for; they would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    with contextlib.suppress(OSError):
        wait_for([parent.sentinel])
    os._exit(1)


def _work(folder: Path, split: str, name: str, documents: Sequence[Document]) -> int:
    assert _encoder is not None, "the pool starts workers with an encoder"
    return _write_part(_encoder, folder, split, name, documents)


def read_parts(
    folder: Path, split: str, names: Sequence[str], dtype: np.dtype[Any]
) -> tuple[list[str], list[np.ndarray]]:
    """Document ids and token ids (memory-mapped) of all documents of the parts ``names``, in their order."""
    ids: list[str] = []
    documents: list[np.ndarray] = []
    for name in names:
        stream, index, listed = shard_paths(folder, split, name)
        ids += listed.read_text(encoding="utf-8").splitlines()
        offsets = np.load(index)
        documents += np.split(np.memmap(stream, dtype=dtype, mode="r"), offsets[1:-1])
    return ids, documents
