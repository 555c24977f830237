"""From a cleaned corpus to token shards: stream, encode, shuffle by hash, count, audit, freeze.

Each source is encoded once, in the corpus's order, into the work folder, where a finished source survives a restart;
then its documents are copied into the output in the order of a seeded hash of their ids.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import corpus as corpora
from data.chat import render
from data.chat_turns import as_chat
from data.errors import DataError
from data.mix import hash64
from data.shards import (
    HELDOUT,
    TRAIN,
    Shard,
    ShardWriter,
    TokensInfo,
    file_digest,
    heldout_digest,
    open_shard,
    read_ids,
    read_info,
    shard_paths,
    token_dtype,
)
from data.tokenizer import END_OF_TEXT, INFO_FILE, PAD, TOKEN_BYTES_FILE, encode_texts, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_DOCUMENTS = 256
_COUNT_TOKENS = 1 << 22


class _Job:
    """What every source of one run shares."""

    def __init__(self, tokenizer_dir: Path, *, seed: int, chat_share: float, progress_seconds: float) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load(tokenizer_dir)
        self.info = json.loads((tokenizer_dir / INFO_FILE).read_text(encoding="utf-8"))
        self.eos_id = self.info["special_tokens"][END_OF_TEXT]
        self.lengths = np.load(tokenizer_dir / TOKEN_BYTES_FILE).astype(np.int64)
        self.dtype = token_dtype(self.info["vocab_size"])
        self.seed, self.chat_share, self.progress_seconds = seed, chat_share, progress_seconds

    def encode(self, documents: list[Mapping[str, Any]], split: str) -> Iterator[list[int]]:
        """Ids of each document, closed by EOS; a share of training documents as chat."""
        chats = {
            number: messages
            for number, document in enumerate(documents)
            if split == TRAIN and self._is_chat(document["id"]) and (messages := as_chat(document))
        }
        plain = [document["text"] for number, document in enumerate(documents) if number not in chats]
        encoded = iter(encode_texts(self.tokenizer, plain))
        for number in range(len(documents)):
            ids = render(self.tokenizer, chats[number]).ids if number in chats else next(encoded)
            yield [*ids, self.eos_id]

    def _is_chat(self, document_id: str) -> bool:
        return hash64("chat", self.seed, document_id) / 2**64 < self.chat_share


def tokenize_corpus(
    corpus: Path,
    tokenizer_dir: Path,
    output: Path,
    *,
    work: Path,
    seed: int,
    chat_share: float,
    min_special_count: int,
    progress_seconds: float = 10.0,
) -> dict[str, Any]:
    """Write the tokens artifact of ``corpus`` into ``output``; returns the facts of ``tokens.json``.

    The same corpus, tokenizer, seed and share give the same bytes, restarted or not.

    Raises:
        DataError: if a document is in both splits, a split of the corpus has no text, or a special occurs too rarely.
    """
    job = _Job(tokenizer_dir, seed=seed, chat_share=chat_share, progress_seconds=progress_seconds)
    listed = corpora.sources(corpus)
    for source, split in itertools.product(listed, (TRAIN, HELDOUT)):
        _encode_source(job, corpus, work, source["name"], split)
    sources = [
        {
            "name": source["name"],
            "language": source["language"],
            **{split: _shuffle(job, work, output, source["name"], split) for split in (TRAIN, HELDOUT)},
        }
        for source in listed
    ]
    _check_overlap(output, [source["name"] for source in sources])
    shutil.copytree(tokenizer_dir, output / "tokenizer", dirs_exist_ok=True)
    facts = _facts(job, output, sources)
    counts = _count(output, facts)
    facts["special_token_counts"] = {name: int(counts[token]) for name, token in job.info["special_tokens"].items()}
    _audit(facts, counts, min_special_count)
    np.save(output / "unigram.npy", counts)
    _write_json(output / "tokens.json", facts)
    read_info(output)
    shutil.rmtree(work / "encoded")
    return facts


def _facts(job: _Job, output: Path, sources: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "vocab_size": job.info["vocab_size"],
        "dtype": job.dtype.name,
        "eos_id": job.eos_id,
        "pad_id": job.info["special_tokens"][PAD],
        "tokenizer_digest": job.info["digest"],
        "sources": sources,
        "heldout_hash": heldout_digest(output, [(source["name"], source["language"]) for source in sources]),
    }


def _encode_source(job: _Job, corpus: Path, work: Path, name: str, split: str) -> None:
    """Encode one source in the corpus's order, unless a finished one lies in the work folder."""
    folder = work / "encoded"
    done = folder / split / f"{name}.done.json"
    if _is_done(done, folder, split, name):
        print(f"tokenize: {split}/{name} was encoded before", flush=True)
        return
    started = shown = time.monotonic()
    size = 0
    with ShardWriter(folder, split, name, job.dtype) as writer:
        for batch in _batches(corpora.read_documents(corpus, split, name)):
            for document, ids in zip(batch, job.encode(batch, split), strict=True):
                if len(ids) == 1:
                    raise DataError(
                        f"document {document['id']} of {split}/{name} must hold text; it is empty; clean it"
                    )
                writer.append(document["id"], ids, int(job.lengths[ids].sum()))
                size += len(document["text"].encode())
            if time.monotonic() - shown > job.progress_seconds:
                shown = time.monotonic()
                print(
                    f"tokenize: {split}/{name} {size / 1e6:.1f} MB, {size / 1e6 / (shown - started):.2f} MB/s",
                    flush=True,
                )
    _write_json(done, writer.facts())
    elapsed = max(time.monotonic() - started, 1e-9)
    print(
        f"tokenize: {split}/{name} {size / 1e6:.2f} MB in {elapsed:.1f} s, {size / 1e6 / elapsed:.2f} MB/s", flush=True
    )


