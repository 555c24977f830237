"""What a document is about, by rules that ship: words that tell domains, a line pattern for dialogue, code by language.

A document's words are looked up in the lists of its language (``data.domain_words_*``). Each listed word counts once,
and the more, the fewer domains list it; the domain with the highest sum wins when it has enough evidence and a clear
lead, and ``other`` is said otherwise. Rules of this size know what a passage is about, not what a sentence means.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import regex

from data import domain_words_de, domain_words_en, domain_words_hi

CODE, DIALOGUE, OTHER = "code", "dialogue", "other"
TOPICS = tuple(domain_words_en.WORDS)
"""Domains that are told by words."""
DOMAINS = (*TOPICS, CODE, DIALOGUE, OTHER)
LANGUAGES = {"en": domain_words_en.WORDS, "de": domain_words_de.WORDS, "hi": domain_words_hi.WORDS}
"""Word lists by language; documents of other languages are ``other``, code and dialogue apart."""

MIN_EVIDENCE = 2.0
"""Least sum of the winning domain: about two words that only it lists."""
MIN_LEAD = 1.15
"""Least ratio of the winning sum to the next."""
MAX_CHARACTERS = 20_000
"""Of a longer document the beginning decides."""
_MIN_TURNS = 4
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_TURN = regex.compile(r"^(?:[–—] |[\p{Lu}\p{Lo}][\p{L}\p{M} .]{0,24}: )\S")
_WORD_CACHE = 1 << 18


def classify(text: str, language: str, title: str | None = None) -> str:
    """The domain of one document, one of ``DOMAINS``; ``language`` is a source's (``en``, ``code``)."""
    if language == CODE:
        return CODE
    head = text[:MAX_CHARACTERS]
    if is_dialogue(head):
        return DIALOGUE
    if language not in LANGUAGES:
        return OTHER
    return _winner(scores(f"{title}\n{head}" if title else head, language))


def scores(text: str, language: str) -> dict[str, float]:
    """Evidence for each domain that has any: the weights of its distinct words in ``text``.

    Returns sums that grow with evidence, not probabilities.
    """
    found = dict.fromkeys(_WORD.findall(text.casefold()))
    sums: dict[str, float] = {}
    for word in found:
        for domain, weight in evidence(word, language):
            sums[domain] = sums.get(domain, 0.0) + weight
    return sums


@functools.lru_cache(maxsize=_WORD_CACHE)
def evidence(word: str, language: str) -> tuple[tuple[str, float], ...]:
    """Domains that a word speaks for, each with its weight: 1 for one domain, less where several list it."""
    whole, beginnings, ends = _lists(language)
    domains = set(whole.get(word, ()))
    for length in range(2, len(word) + 1):
        domains.update(beginnings.get(word[:length], ()))
        domains.update(ends.get(word[-length:], ()))
    return tuple((domain, 1 / len(domains)) for domain in TOPICS if domain in domains)


def is_dialogue(text: str) -> bool:
    """Whether most lines, and at least four, are turns: after a dash, or after one of a few names that come again."""
    lines = [line for line in text.splitlines() if line.strip()]
    turns = [line for line in lines if _TURN.match(line)]
    if len(turns) < _MIN_TURNS or len(turns) < 0.7 * len(lines):
        return False
    names = [line.split(": ", 1)[0] for line in turns if line[0] not in "–—"]
    return not names or 2 <= len(set(names)) <= 0.7 * len(names)


def _winner(sums: dict[str, float]) -> str:
    # Equal sums go by the fixed order of domains, never by that of a dictionary.
    ranked = sorted(sums, key=lambda domain: (-sums[domain], TOPICS.index(domain)))
    if not ranked or sums[ranked[0]] < MIN_EVIDENCE:
        return OTHER
    if len(ranked) > 1 and sums[ranked[0]] < MIN_LEAD * sums[ranked[1]]:
        return OTHER
    return ranked[0]


Lists = tuple[dict[str, set[str]], dict[str, set[str]], dict[str, set[str]]]


@functools.cache
def _lists(language: str) -> Lists:
    """Domains by whole word, by beginning and by end."""
    lists: Lists = ({}, {}, {})
    for domain, words in LANGUAGES[language].items():
        for word in words.casefold().split():
            kind = 1 if word.endswith("*") else 2 if word.startswith("*") else 0
            lists[kind].setdefault(word.strip("*"), set()).add(domain)
    return lists


def listed(language: str) -> Iterable[str]:
    """Every word of a language's lists, as written."""
    return " ".join(LANGUAGES[language].values()).split()
