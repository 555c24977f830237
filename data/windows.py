"""Rows of one source, numbered from 0 for ever: cut from the stream, or packed from whole documents.

Either way row n is a pure function of n: epoch and place follow by division, the order within an epoch by a keyed
permutation, so that seeking costs nothing.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from data.best_fit import best_fit
from data.mix import hash64, permute
from data.shards import Shard

Packing = Literal["cut", "whole"]


class Rows(Protocol):
    """What the loader asks of either kind."""

    n_tokens: int
    fill: float
    """Share of a row that is text; what is left is padding."""

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """(R, T) int64 ids of rows ``numbers`` (R,)."""

    def epochs(self, n_rows: int) -> float:
        """Passes over the source that its first ``n_rows`` rows make."""


def open_rows(packing: Packing, shard: Shard, *, seq_len: int, seed: int, pad_id: int) -> Rows:
    """Rows of ``shard`` by the way of packing that a config names."""
    return CutRows(shard, seq_len, seed) if packing == "cut" else WholeRows(shard, seq_len, seed, pad_id)


class CutRows:
    """The stream read as a circle. Epoch e starts at a phase drawn for it and cuts the circle into
    floor(tokens / seq_len) windows, visited in a keyed order; what is left over (less than one window, elsewhere in
    every epoch) waits for the next epoch. Nothing is padded; documents break where a row ends.
    """

    fill = 1.0

    def __init__(self, shard: Shard, seq_len: int, seed: int) -> None:
        self.n_tokens = len(shard.tokens)
        self._shard, self._seq_len, self._seed = shard, seq_len, seed

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """(R, T) int64 ids of rows ``numbers`` (R,)."""
        result = np.empty((len(numbers), self._seq_len), dtype=np.int64)
        tokens = self._shard.tokens
        for row, start in zip(result, self._starts(numbers).tolist(), strict=True):
            end = start + self._seq_len
            if end <= self.n_tokens:
                row[:] = tokens[start:end]
            else:
                row[:] = np.take(tokens, np.arange(start, end), mode="wrap")
        return result

    def epochs(self, n_rows: int) -> float:
        """Passes over the source that its first ``n_rows`` rows make."""
        return n_rows * self._seq_len / self.n_tokens

    def _starts(self, numbers: np.ndarray) -> np.ndarray:
        """Where in the circle rows ``numbers`` start.

        A source shorter than one window has one window an epoch, which goes round the circle as often as it must;
        ``epochs`` counts such repeats by tokens.
        """
        n_windows = max(1, self.n_tokens // self._seq_len)
        epochs, slots = np.divmod(numbers, n_windows)
        starts = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            phase = hash64("phase", self._seed, self._shard.name, epoch) % self.n_tokens
            order = permute(slots[mine], n_windows, hash64("order", self._seed, self._shard.name, epoch))
            starts[mine] = (phase + order * self._seq_len) % self.n_tokens
        return starts


class WholeRows:
    """Rows of whole documents by best fit; only documents longer than a row are cut. The same rows come back in every
    epoch, in another order.
    """

    def __init__(self, shard: Shard, seq_len: int, seed: int, pad_id: int) -> None:
        self.n_tokens = len(shard.tokens)
        self._shard, self._seed, self._pad_id = shard, seed, pad_id
        self.bins = best_fit(shard.offsets, seq_len)
        self.fill = 1 - self.bins.waste

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """(R, T) int64 ids of rows ``numbers`` (R,), padded at their ends."""
        epochs, slots = np.divmod(numbers, len(self.bins))
        rows = np.empty_like(slots)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            key = hash64("whole", self._seed, self._shard.name, epoch)
            rows[mine] = permute(slots[mine], len(self.bins), key)
        places = self.bins.places(rows)
        padded = places < 0
        result = self._shard.tokens[np.where(padded, 0, places)].astype(np.int64)
        result[padded] = self._pad_id
        return result

    def epochs(self, n_rows: int) -> float:
        """Passes over the source that its first ``n_rows`` rows make."""
        return n_rows / len(self.bins)
