"""Whether llama.cpp gives the ids that the model was trained on, also for text that tokenizers trip over."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from data.tokenizer import PROBES, SPACE_SYMBOL, decode_bytes, encode_texts
from stages.runtime.parity import held_out_texts

_DOCUMENTS = 50
"""Held-out documents of each source that are compared."""
_TOKENS = 2000


@dataclasses.dataclass(frozen=True)
class TokenParity:
    """Counts of the comparison; ``skipped`` are texts with SentencePiece's own space symbol, where it is one."""

    texts: int
    text_bytes: int
    tokens: int
    mismatches: int
    skipped: int
    example: str

    def faults(self) -> list[str]:
        """A fault where any text gave other ids."""
        if not self.mismatches:
            return []
        return [f"llama.cpp tokenises {self.mismatches} of {self.texts} texts otherwise, for example {self.example}"]

    def line(self) -> str:
        """The counts as a line of text."""
        return f"tokenizer    {self.mismatches} of {self.texts} texts ({self.tokens:,} tokens) differ in llama.cpp"


def compare_ids(other: Any, tokenizer: Any, tokens_dir: Path) -> TokenParity:
    """Compare ids on the beginnings of held-out documents and on ``PROBES``; ``other`` has ``tokenize(text)``.

    SentencePiece writes a space as ``SPACE_SYMBOL``, so llama.cpp cannot tell a literal one in a text from a space; our
    own encoding spells it in bytes. Such texts are left out and counted.
    """
    held_out = [
        decode_bytes(tokenizer, ids).decode(errors="replace") for ids in held_out_texts(tokens_dir, _DOCUMENTS, _TOKENS)
    ]
    texts = [*held_out, *PROBES]
    ambiguous = SPACE_SYMBOL in tokenizer.get_vocab()
    compared = [text for text in texts if not (ambiguous and SPACE_SYMBOL in text)]
    wrong, tokens = [], 0
    for text, ids in zip(compared, encode_texts(tokenizer, compared), strict=True):
        tokens += len(ids)
        if other.tokenize(text) != ids:
            wrong.append(text)
    return TokenParity(
        texts=len(compared),
        text_bytes=sum(len(text.encode()) for text in compared),
        tokens=tokens,
        mismatches=len(wrong),
        skipped=len(texts) - len(compared),
        example=repr(min(wrong, key=len)[:80]) if wrong else "",
    )
