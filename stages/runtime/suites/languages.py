"""In which language a reply is written: a light model that ships in a package, no download."""

from __future__ import annotations

import functools
from typing import Any

MIN_LETTERS = 20
"""Fewer letters than this are no ground to name a language on."""
KNOWN = ("en", "de", "hi", "fr", "es", "it", "nl", "pt", "pl", "ru", "tr", "ar", "zh", "ja", "mr", "ne", "bn")
"""Languages between which the model chooses: ours, and those that they are most easily taken for."""


def letters(text: str) -> int:
    """Letters of ``text``, marks on them not counted."""
    return sum(character.isalpha() for character in text)


def is_in_language(text: str, language: str) -> bool:
    """Whether ``text`` is most likely in ``language``, an ISO 639 code of ``KNOWN``."""
    found, _ = _identifier().classify(text)
    return bool(found == language)


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(KNOWN))
    return identifier