def _is_done(done: Path, folder: Path, split: str, name: str) -> bool:
    if not done.exists():
        return False
    facts = json.loads(done.read_text(encoding="utf-8"))
    stream, index, ids = shard_paths(folder, split, name)
    whole = stream.exists() and index.exists() and ids.exists() and index.stat().st_size == facts["index_bytes"]
    return whole and file_digest(stream) == facts["sha256"]


def _batches(documents: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    stream = iter(documents)
    while batch := list(itertools.islice(stream, _BATCH_DOCUMENTS)):
        yield batch


def _shuffle(job: _Job, work: Path, output: Path, name: str, split: str) -> dict[str, Any]:
    """Copy one source's documents into ``output`` in the order of a seeded hash of their ids."""
    folder = work / "encoded"
    facts = json.loads((folder / split / f"{name}.done.json").read_text(encoding="utf-8"))
    encoded = open_shard(_scratch_info(job, folder, name, split, facts), split, name)
    ids = read_ids(folder, split, name)
    hashes = np.array([hash64("order", job.seed, document_id) for document_id in ids], dtype=np.uint64)
    with ShardWriter(output, split, name, job.dtype) as writer:
        for index in np.argsort(hashes, kind="stable").tolist():
            document = encoded.document(index)
            writer.append(ids[index], document, int(job.lengths[document].sum()))
    return writer.facts()


def _scratch_info(job: _Job, folder: Path, name: str, split: str, facts: Mapping[str, Any]) -> TokensInfo:
    sources = [{"name": name, "language": "", split: facts}]
    return TokensInfo(folder, job.info["vocab_size"], job.dtype, job.eos_id, 0, "", {}, sources, "")


def _check_overlap(output: Path, names: list[str]) -> None:
    """Refuse a document that stands in both splits, in whatever sources (TRAPS M4)."""
    owner = {document: name for name in names for document in read_ids(output, HELDOUT, name)}
    for name in names:
        for document in read_ids(output, TRAIN, name):
            if document in owner:
                raise DataError(
                    f"document {document} must be in one split; it is in train/{name} and heldout/{owner[document]}; "
                    "run clean again"
                )


def _count(output: Path, facts: dict[str, Any]) -> np.ndarray:
    """(V,) int64 occurrences of each id in training."""
    info = TokensInfo(
        output, facts["vocab_size"], np.dtype(facts["dtype"]).newbyteorder("<"), facts["eos_id"], facts["pad_id"],
        facts["tokenizer_digest"], {}, facts["sources"], facts["heldout_hash"],
    )  # fmt: skip
    counts = np.zeros(info.vocab_size, dtype=np.int64)
    for source in info.sources:
        shard: Shard = open_shard(info, TRAIN, source["name"])
        for start in range(0, len(shard.tokens), _COUNT_TOKENS):
            counts += np.bincount(shard.tokens[start : start + _COUNT_TOKENS], minlength=info.vocab_size)
    return counts


def _audit(facts: dict[str, Any], counts: np.ndarray, min_special_count: int) -> None:
    """Every document closed once, and every special but padding trained (TRAPS T8, T4)."""
    documents = sum(source[TRAIN]["documents"] for source in facts["sources"])
    for split in (TRAIN, HELDOUT):
        if not any(source[split]["documents"] for source in facts["sources"]):
            raise DataError(f"corpus must hold {split} documents; got none; check what clean dropped")
    assert counts[facts["eos_id"]] == documents, "every document ends with EOS, and EOS stands nowhere else"
    rare = {
        name: count
        for name, count in facts["special_token_counts"].items()
        if name != PAD and count < min_special_count
    }
    if rare:
        raise DataError(
            f"every special but {PAD} must occur at least min_special_count {min_special_count} times in training; "
            f"got {rare}; raise chat_share, add documents, or lower min_special_count"
        )


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
