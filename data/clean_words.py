"""The words of one document, split once for every rule that counts them.

Gopher's rules on words (Rae et al. 2021, table A1 and appendix A.1.1) with the decisions that datatrove's filters make
on the same words. They are quicker because what is asked of a word is remembered, n-grams are counted as tuples rather
than as joined text, and the slow count of repeats is asked only where some five words do repeat.
"""

from __future__ import annotations

from collections import Counter

from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS
from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate
from datatrove.utils.text import PUNCTUATION_SET

from data.words import words_and_signs

TOP_N_GRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
DUPLICATED_N_GRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
MAX_KNOWN_WORDS = 1_000_000

_ALPHA, _WORD = 1, 2
_STOP_BITS = {word: 1 << (index + 2) for index, word in enumerate(sorted(STOP_WORDS))}


class _Flags(dict[str, int]):
    """Whether a word has a letter, has anything but punctuation, and which stop word it is, as bits."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MAX_KNOWN_WORDS:
            self.clear()
        alpha = _ALPHA * any(map(str.isalpha, word))
        return self.setdefault(word, alpha | _WORD * (not PUNCTUATION_SET.issuperset(word)) | _STOP_BITS.get(word, 0))


_FLAGS = _Flags()


class TextWords:
    """Words and single signs of ``text``, as ``data.words.words_and_signs`` splits it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = words_and_signs(text)

    def repetition(self, top: tuple[tuple[int, float], ...], duplicated: tuple[tuple[int, float], ...]) -> str | None:
        """The n-gram rule of Gopher that the text breaks, by datatrove's name; ``duplicated`` goes by rising length."""
        for length, share in top:
            if length <= len(self.words) and self._top(length) / len(self.text) > share:
                return f"top_{length}_gram"
        for length, share in duplicated:
            most = self._most_repeated(length)
            if not most:
                return None  # where no five words repeat, no six do
            if most > share * len(self.text) and find_all_duplicate(self.words, length) / len(self.text) > share:
                return f"duplicated_{length}_n_grams"
        return None

    def _n_grams(self, length: int) -> zip[tuple[str, ...]]:
        return zip(*(self.words[start:] for start in range(length)), strict=False)

    def _top(self, length: int) -> int:
        """Characters of the most frequent n-gram, words joined by spaces, times how often it occurs."""
        counts = Counter(self._n_grams(length))
        n_gram = max(counts, key=counts.__getitem__)
        return counts[n_gram] * (sum(map(len, n_gram)) + length - 1)

    def _most_repeated(self, length: int) -> int:
        """Characters of all n-grams that occurred before; the library counts no more, since it skips overlaps."""
        counts = Counter(self._n_grams(length))
        if len(counts) == max(0, len(self.words) - length + 1):
            return 0
        return sum((count - 1) * sum(map(len, n_gram)) for n_gram, count in counts.items() if count > 1)

    def quality(self, min_words: int, min_stop_words: int) -> str | None:
        """The quality rule of Gopher that the text breaks, by datatrove's name."""
        kinds = Counter(map(_FLAGS.__getitem__, self.words))
        n_words, total = _count(kinds, _WORD), len(self.words)
        if n_words < min_words:
            return "gopher_short_doc"
        if n_words > 100_000:
            return "gopher_long_doc"
        mean = self._characters(all_words=n_words == total) / n_words
        if mean < 3 or mean > 10:
            return f"gopher_{'below' if mean < 3 else 'above'}_avg_threshold"
        if self.text.count("#") / total > 0.1:
            return "gopher_too_many_hashes"
        if (self.text.count("...") + self.text.count("…")) / total > 0.1:
            return "gopher_too_many_ellipsis"
        if reason := self._line_quality():
            return reason
        if _count(kinds, _ALPHA) / total < 0.8:
            return "gopher_below_alpha_threshold"
        return "gopher_enough_stop_words" if _stop_words(kinds) < min_stop_words else None

    def _characters(self, *, all_words: bool) -> int:
        """Characters of the words, signs left out."""
        signs = 0 if all_words else sum(len(word) for word in self.words if not _FLAGS[word] & _WORD)
        return sum(map(len, self.words)) - signs

    def _line_quality(self) -> str | None:
        lines = self.text.splitlines()
        if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > 0.9:
            return "gopher_too_many_bullets"
        if sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > 0.3:
            return "gopher_too_many_end_ellipsis"
        return None


def _count(kinds: Counter[int], bit: int) -> int:
    return sum(count for flags, count in kinds.items() if flags & bit)


def _stop_words(kinds: Counter[int]) -> int:
    """How many different stop words there are."""
    return len({flags >> 2 for flags in kinds if flags >> 2})
