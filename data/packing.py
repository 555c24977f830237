"""Document boundaries inside rows of packed tokens, read off the EOS that closes each document."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORE_INDEX = -100


class Packed(NamedTuple):
    """Arrays (R, T) that go with packed ids; see ``pack``."""

    labels: np.ndarray
    position_ids: np.ndarray
    seq_idx: np.ndarray


def pack(input_ids: np.ndarray, eos_id: int, pad_id: int | None = None) -> Packed:
    """Labels, positions and document numbers of rows cut from a stream whose documents end with EOS.

    A row's first token begins a document of its own, since whatever preceded it in the stream is not in the row. Labels
    are not shifted (the model shifts); what has no context in its row is not scored, nor is padding, which stands at a
    row's end as a document of its own that nothing scored can see. With EOS = 0 and padding = 1::

        input_ids     7  8  0  5  6  0  1  1
        labels     -100  8  0 -100 6  0 -100 -100
        position_ids  0  1  2  0  1  2  0  1
        seq_idx       0  0  0  1  1  1  2  2

    Args:
        input_ids: (R, T) int64.
        eos_id: the id that ends each document.
        pad_id: the id that fills rows, where the rows may be padded; it stands nowhere else.
    """
    starts = np.ones(input_ids.shape, dtype=bool)
    np.equal(input_ids[:, :-1], eos_id, out=starts[:, 1:])
    steps = np.arange(input_ids.shape[1], dtype=np.int64)
    document_start = np.maximum.accumulate(np.where(starts, steps, 0), axis=1)
    unscored = starts if pad_id is None else starts | (input_ids == pad_id)
    return Packed(
        labels=np.where(unscored, IGNORE_INDEX, input_ids),
        position_ids=steps - document_start,
        seq_idx=np.cumsum(starts, axis=1, dtype=np.int32) - np.int32(1),
    )
