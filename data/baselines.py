"""Yardsticks that a language model must beat on the same held-out bytes."""

from __future__ import annotations

import lzma
from collections.abc import Iterable

import numpy as np

from data.heldout import HeldoutSet

ALL = "all"


def unigram_bits_per_byte(counts: np.ndarray, heldout: HeldoutSet) -> dict[str, float]:
    """Bits per byte, by language and for ``"all"``, of token frequencies with add-one smoothing.

    p(v) = (counts[v] + 1) / (sum(counts) + V), on exactly the tokens that the model is scored on.

    Args:
        counts: (V,) training counts of each id.
        heldout: the set to score.
    """
    smoothed = np.asarray(counts, dtype=np.float64) + 1
    bits = -np.log2(smoothed / smoothed.sum())
    spent = dict.fromkeys([*heldout.languages, ALL], 0.0)
    length = dict.fromkeys(spent, 0)
    for batch in heldout.batches(seq_len=4096, rows=64):
        ids, scored = batch.input_ids.numpy(), batch.scored.numpy()
        row_bits = np.where(scored, bits[ids], 0.0).sum(axis=1)
        row_bytes = batch.token_bytes.numpy().sum(axis=1)
        for language, row_bit, row_byte in zip(batch.language, row_bits.tolist(), row_bytes.tolist(), strict=True):
            for name in (language, ALL):
                spent[name] += row_bit
                length[name] += row_byte
    return {name: spent[name] / length[name] for name in spent if length[name]}


def xz_bits_per_byte(texts: Iterable[str | bytes]) -> float:
    """Bits per byte of ``xz -9e`` on the texts, each followed by a newline, as one file.

    Raises:
        ValueError: if there is no text.
    """
    joined = b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts)
    if not joined:
        raise ValueError("texts must hold at least one text; got none")
    return 8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / len(joined)
