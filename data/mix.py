"""Which source each row of a run comes from, and which window of that source: pure functions of the row's number."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence

import numpy as np

PERIOD_ROWS = 1 << 16
"""Rows after which the schedule of sources repeats; the grain to which shares are realised."""

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class SourceSchedule:
    """Assigns rows 0, 1, 2, ... to sources so that every prefix holds each source's share to less than one row.

    One period of ``PERIOD_ROWS`` rows is laid out once: source i gets a whole number of rows by largest remainder, at
    least one (TRAPS T5: no share is rounded to zero), spread by Tijdeman's rule ("The chairman assignment problem",
    Discrete Mathematics 32, 1980): the row after t goes to the source whose next row is due first among those that are
    behind by 1 / (2n - 2) or more. No source is then ever ahead or behind by more than 1 - 1 / (2n - 2) rows, which is
    the best that any rule can promise; over any w rows in a row a share errs by less than 2 / w.

    Args:
        shares: positive weights, one a source; they need not sum to one.
    """

    def __init__(self, shares: np.ndarray) -> None:
        self._shares = np.asarray(shares, dtype=np.float64) / np.sum(shares)
        self.rows_per_period = _largest_remainder(np.asarray(shares, dtype=np.float64), PERIOD_ROWS)
        self._owner = _chairmen(self.rows_per_period)
        self._within = np.empty(PERIOD_ROWS, dtype=np.int64)
        for source, count in enumerate(self.rows_per_period.tolist()):
            self._within[self._owner == source] = np.arange(count)

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

    def worst_error(self, rows: int) -> float:
        """Largest distance of a source's share from the one asked over any ``rows`` rows in a row.

        Whole periods hold the same rows wherever they begin, so only where the rest of a window lies is looked at.
        """
        width = max(1, rows)
        periods, rest = divmod(width, PERIOD_ROWS)
        owner = np.concatenate([self._owner, self._owner[:rest]])
        worst = 0.0
        for source, share in enumerate(self._shares):
            seen = np.concatenate([[0], np.cumsum(owner == source)])
            count = periods * self.rows_per_period[source] + seen[rest:] - seen[: len(seen) - rest]
            worst = max(worst, float(np.abs(count / width - share).max()))
        return worst


def _chairmen(counts: np.ndarray) -> np.ndarray:
    """(sum of counts,) int64: the source of each row of a period, by Tijdeman's rule in whole numbers."""
    n_sources, rows = len(counts), int(counts.sum())
    if n_sources == 1:
        return np.zeros(rows, dtype=np.int64)
    owner = np.repeat(np.arange(n_sources), counts)
    number = np.concatenate([np.arange(1, count + 1) for count in counts.tolist()])
    grain = 2 * n_sources - 2
    # Rows from 1: a source's j-th may come once it is behind by 1 / grain, and must before it is by 1 - 1 / grain.
    earliest = -(-rows * ((number - 1) * grain + 1) // (grain * counts[owner]))
    latest = rows * (number * grain - 1) // (grain * counts[owner]) + 1
    order = np.argsort(earliest, kind="stable").tolist()
    waiting: list[tuple[int, int, int]] = []
    result = np.empty(rows, dtype=np.int64)
    entered = 0
    for row in range(1, rows + 1):
        while entered < rows and earliest[order[entered]] <= row:
            one = order[entered]
            heapq.heappush(waiting, (int(latest[one]), int(counts[owner[one]]), int(owner[one])))
            entered += 1
        result[row - 1] = heapq.heappop(waiting)[2]
    return result


class PhasedSchedule:
    """A schedule whose shares change at given rows; each source goes on where the phase before left it.

    Args:
        phases: (first row, shares) of each phase, the first at row 0; a share of 0 leaves a source out of a phase.
    """

    def __init__(self, phases: Sequence[tuple[int, np.ndarray]]) -> None:
        self.first_rows = np.array([first for first, _ in phases], dtype=np.int64)
        assert self.first_rows[0] == 0, "the first phase begins at row 0"
        assert (np.diff(self.first_rows) > 0).all(), "phases are in order"
        self._members = [np.flatnonzero(shares) for _, shares in phases]
        self._schedules = [
            SourceSchedule(np.asarray(shares)[members])
            for (_, shares), members in zip(phases, self._members, strict=True)
        ]
        self._n_sources = len(phases[0][1])
        # Rows that each source had before each phase: (phases, sources).
        self._before = np.zeros((len(phases), self._n_sources), dtype=np.int64)
        for number, length in enumerate(np.diff(self.first_rows).tolist()):
            self._before[number + 1] = self._before[number] + self._within(number, length)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source number and running number within that source, both int64, of global row numbers."""
        rows = np.asarray(rows, dtype=np.int64)
        phases = np.searchsorted(self.first_rows, rows, side="right") - 1
        owners, numbers = np.empty_like(rows), np.empty_like(rows)
        for phase in np.unique(phases).tolist():
            mine = phases == phase
            owner, number = self._schedules[phase].locate(rows[mine] - self.first_rows[phase])
            owners[mine] = self._members[phase][owner]
            numbers[mine] = self._before[phase][owners[mine]] + number
        return owners, numbers

    def counts(self, n_rows: int) -> np.ndarray:
        """How many of the first ``n_rows`` rows each source gets; int64."""
        phase = int(np.searchsorted(self.first_rows, n_rows, side="right")) - 1
        return self._before[phase] + self._within(phase, n_rows - int(self.first_rows[phase]))

    def worst_error(self, rows: int) -> float:
        """Largest distance of a share from the one asked over any ``rows`` rows in a row, within a phase."""
        return max(schedule.worst_error(rows) for schedule in self._schedules)

    def _within(self, phase: int, n_rows: int) -> np.ndarray:
        counts = np.zeros(self._n_sources, dtype=np.int64)
        counts[self._members[phase]] = self._schedules[phase].counts(n_rows)
        return counts


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
