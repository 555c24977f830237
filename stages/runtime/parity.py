"""How far another program's logits are from the model's, on held-out text: exact sums, one window at a time.

N windows, T tokens of a window, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data.shards import HELDOUT, open_shard, read_info
from stages.runtime.audit import AuditError

_ROWS = 64
"""Positions compared at a time, in float64."""


class ParityError(AuditError):
    """An export that is not the model: beyond its bound, or with other ids; the stage fails."""


@dataclasses.dataclass
class Parity:
    """Sums over the compared positions; every position of every window counts, its next token where there is one."""

    positions: int = 0
    scored: int = 0
    kl_nats: float = 0.0
    agreeing: int = 0
    reference_nats: float = 0.0
    other_nats: float = 0.0
    max_logit_difference: float = 0.0

    def add(self, ids: Sequence[int], reference: np.ndarray, other: np.ndarray) -> None:
        """Compare the logits (T, V) of one window of T ``ids``."""
        if reference.shape != other.shape or len(ids) != len(reference):
            raise ParityError(f"logits must be {reference.shape} for {len(ids)} ids; got {other.shape}; export again")
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            following = np.asarray(ids[start + 1 : start + _ROWS + 1], np.int64)
            self._add_rows(following, reference[rows], other[rows])

    def _add_rows(self, following: np.ndarray, reference: np.ndarray, other: np.ndarray) -> None:
        ours, theirs = log_softmax(reference), log_softmax(other)
        self.positions += len(reference)
        self.kl_nats += float((np.exp(ours) * (ours - theirs)).sum())
        self.agreeing += int((reference.argmax(-1) == other.argmax(-1)).sum())
        difference = np.abs(reference.astype(np.float64) - other)
        # A NaN must not hide behind max's comparison.
        self.max_logit_difference = float(np.max([self.max_logit_difference, difference.max()]))
        self.scored += len(following)
        places = np.arange(len(following)), following
        self.reference_nats -= float(ours[places].sum())
        self.other_nats -= float(theirs[places].sum())

    def figures(self) -> dict[str, float | int]:
        """The means: KL in nats a token, perplexity over perplexity, share of equal likeliest tokens, and counts."""
        return {
            "tokens": self.positions,
            "scored_tokens": self.scored,
            "max_logit_difference": self.max_logit_difference,
            "mean_kl_nats": self.kl_nats / self.positions,
            "perplexity_ratio": math.exp((self.other_nats - self.reference_nats) / self.scored),
            "top1_agreement": self.agreeing / self.positions,
        }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def parity_windows(tokens_dir: Path, n_tokens: int, window_tokens: int) -> list[list[int]]:
    """The beginnings of held-out documents, sources in turn, until ``n_tokens`` ids are together; always the same.

    Raises:
        ValueError: if nothing of two or more tokens is held out.
    """
    info = read_info(tokens_dir)
    shards = [open_shard(info, HELDOUT, source["name"]) for source in info.sources]
    windows: list[list[int]] = []
    missing = n_tokens
    for number in range(max(map(len, shards))):
        for shard in shards:
            if number < len(shard) and missing > 1:
                window = shard.document(number)[: min(window_tokens, missing)].tolist()
                if len(window) > 1:
                    windows.append(window)
                    missing -= len(window)
    if not windows:
        raise ValueError(f"{tokens_dir} must hold out documents to compare on; it holds none; run clean with a share")
    return windows


def held_out_texts(tokens_dir: Path, max_documents: int, max_tokens: int) -> Iterator[np.ndarray]:
    """Ids of whole held-out documents, cut at ``max_tokens``, up to ``max_documents`` of each source."""
    info = read_info(tokens_dir)
    for source in info.sources:
        shard = open_shard(info, HELDOUT, source["name"])
        for number in range(min(len(shard), max_documents)):
            yield shard.document(number)[:max_tokens]


class StoredLogits:
    """The model's logits of all windows in one file, so that memory holds one model and one window at a time."""

    def __init__(self, path: Path, windows: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._edges = np.cumsum([0, *map(len, windows)])
        shape = (int(self._edges[-1]), vocab_size)
        self._all = np.memmap(path, dtype=np.float32, mode="w+", shape=shape)

    def fill(self, logits: Iterable[np.ndarray]) -> None:
        """Take in the logits of every window, in order."""
        for number, window in enumerate(logits):
            self._all[self._edges[number] : self._edges[number + 1]] = window

    def window(self, number: int) -> np.ndarray:
        """(T, V) of one window."""
        return self._all[self._edges[number] : self._edges[number + 1]]
