"""The parent's log-probabilities of every answer, computed once and kept on disk, so that no second model is held.

A folder is named by everything that decides its content; it holds a file for each block of pairs, written whole or not
at all. A start after a kill computes the blocks that are missing, or that do not verify, and ranks share the work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.runtime import distributed
from stages.runtime.manifest import CheckpointError, write_atomic

BLOCK_PAIRS = 32
"""Pairs a file: what a killed run may have to compute again."""

Compute = Callable[[Sequence[Any]], np.ndarray]
"""Pairs to their (n, 2) float32 log-probabilities in nats: chosen, rejected."""

logger = logging.getLogger(__name__)


class ReferenceCache:
    """Log-probabilities of numbered pairs under one parent.

    Args:
        directory: where the folder lies (a stage's ``work``), on a disk that all ranks see.
        key: digests of parent, pairs and tokenizer, the longest length, the precision.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any]) -> None:
        text = json.dumps(dict(key), sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.directory = directory / f"reference-{self.key[:16]}"

    def fetch(self, pairs: Sequence[Any], compute: Compute, between: Callable[[], None] = lambda: None) -> np.ndarray:
        """(n, 2) float32 of ``pairs``, from disk where it verifies, computed and kept elsewhere; collective.

        ``between`` is called on all ranks, equally often, after each hand of blocks, one a rank; what it raises ends
        the pass, and the blocks that were written are not computed again.

        Raises:
            CheckpointError: when a block that was just written does not verify.
        """
        n_blocks = math.ceil(len(pairs) / BLOCK_PAIRS)
        missing = distributed.on_rank_zero(lambda: self._missing(n_blocks, len(pairs)))
        for hand in range(0, len(missing), distributed.world_size()):
            place = hand + distributed.rank()
            # At most one block a rank: the last hand may be short.
            for number in missing[place : place + 1]:
                values = compute(pairs[number * BLOCK_PAIRS : (number + 1) * BLOCK_PAIRS])
                write_atomic(self.path(number), self._content(number, np.asarray(values, np.float32).tolist()))
            between()
        distributed.barrier()
        blocks = [self._read(number, _size(number, len(pairs))) for number in range(n_blocks)]
        return np.concatenate(blocks) if blocks else np.zeros((0, 2), np.float32)

    def path(self, number: int) -> Path:
        """The file of block ``number``."""
        return self.directory / f"block-{number:05d}.json"

    def _missing(self, n_blocks: int, n_pairs: int) -> list[int]:
        self.directory.mkdir(parents=True, exist_ok=True)
        found = []
        for number in range(n_blocks):
            if not self.path(number).exists():
                found.append(number)
                continue
            try:
                self._read(number, _size(number, n_pairs))
            except CheckpointError as error:
                logger.warning("%s; computing it again", error)
                found.append(number)
        return found

    def _content(self, number: int, values: list[list[float]]) -> bytes:
        """The one way to write a block: comparing against it finds any flipped byte."""
        body = json.dumps({"key": self.key, "block": number, "nats": values})
        return json.dumps({"checksum": hashlib.sha256(body.encode()).hexdigest(), "body": body}).encode() + b"\n"

    def _read(self, number: int, size: int) -> np.ndarray:
        path = self.path(number)
        try:
            content = path.read_bytes()
            values = json.loads(json.loads(content)["body"])["nats"]
            whole = content == self._content(number, values)
            block = np.array(values, np.float32)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}") from error
        if not whole or block.shape != (size, 2):
            raise CheckpointError(f"{path} does not match its checksum")
        return block


def _size(number: int, n_pairs: int) -> int:
    return min(BLOCK_PAIRS, n_pairs - number * BLOCK_PAIRS)
