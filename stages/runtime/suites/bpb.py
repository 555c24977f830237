"""Bits per byte on frozen held-out documents, by language, source and domain, with intervals over documents (M1-M4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.heldout import HeldoutSet
from data.shards import HELDOUT, TRAIN, open_shard, read_ids, read_info, shard_paths
from data.tokenizer import decode_bytes
from stages.base import ConfigError, Fault
from stages.runtime.suites.bench import Bench
from stages.runtime.suites.config import BpbConfig
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash

VERSION = 2


class Document(NamedTuple):
    """One held-out document to score, without its closing end token; an undeclared ``domain`` is empty."""

    id: str
    language: str
    source: str
    domain: str
    ids: list[int]


def run(bench: Bench, config: BpbConfig) -> SuiteResult:
    """``bpb/<language>``, ``bpb/source/<source>``, ``bpb/domain/<domain>`` and ``bpb/all``.

    Each is the bits of the scored tokens over the UTF-8 bytes that those very tokens decode to.

    Raises:
        ConfigError: for held-out documents that were trained on, a source without any, or a wrong table of bytes.
    """
    directory = bench.inputs["data"]
    _refuse_trained_on(directory)
    heldout = HeldoutSet(directory)
    documents = list(chosen(directory, config))
    _refuse_wrong_bytes(bench, documents, heldout.token_bytes)
    set_hash = content_hash([heldout.hash, config.seq_len, [[doc.id, doc.ids] for doc in documents]])
    bits, n_bytes = _totals(bench, documents, heldout.token_bytes, config.seq_len)
    sheet = ScoreSheet("bpb", VERSION, set_hash, {"seq_len": config.seq_len, "heldout_hash": heldout.hash})
    items = Items([doc.id for doc in documents], bits, n_bytes)
    for part, prefix in (("language", "bpb"), ("source", "bpb/source"), ("domain", "bpb/domain")):
        groups = [getattr(doc, part) for doc in documents]
        for group in sorted(set(groups) - {""}):
            of_group = items.only([one == group for one in groups])
            sheet.add(
                f"{prefix}/{group}", of_group, unit="bits_per_byte", better="lower", n_unit="documents", part=part
            )
    sheet.add("bpb/all", items, unit="bits_per_byte", better="lower", n_unit="documents")
    return sheet.result()


def check(bench: Bench, config: BpbConfig) -> None:
    """Look at the held-out documents before any suite is run.

    Raises:
        ConfigError: as ``run`` does, of documents that were trained on and sources without any.
    """
    _refuse_trained_on(bench.inputs["data"])


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
                name = f"{source['name']}/{ids[number]}"
                yield Document(name, shard.language, source["name"], source.get("domain") or "", tokens)


def _refuse_trained_on(tokens_dir: Path) -> None:
    """Every source that was trained on has its held-out part, and no held-out document is among the training's (M4)."""
    info = read_info(tokens_dir)
    names = [source["name"] for source in info.sources]
    missing = [source["name"] for source in info.sources
               if source[TRAIN]["documents"] and not source[HELDOUT]["documents"]]  # fmt: skip
    if missing:
        message = f"must hold out documents of every source; got none of {', '.join(missing)}; raise clean's heldout"
        raise ConfigError(Fault("data", message))
    held = {one: name for name in names for one in read_ids(info.directory, HELDOUT, name)}
    for name in names:
        with shard_paths(info.directory, TRAIN, name)[2].open(encoding="utf-8") as lines:
            both = next((line.rstrip("\n") for line in lines if line.rstrip("\n") in held), None)
        if both is not None:
            message = (
                f"must not be trained on what it holds out; document {both} of {held[both]} is held out and in the "
                f"training part of {name}; run clean and tokenize again"
            )
            raise ConfigError(Fault("data", message))


def _refuse_wrong_bytes(bench: Bench, documents: Sequence[Document], token_bytes: np.ndarray) -> None:
    """The bytes that are divided by are those that the tokens decode to, document by document (M1)."""
    for document in documents:
        found, counted = len(decode_bytes(bench.tokenizer, document.ids)), int(token_bytes[document.ids].sum())
        if found != counted:
            message = (
                f"must count the bytes that its tokens decode to; document {document.id} has {found}, the table "
                f"token_bytes.npy says {counted}; run tokenizer and tokenize again"
            )
            raise ConfigError(Fault("data", message))


def _totals(
    bench: Bench, documents: Sequence[Document], token_bytes: np.ndarray, seq_len: int
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
