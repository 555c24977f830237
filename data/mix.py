"""Which source each row of a run comes from, and which window of that source: pure functions of the row's number."""

from __future__ import annotations

import hashlib

import numpy as np

PERIOD_ROWS = 1 << 16
"""Rows after which the schedule of sources repeats; the grain to which shares are realised."""

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class SourceSchedule:
    """Assigns rows 0, 1, 2, ... to sources so that every prefix holds each source's share as closely as rows allow.

    One period of ``PERIOD_ROWS`` rows is laid out once: source i gets a whole number of rows by largest remainder, at
    least one (TRAPS T5: no share is rounded to zero), and its j-th row is due at time j / rows_i; rows are served in
    the order in which they are due, rare sources first among equals, so that a short run meets every source at once.

    Args:
        shares: positive weights, one a source; they need not sum to one.
    """

    def __init__(self, shares: np.ndarray) -> None:
        self.rows_per_period = _largest_remainder(np.asarray(shares, dtype=np.float64), PERIOD_ROWS)
        counts = self.rows_per_period
        owner = np.repeat(np.arange(len(counts)), counts)
        within = np.concatenate([np.arange(count) for count in counts])
        order = np.lexsort((counts[owner], within / counts[owner]))
        self._owner, self._within = owner[order], within[order]

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source number and running number within that source, both int64, of global row numbers."""
        period, place = np.divmod(np.asarray(rows, dtype=np.int64), PERIOD_ROWS)
        owner = self._owner[place]
        return owner, period * self.rows_per_period[owner] + self._within[place]

    def counts(self, n_rows: int) -> np.ndarray:
        """How many of the first ``n_rows`` rows each source gets; int64."""
        periods, rest = divmod(n_rows, PERIOD_ROWS)
        tail = np.bincount(self._owner[:rest], minlength=len(self.rows_per_period))
        return periods * self.rows_per_period + tail


def _largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    if len(shares) > total // 16:
        raise ValueError(f"sources must be at most {total // 16}; got {len(shares)}; merge the small ones")
    ideal = shares / shares.sum() * total
    counts = np.maximum(np.floor(ideal), 1).astype(np.int64)
    surplus = total - int(counts.sum())
    # The stable sort settles equal remainders by source order, so that the schedule is one and the same everywhere.
    order = np.argsort(-(ideal - counts), kind="stable")
    if surplus >= 0:
        counts[order[:surplus]] += 1
    else:
        counts[np.argmax(counts)] += surplus
    return counts


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Images of ``index`` under a keyed permutation of 0..size-1, in constant memory.

    A Feistel network over the next power of four, walked again while it lands outside (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"). The result depends on no library's random generator.

    Args:
        index: int64 in 0..size-1, any shape.
        size: of the domain.
        key: any 64-bit number.
    """
    half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN ^ np.uint64(key))
    result = index.astype(np.uint64)
    pending = np.ones(result.shape, dtype=bool)
    while pending.any():
        left, right = result[pending] >> half_bits, result[pending] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[pending] = (left << half_bits) | right
        pending = result >= np.uint64(size)
    return result.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), wrapping on purpose."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def hash64(*parts: object) -> int:
    """A stable 64-bit hash of the parts' text."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little")
