"""A sample of training text for a tokenizer: streamed, spread over languages and over the whole corpus."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
    """Texts of training documents, about ``max_bytes`` UTF-8 bytes in all, in an order fixed by the corpus.

    Each document is taken or left by a hash of its id, at the rate that its language's share asks for; a language with
    less text than its share gives all it has.

    Raises:
        DataError: if ``language_shares`` does not name exactly the corpus's languages.
    """
    available: dict[str, int] = {}
    for source in sources(corpus):
        available[source["language"]] = available.get(source["language"], 0) + source["train"]["bytes"]
    rates = _rates(available, max_bytes, language_shares)
    taken, started, shown = dict.fromkeys(available, 0), time.monotonic(), time.monotonic()
    for source in sources(corpus):
        language, limit = source["language"], rates[source["language"]] * available[source["language"]]
        for document in read_documents(corpus, "train", source["name"]):
            if hash64("sample", seed, document["id"]) / 2**64 >= rates[language] or taken[language] > limit:
                continue
            taken[language] += len(document["text"].encode())
            yield document["text"]
            if time.monotonic() - shown > progress_seconds:
                shown = time.monotonic()
                print(f"sample: {sum(taken.values()) / 1e6:.1f} MB, {shown - started:.0f} s", flush=True)
    figures = ", ".join(f"{language} {count / 1e6:.2f} MB" for language, count in sorted(taken.items()))
    print(f"sample: {figures}; learning", flush=True)


def _rates(available: dict[str, int], max_bytes: int, shares: dict[str, float] | None) -> dict[str, float]:
    """Probability with which a document of each language is taken."""
    shares = {language: float(count) for language, count in available.items()} if shares is None else shares
    if set(shares) != set(available):
        raise DataError(f"language_shares must name exactly {sorted(available)}; got {sorted(shares)}; name each")
    total = sum(shares.values()) or 1.0
    return {
        language: min(1.0, max_bytes * shares[language] / total / max(1, count))
        for language, count in available.items()
    }
