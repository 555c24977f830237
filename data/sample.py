"""A sample of training text for a tokenizer: streamed, spread over languages and over the whole corpus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data.corpus import read_documents, sources
from data.errors import DataError
from data.mix import hash64


def sample_texts(
    corpus: Path,
    *,
    max_bytes: int,
    language_shares: dict[str, float] | None,
    seed: int,
    progress_seconds: float = 10.0,
) -> Iterator[str]:
    """The texts of a ``Sample``."""
    return iter(Sample(corpus, max_bytes, language_shares, seed, progress_seconds))


class Sample:
    """Texts of training documents, about ``max_bytes`` UTF-8 bytes in all, in an order fixed by the corpus.

    Each document is taken or left by a hash of its id, at the rate that its language's share asks for; a language with
    less text than its share gives all it has, and is named. Iterating holds one document at a time; ``taken`` has the
    bytes by language so far.

    Raises:
        DataError: if ``language_shares`` does not name exactly the corpus's languages.
    """

    def __init__(
        self,
        corpus: Path,
        max_bytes: int,
        language_shares: dict[str, float] | None,
        seed: int,
        progress_seconds: float = 10.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._corpus, self._seed, self._every = corpus, seed, progress_seconds
        self._say = say or (lambda line: print(line, flush=True))
        self._available: dict[str, int] = {}
        for source in sources(corpus):
            language = source["language"]
            self._available[language] = self._available.get(language, 0) + source["train"]["bytes"]
        self._budget = _budget(self._available, max_bytes, language_shares)
        self.taken = dict.fromkeys(self._available, 0)

    def __iter__(self) -> Iterator[str]:
        self.taken = dict.fromkeys(self._available, 0)
        started = shown = time.monotonic()
        for source in sources(self._corpus):
            language = source["language"]
            budget, rate = self._budget[language], self._budget[language] / max(1, self._available[language])
            for document in read_documents(self._corpus, "train", source["name"]):
                drawn = hash64("sample", self._seed, document["id"]) / 2**64
                if drawn >= rate or self.taken[language] > min(budget, self._available[language]):
                    continue
                self.taken[language] += len(document["text"].encode())
                yield document["text"]
                if time.monotonic() - shown > self._every:
                    shown = time.monotonic()
                    self._say(f"sample: {sum(self.taken.values()) / 1e6:.1f} MB, {shown - started:.0f} s")
        self._finish()

    def _finish(self) -> None:
        figures = ", ".join(f"{language} {count / 1e6:.2f} MB" for language, count in sorted(self.taken.items()))
        self._say(f"sample: {figures}; learning")
        for language, budget in sorted(self._budget.items()):
            has = self._available[language]
            if has < budget:
                text = f"sample: {language} has {has / 1e6:.2f} MB of the {budget / 1e6:.2f} MB that its share asks for"
                self._say(f"{text}; all of it was taken")


def _budget(available: dict[str, int], max_bytes: int, shares: dict[str, float] | None) -> dict[str, float]:
    """Bytes that each language should give; without shares each gives what it is of the whole."""
    if shares is None:
        whole = sum(available.values()) or 1
        return {language: min(1.0, max_bytes / whole) * count for language, count in available.items()}
    if set(shares) != set(available):
        message = f"must name exactly {sorted(available)}; got {sorted(shares)}; name each"
        raise DataError([("language_shares", message)])
    return {language: max_bytes * share / sum(shares.values()) for language, share in shares.items()}
