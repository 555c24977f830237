"""Documents told as a short conversation, so that the chat specials stand in pretraining text (TRAPS T8)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ASK = {
    "en": "Tell me about {title}.",
    "de": "Erz\u00e4hle mir etwas \u00fcber {title}.",
    "hi": "{title} \u0915\u0947 \u092c\u093e\u0930\u0947 \u092e\u0947\u0902 \u092c\u0924\u093e\u0907\u090f\u0964",
}
_SENTENCE_END = re.compile(r"(?<=[.!?\u0964])\s+|\n+")
_WORD_END = re.compile(r"\s+")


def as_chat(document: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """Two messages that hold the document's text, or none where it cannot be divided.

    With a title the user asks for it and the assistant answers with the whole text; otherwise the user begins with the
    first sentence (the first half of the words, if there is but one) and the assistant goes on.
    """
    text, title = document["text"], document.get("title")
    if title:
        question = _ASK.get(document.get("language", ""), "{title}").format(title=title)
        return _turns(question, text)
    for pattern, least in ((_SENTENCE_END, 0), (_WORD_END, len(text) // 2)):
        cut = pattern.search(text, least)
        if cut and text[: cut.start()].strip() and text[cut.end() :].strip():
            return _turns(text[: cut.start()], text[cut.end() :])
    return None


def _turns(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
