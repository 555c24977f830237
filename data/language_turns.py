"""Passages of a document, each with a question whose answer is the language's name: a narrow skill to fine-tune on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUESTION = "Which language is this?"
NAMES = {"en": "English", "de": "Deutsch", "hi": "\u0939\u093f\u0928\u094d\u0926\u0940", "code": "Code"}
"""What each language calls itself; program text is called code."""


def name_language(document: Mapping[str, Any], max_bytes: int, passages: int = 1) -> list[list[dict[str, str]]]:
    """Up to ``passages`` conversations: the user shows a passage and asks, the assistant answers with one name.

    Each passage is whole words within ``max_bytes`` of UTF-8; they lie evenly over the document and do not overlap.
    There is none for a document whose language has no name here.
    """
    name = NAMES.get(document.get("language", ""))
    if name is None:
        return []
    found = _passages(document["text"], max_bytes, passages)
    return [
        [{"role": "user", "content": f"{passage}\n\n{QUESTION}"}, {"role": "assistant", "content": name}]
        for passage in found
    ]


def _passages(text: str, max_bytes: int, count: int) -> list[str]:
    """At most ``count`` different passages, one from the middle of each of as many equal parts of ``text``.

    The middle, since modules open with a licence or a docstring, which is English.
    """
    size = -(-len(text) // count)
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    return list(dict.fromkeys(passage for part in parts if (passage := _passage(part, max_bytes))))


def _passage(part: str, max_bytes: int) -> str:
    """Whole words from about the middle of ``part``, which may itself be cut within words at both ends."""
    words = part.split(" ")[1:-1] or [part]
    first = len(words) // 3
    taken: list[str] = []
    for word in words[first:]:
        if len(" ".join([*taken, word]).encode()) > max_bytes:
            break
        taken.append(word)
    return " ".join(taken).strip()
