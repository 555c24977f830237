"""How many bytes of each language a token carries: the price of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data.corpus import read_documents, sources
from data.tokenizer import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def measure_fertility(
    tokenizer: PreTrainedTokenizerBase, corpus: Path, *, max_bytes: int = 1_000_000
) -> dict[str, dict[str, float]]:
    """Bytes a token and tokens a whitespace-separated word, by language.

    Measured on held-out text where a language has any, up to ``max_bytes`` a language; on training text otherwise.

    Returns:
        language -> {"bytes", "tokens", "bytes_per_token", "tokens_per_word"}.
    """
    report = {}
    for language in sorted({source["language"] for source in sources(corpus)}):
        size = tokens = words = 0
        for text in _texts(corpus, language):
            size += len(text.encode())
            tokens += len(encode_text(tokenizer, text))
            words += len(text.split())
            if size >= max_bytes:
                break
        if tokens and words:
            report[language] = {
                "bytes": size,
                "tokens": tokens,
                "bytes_per_token": round(size / tokens, 4),
                "tokens_per_word": round(tokens / words, 4),
            }
    return report


def _texts(corpus: Path, language: str) -> Iterator[str]:
    mine = [source for source in sources(corpus) if source["language"] == language]
    split = "heldout" if any(source["heldout"]["documents"] for source in mine) else "train"
    for source in mine:
        for document in read_documents(corpus, split, source["name"]):
            yield document["text"]
