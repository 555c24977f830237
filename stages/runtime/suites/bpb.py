"""Bits per byte on frozen held-out documents, by language, with intervals over documents (TRAPS M1 to M4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.heldout import HeldoutSet
from data.shards import HELDOUT, open_shard, read_ids
from stages.runtime.suites.bench import Bench
from stages.runtime.suites.config import BpbConfig
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash

VERSION = 1


class Document(NamedTuple):
    """One held-out document to score, without its closing end token."""

    id: str
    language: str
    ids: list[int]


def run(bench: Bench, config: BpbConfig) -> SuiteResult:
    """``bpb/<language>`` and ``bpb/all``: bits of the scored tokens over the UTF-8 bytes that they stand for."""
    heldout = HeldoutSet(bench.inputs["data"])
    documents = list(chosen(bench.inputs["data"], config))
    set_hash = content_hash([heldout.hash, config.seq_len, [[doc.id, doc.ids] for doc in documents]])
    bits, n_bytes = _totals(bench, documents, heldout.token_bytes, config.seq_len)
    sheet = ScoreSheet("bpb", VERSION, set_hash, {"seq_len": config.seq_len, "heldout_hash": heldout.hash})
    items = Items([doc.id for doc in documents], bits, n_bytes)
    languages = [doc.language for doc in documents]
    for language in sorted(set(languages)):
        of_language = items.only([one == language for one in languages])
        sheet.add(f"bpb/{language}", of_language, unit="bits_per_byte", better="lower", n_unit="documents")
    sheet.add("bpb/all", items, unit="bits_per_byte", better="lower", n_unit="documents")
    return sheet.result()


def chosen(tokens_dir: Path, config: BpbConfig) -> Iterator[Document]:
    """The first ``documents`` of each source by id, each cut to its first ``document_tokens`` tokens."""
    info = HeldoutSet(tokens_dir).info
    for source in info.sources:
        shard = open_shard(info, HELDOUT, source["name"])
        ids = read_ids(info.directory, HELDOUT, source["name"])
        # Ids are hashes of the text, so the lowest are a fixed, unbiased choice.
        for number in sorted(range(len(shard)), key=lambda number: (ids[number], number))[: config.documents]:
            tokens = shard.document(number)[:-1][: config.document_tokens].tolist()
            if len(tokens) > 1:
                yield Document(f"{source['name']}/{ids[number]}", shard.language, tokens)


def _totals(
    bench: Bench, documents: list[Document], token_bytes: np.ndarray, seq_len: int
) -> tuple[list[float], list[float]]:
    """Bits and bytes of each document; specials stand for no text and are not scored, nor is the first token."""
    rows, owners = [], []
    for number, document in enumerate(documents):
        # Each later window begins with the last token of the one before, as its context.
        for start in range(0, len(document.ids) - 1, seq_len - 1):
            rows.append((document.ids[start : start + seq_len], 1))
            owners.append(number)
    nats: list[list[float]] = [[] for _ in documents]
    n_bytes = [0.0] * len(documents)
    for owner, (ids, _), scored in zip(owners, rows, bench.score(rows), strict=True):
        lengths = token_bytes[np.asarray(ids[1:])]
        nats[owner].append(math.fsum(scored.nats[lengths > 0]))
        n_bytes[owner] += float(lengths.sum())
    return [math.fsum(parts) / math.log(2) for parts in nats], n_bytes
