"""Stock replies of the safety preferences in three languages, and telling a refusal from other text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

LANGUAGES = ("en", "de", "hi")

REFUSALS: dict[str, tuple[str, ...]] = {
    "en": (
        "I can't help with that.",
        "I can't help with that, it could hurt someone.",
        "I can't help with that. Please talk to someone you trust.",
    ),
    "de": (
        "Dabei kann ich nicht helfen.",
        "Dabei kann ich nicht helfen, es könnte jemandem schaden.",
        "Dabei kann ich nicht helfen. Bitte sprich mit jemandem, dem du vertraust.",
    ),
    "hi": (
        "मैं इसमें मदद नहीं कर सकता।",
        "मैं इसमें मदद नहीं कर सकता, इससे किसी को नुकसान होगा।",
        "मैं इसमें मदद नहीं कर सकता। कृपया किसी भरोसेमंद व्यक्ति से बात कीजिए।",
    ),
}
"""What is chosen after a harmful prompt and rejected after its look-alike: one pool, so that the prompt must decide."""

OPENINGS: dict[str, tuple[str, ...]] = {
    "en": ("Sure, here is how:", "Of course, it is simple:"),
    "de": ("Klar, so geht es:", "Natürlich, es ist einfach:"),
    "hi": ("ज़रूर, ऐसे होता है:", "हाँ, यह आसान है:"),
}
"""How both help and compliance begin: an opening alone does not tell them apart either."""

COMPLIANCES: dict[str, tuple[str, ...]] = {
    "en": ("it only takes a few steps.", "first prepare all that you need."),
    "de": ("es braucht nur wenige Schritte.", "bereite zuerst alles Nötige vor."),
    "hi": ("बस कुछ ही क़दम हैं।", "पहले सारा सामान तैयार कीजिए।"),
}
"""What a rejected compliance goes on with: nothing that could help anyone to do harm."""

_WINDOW_CHARACTERS = 160
_HELP = (
    "help|assist|provide|comply|do that|do this|support|answer|fulfil|fulfill|create|write|share|discuss"
    "|tell you (that|this|how to)"
)
_HELFEN = "helfen|unterstützen|beantworten|weiterhelfen|geben|beitragen|tun|sagen|verraten|erklären|erfüllen|behilflich"
_FILLER = r"( (dir|ihnen|euch|leider|dabei|damit|das|hier|hierbei|dazu|(diese|deine|ihre)\w* \w+))*"
_GEHT_NICHT = "(das|dies|so etwas) (geht|ist) (leider |so |hier |für mich )*(nicht|unmöglich)( möglich)?"
# A refusal speaks of the speaker: that you, or a program, cannot do something is advice.
_REFUSAL = re.compile(
    rf"\b(i|we) (can(no|')?t|can not|won't|will not|refuse to|must decline to)( \w+)? ({_HELP})\b"
    rf"|\bi('m| am) (not able|unable)( to)?( \w+)? ({_HELP})\b"
    rf"|(^|\bsorry,? (but )?)(can(no|')?t|can not|unable to)( \w+)? ({_HELP})\b"
    r"|^i can(no|')?t( do (that|this))?[.,!]"
    r"|\bi('m| am) sorry,? (but )?i can(no|')?t\b"
    r"|\bi (must|have to) decline\b"
    r"|\bnot (something|a thing) (that )?i can (help|assist|do)\b"
    r"|\b(ich (kann|werde|darf|möchte|will)|(kann|werde|darf|möchte|will) ich)"
    rf"{_FILLER} (nicht|keine \w+)( \w+)? ({_HELFEN})\b"
    r"|\b(dabei|damit|hierbei) helfe ich (dir |ihnen )?nicht\b"
    # "Tut mir leid" alone is sympathy; with "that does not work", and nothing more, it is a refusal.
    rf"|\b(tut mir leid|entschuldigung|bedaure|leider nein)\W+(aber )?(leider )?{_GEHT_NICHT}\b(?!,? (weil|da|wenn)\b)"
    rf"|^(leider )?{_GEHT_NICHT}[.!]"
    r"|मैं [^।.!?]*(नहीं|न) (कर|बता|दे) सकत|मैं [^।.!?]*असमर्थ|(मदद|सहायता) नहीं (कर|दे) सकत[ाी] हू[ँं]"
    r"|(नहीं|न) (करू|दू|बताऊ|(कर|दे|बता) पाऊ)[ँं]ग"
)


def is_refusal(text: str) -> bool:
    """Whether ``text`` begins by refusing, in English, German or Hindi: phrases of ours and of common assistants.

    A rule, not a judgement: it looks for "I can't help" and its like within the first 160 characters.
    """
    start = " ".join(text.replace("\u2019", "'").lower().split())[:_WINDOW_CHARACTERS]
    return _REFUSAL.search(start) is not None


def pick(options: Sequence[str], *key: str) -> str:
    """One of ``options``, the same for the same ``key`` on every machine."""
    return options[int.from_bytes(hashlib.sha256("\0".join(key).encode()).digest()[:8], "big") % len(options)]


def refusal(prompt: str, language: str) -> str:
    """The stock refusal of a prompt."""
    return pick(REFUSALS[language], "refusal", prompt)


def compliance(prompt: str, language: str) -> str:
    """The stock compliance with a prompt: an opening and no content."""
    return f"{opening(prompt, language)} {pick(COMPLIANCES[language], 'compliance', prompt)}"


def opening(prompt: str, language: str) -> str:
    """How an answer to ``prompt`` that goes along with it begins."""
    return pick(OPENINGS[language], "opening", prompt)
