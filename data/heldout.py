"""The frozen held-out set, in rows to score: one document a row, right-padded, with the bytes each token stands for.

A document longer than ``seq_len`` is cut into windows; each later window begins with the last token of the one before,
which serves as its context and is not scored again. So every token is scored exactly once, except the first of each
document (it has no context) and specials (they stand for no text), whatever ``seq_len`` is: the bytes divided by are
the same for all. Tokens early in a window see little context, so ``seq_len`` is still part of what a figure means.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.shards import HELDOUT, heldout_digest, open_shard, read_info

if TYPE_CHECKING:
    import torch

_ROUND_TOKENS = 64


class HeldoutBatch(NamedTuple):
    """Rows to score; T is the longest row, rounded up, so that short documents cost little."""

    input_ids: torch.Tensor
    """(R, T) int64, right-padded with the pad id."""
    position_ids: torch.Tensor
    """(R, T) int64, 0..T-1 in each row."""
    seq_idx: torch.Tensor
    """(R, T) int32, zero: one document a row. Padding stands at the end, where no scored token can see it."""
    scored: torch.Tensor
    """(R, T) bool: whether the token at t, predicted from the tokens before it, counts. Never true at t = 0."""
    token_bytes: torch.Tensor
    """(R, T) int64: UTF-8 bytes that the token decodes to; 0 where it is not scored."""
    document: list[int]
    """Number of each row's document in the whole set; windows of one document share it."""
    language: list[str]
    source: list[str]

    @property
    def labels(self) -> torch.Tensor:
        """(R, T) int64, not shifted; -100 where nothing is scored."""
        return self.input_ids.masked_fill(~self.scored, -100)


class _Window(NamedTuple):
    shard: int
    first: int
    length: int
    document: int


class HeldoutSet:
    """The held-out documents of a tokens artifact, verified against the hash that was frozen with them (TRAPS M2, M3).

    Raises:
        ValueError: if the files differ from the frozen hash, or no token is held out.
    """

    def __init__(self, tokens_dir: Path | str) -> None:
        self.info = read_info(tokens_dir)
        names = [(source["name"], source["language"]) for source in self.info.sources]
        self._shards = [open_shard(self.info, HELDOUT, name) for name, _ in names]
        self.hash = heldout_digest(self.info.directory, names)
        if self.hash != self.info.heldout_hash:
            raise ValueError(
                f"{self.info.directory / HELDOUT} must hash to {self.info.heldout_hash}; got {self.hash}; "
                "the held-out files changed: restore them or run tokenize again"
            )
        if not any(len(shard) for shard in self._shards):
            raise ValueError(f"{self.info.directory / HELDOUT} must hold a document; got none; raise clean's share")
        self.token_bytes = np.load(self.info.directory / "tokenizer" / "token_bytes.npy").astype(np.int64)
        self.languages = sorted({shard.language for shard in self._shards if len(shard)})
        self.n_documents = sum(len(shard) for shard in self._shards)

    def batches(self, seq_len: int, rows: int) -> Iterator[HeldoutBatch]:
        """All windows, long ones first, ``rows`` at a time (the last batch may be smaller); always the same.

        Raises:
            ValueError: if ``seq_len`` is below 2 or ``rows`` below 1.
        """
        if seq_len < 2 or rows < 1:
            raise ValueError(f"seq_len must be at least 2 and rows at least 1; got {seq_len} and {rows}")
        # Sorting by length keeps padding small; the sort is stable, so the order is part of the definition.
        windows = sorted(self._windows(seq_len), key=lambda window: -window.length)
        for start in range(0, len(windows), rows):
            yield self._batch(windows[start : start + rows], seq_len)

    def texts(self, language: str | None = None) -> Iterator[bytes]:
        """UTF-8 bytes of each document, of one language if given."""
        from data.tokenizer import decode_bytes, load

        tokenizer = load(self.info.directory / "tokenizer")
        for shard in self._shards:
            if language in (None, shard.language):
                for index in range(len(shard)):
                    yield decode_bytes(tokenizer, shard.document(index)[:-1])

    def _windows(self, seq_len: int) -> Iterator[_Window]:
        document = 0
        for number, shard in enumerate(self._shards):
            for first, end in zip(shard.offsets[:-1].tolist(), shard.offsets[1:].tolist(), strict=True):
                # The closing EOS is never scored, so it is left out of the rows.
                for start in range(first, end - 2, seq_len - 1):
                    yield _Window(number, start, min(seq_len, end - 1 - start), document)
                document += 1

    def _batch(self, windows: list[_Window], seq_len: int) -> HeldoutBatch:
        import torch

        longest = windows[0].length
        width = min(seq_len, -(-longest // _ROUND_TOKENS) * _ROUND_TOKENS)
        input_ids = np.full((len(windows), width), self.info.pad_id, dtype=np.int64)
        for row, window in zip(input_ids, windows, strict=True):
            row[: window.length] = self._shards[window.shard].tokens[window.first : window.first + window.length]
        token_bytes = self.token_bytes[input_ids]
        token_bytes[:, 0] = 0
        positions = np.broadcast_to(np.arange(width), input_ids.shape).copy()
        return HeldoutBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(positions),
            seq_idx=torch.zeros(input_ids.shape, dtype=torch.int32),
            scored=torch.from_numpy(token_bytes > 0),
            token_bytes=torch.from_numpy(token_bytes),
            document=[window.document for window in windows],
            language=[self._shards[window.shard].language for window in windows],
            source=[self._shards[window.shard].name for window in windows],
        )
