"""Packing that keeps documents whole: which documents share a row, by best fit, decreasing.

Cutting a stream every ``seq_len`` tokens breaks documents apart. Best-fit packing instead puts whole documents (and the
tails of those longer than a row) into rows with room for them (Ding et al. 2024, "Fewer truncations improve language
modeling", arXiv:2404.10830). What is left open in a row is padding: the waste, which ``Bins.waste`` states.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bins:
    """Rows of pieces: row r holds ``order[first[r]:first[r + 1]]``; piece p is ``length[p]`` tokens at ``start[p]``."""

    seq_len: int
    start: np.ndarray
    """(P,) int64, place of each piece in its stream."""
    length: np.ndarray
    """(P,) int32, tokens of each piece, 1..seq_len."""
    order: np.ndarray
    """(P,) int64, pieces row by row."""
    first: np.ndarray
    """(rows + 1,) int64."""

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def waste(self) -> float:
        """Share of all places that is padding."""
        places = len(self) * self.seq_len
        return 1 - float(self.length.sum()) / places if places else 0.0

    def places(self, rows: np.ndarray) -> np.ndarray:
        """(R, T) int64 places in the stream of each row's tokens; -1 is padding, at the row's end."""
        result = np.full((len(rows), self.seq_len), -1, dtype=np.int64)
        for place, row in zip(result, np.asarray(rows).tolist(), strict=True):
            at = 0
            for piece in self.order[self.first[row] : self.first[row + 1]].tolist():
                size = int(self.length[piece])
                place[at : at + size] = np.arange(self.start[piece], self.start[piece] + size)
                at += size
        return result


def best_fit(offsets: np.ndarray, seq_len: int) -> Bins:
    """Pack the documents of ``offsets`` (documents + 1,) into rows of ``seq_len``; the same input gives the same rows.

    Long pieces come first; each goes into the open row with the least room that still takes it. Rows with equal room
    are alike, so all pieces of one length are placed together: time grows with ``seq_len`` squared at worst, not with
    the documents, and 10**8 of them take memory (some 40 bytes each) rather than time.
    """
    start, length = _pieces(np.asarray(offsets, dtype=np.int64), seq_len)
    by_length = np.argsort(-length, kind="stable")
    row_of, n_rows = _place(length[by_length], seq_len)
    # Within a row pieces stand in the order of the stream.
    order = by_length[np.lexsort((by_length, row_of))]
    first = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=n_rows))]).astype(np.int64)
    return Bins(seq_len, start, length.astype(np.int32), order, first)


def _pieces(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of documents, those longer than a row in pieces of a row and a rest."""
    sizes = np.diff(offsets)
    counts = -(-sizes // seq_len)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.repeat(offsets[:-1], counts) + within * seq_len
    return start, np.minimum(seq_len, np.repeat(offsets[1:], counts) - start)


def _place(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Row of each piece, given in descending length, and the number of rows."""
    row_of = np.empty(len(lengths), dtype=np.int64)
    open_rows: dict[int, list[np.ndarray]] = {}
    rooms = np.zeros(seq_len + 1, dtype=np.int64)
    n_rows = done = 0
    values, counts = np.unique(-lengths, return_counts=True)
    for size, count in zip((-values).tolist(), counts.tolist(), strict=True):
        end = done + count
        while done < end:
            fitting = np.flatnonzero(rooms[size:])
            if not len(fitting):
                # New rows for all pieces of this size that are left, as many to a row as go in.
                each = seq_len // size
                new = -(-(end - done) // each)
                row_of[done:end] = n_rows + np.arange(end - done) // each
                fill = np.full(new, each)
                fill[-1] = end - done - each * (new - 1)
                for taken in np.unique(fill).tolist():
                    _open(open_rows, rooms, seq_len - taken * size, n_rows + np.flatnonzero(fill == taken))
                n_rows, done = n_rows + new, end
                continue
            room = size + int(fitting[0])
            taken_rows = _take(open_rows, rooms, room, end - done)
            row_of[done : done + len(taken_rows)] = taken_rows
            _open(open_rows, rooms, room - size, taken_rows)
            done += len(taken_rows)
    return row_of, n_rows


def _open(open_rows: dict[int, list[np.ndarray]], rooms: np.ndarray, room: int, rows: np.ndarray) -> None:
    if room:
        open_rows.setdefault(room, []).append(rows)
        rooms[room] += len(rows)


def _take(open_rows: dict[int, list[np.ndarray]], rooms: np.ndarray, room: int, most: int) -> np.ndarray:
    """Up to ``most`` of the rows with ``room``, those opened last first."""
    rows = open_rows[room].pop()
    if len(rows) > most:
        open_rows[room].append(rows[most:])
        rows = rows[:most]
    rooms[room] -= len(rows)
    return rows
