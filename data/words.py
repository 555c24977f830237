"""Words of text in any script, cheaply: what quality rules count and what overlap is measured in."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import regex

Array = np.ndarray

# Marks belong to the word: without \p{M} Hindi would be cut at every matra.
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+")
_LETTERS = regex.compile(r"[\p{L}\p{M}]+")
_WORD_OR_SIGN = regex.compile(r"[\p{L}\p{M}\p{N}_]+|[^\s\p{L}\p{M}\p{N}_]")


def words(text: str) -> list[str]:
    """Runs of letters, marks, digits and underscores."""
    return _WORD.findall(text)


def has_fewer_words(text: str, count: int) -> bool:
    """Whether ``text`` has fewer than ``count`` words; reads no further than it must."""
    found = itertools.islice(_WORD.finditer(text), count)
    return sum(1 for _ in found) < count


def words_and_signs(text: str) -> list[str]:
    """As ``words``, each other visible character an item of its own."""
    return _WORD_OR_SIGN.findall(text)


def count_letters(text: str) -> int:
    """Letters and the marks on them: a Devanagari syllable is both."""
    return sum(map(len, _LETTERS.findall(text)))


class WordRuns:
    """Hashes of all runs of ``length`` consecutive words of a text (or of the whole, when it is shorter).

    Case and signs do not count. A run's hash is a polynomial in its words' hashes modulo 2**64: the same for the same
    words on any machine.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._hashes = _WordHashes()

    def of(self, text: str) -> Array:
        """Hashes (uint64) of the runs in order; a text without words has none."""
        return self._rolled(words(text.casefold()))

    def shared(self, text: str, index: Array) -> Array:
        """The distinct runs of ``text`` that the sorted array ``index`` holds."""
        runs = np.unique(self.of(text))
        if not len(index):
            return runs[:0]
        return runs[index[np.minimum(np.searchsorted(index, runs), len(index) - 1)] == runs]

    def any_of(self, text: str, index: Array) -> bool:
        """Whether the sorted array ``index``, which is not empty, holds a run of ``text``."""
        runs = self.of(text)
        return bool((index[np.minimum(np.searchsorted(index, runs), len(index) - 1)] == runs).any())

    def by_length(self, text: str, lengths: Sequence[int]) -> dict[int, Array]:
        """Hashes (uint64) of the runs of each of ``lengths`` words; none where the text has fewer."""
        hashes = self._hashed(words(text.casefold()))
        found: dict[int, Array] = {}
        total = np.zeros(len(hashes), np.uint64)
        for length in range(1, max(lengths) + 1):
            total = total[: max(0, len(hashes) - length + 1)] * _MULTIPLIER + hashes[length - 1 :]
            if length in lengths:
                found[length] = total
        return found

    def spell(self, text: str, run: int) -> str:
        """The words behind the hash ``run`` of ``text``."""
        split = words(text.casefold())
        start = int(np.flatnonzero(self._rolled(split) == np.uint64(run))[0])
        return " ".join(split[start : start + self.length])

    def _rolled(self, split: list[str]) -> Array:
        if not split:
            return np.empty(0, np.uint64)
        hashes = self._hashed(split)
        length = min(self.length, len(split))
        total = np.full(len(split) - length + 1, length, np.uint64)
        for offset in range(length):
            total = total * _MULTIPLIER + hashes[offset : offset + len(total)]
        return total

    def _hashed(self, split: list[str]) -> Array:
        return np.fromiter(map(self._hashes.__getitem__, split), np.uint64, len(split))


_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MAX_KNOWN_WORDS = 1_000_000


class _WordHashes(dict[str, int]):
    """64-bit hashes by word, computed once; emptied when it has grown large."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_KNOWN_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return self.setdefault(word, int.from_bytes(digest, "little"))
