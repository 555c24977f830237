"""From a cleaned corpus to token shards: encode in parts, shuffle by hash, count, audit, freeze.

Each source is encoded once, in the corpus's order, into the work folder, where finished parts survive a restart; then
its documents are copied into the output in the order of a seeded hash of their ids.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import corpus as corpora
from data.encode_parts import PartsEncoder, read_parts, write_json
from data.encoding import Encoder
from data.errors import DataError
from data.mix import hash64
from data.shards import (
    HELDOUT,
    TRAIN,
    Shard,
    ShardWriter,
    TokensInfo,
    heldout_digest,
    open_shard,
    read_ids,
    read_info,
)
from data.tokenizer import PAD

_COUNT_TOKENS = 1 << 22


def tokenize_corpus(
    corpus: Path,
    tokenizer_dir: Path,
    output: Path,
    *,
    work: Path,
    seed: int,
    chat_share: float,
    min_special_count: int,
    workers: int = 1,
    progress_seconds: float = 10.0,
) -> dict[str, Any]:
    """Write the tokens artifact of ``corpus`` into ``output``; returns the facts of ``tokens.json``.

    The same corpus, tokenizer, seed and share give the same bytes, restarted or not, by any number of ``workers``.

    Raises:
        DataError: if a document is in both splits, a split of the corpus has no text, or a special occurs too rarely.
    """
    listed, folder = corpora.sources(corpus), work / "encoded"
    with PartsEncoder(
        tokenizer_dir, folder, seed=seed, chat_share=chat_share, workers=workers, progress_seconds=progress_seconds
    ) as parts:
        encoded = {
            (source["name"], split): parts.encode(
                corpora.read_documents(corpus, split, source["name"]), split, source["name"]
            )
            for source, split in itertools.product(listed, (TRAIN, HELDOUT))
        }
        encoder = parts.encoder
    sources: list[dict[str, Any]] = [
        {
            **{field: source.get(field) for field in ("name", "language", "domain")},
            **{
                split: _order(encoder, folder, output, source["name"], split, encoded[source["name"], split])
                for split in (TRAIN, HELDOUT)
            },
        }
        for source in listed
    ]
    _check_overlap(output, [source["name"] for source in sources])
    shutil.copytree(tokenizer_dir, output / "tokenizer", dirs_exist_ok=True)
    facts = describe(encoder, output, sources)
    counts = _count(output, facts)
    facts["special_token_counts"] = {name: int(counts[token]) for name, token in encoder.specials.items()}
    _audit(facts, counts, min_special_count)
    np.save(output / "unigram.npy", counts)
    write_json(output / "tokens.json", facts)
    read_info(output)
    shutil.rmtree(folder)
    return facts


def describe(encoder: Encoder, output: Path, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``tokens.json`` says of shards that lie in ``output``, but for the counts of specials."""
    return {
        "vocab_size": encoder.vocab_size,
        "dtype": encoder.dtype.name,
        "eos_id": encoder.eos_id,
        "pad_id": encoder.pad_id,
        "tokenizer_digest": encoder.info["digest"],
        "sources": sources,
        "heldout_hash": heldout_digest(output, [(source["name"], source["language"]) for source in sources]),
    }


def _order(encoder: Encoder, folder: Path, output: Path, name: str, split: str, parts: Sequence[str]) -> dict[str, Any]:
    """Copy one source's documents into ``output`` in the order of a seeded hash of their ids."""
    ids, documents = read_parts(folder, split, parts, encoder.dtype)
    hashes = np.array([hash64("order", encoder.seed, document_id) for document_id in ids], dtype=np.uint64)
    with ShardWriter(output, split, name, encoder.dtype) as writer:
        for index in np.argsort(hashes, kind="stable").tolist():
            writer.append(ids[index], documents[index], encoder.text_bytes(documents[index]))
    return writer.facts()


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
    check_specials_trained(facts["special_token_counts"], min_special_count)


def check_specials_trained(counts: Mapping[str, int], min_special_count: int) -> None:
    """Refuse specials that training text holds too rarely (TRAPS T8)."""
    rare = {name: count for name, count in counts.items() if name != PAD and count < min_special_count}
    if rare:
        raise DataError(
            f"every special but {PAD} must occur at least min_special_count {min_special_count} times in training; "
            f"got {rare}; raise chat_share, add documents, or lower min_special_count"
        )
