"""Contrastive facts: a prompt, the right ending, and wrong ones of the same kind and about the same length (TRAPS M5).

Layout (the ``output/`` folder of a finished ``facts`` stage): ``facts.jsonl`` and ``facts.json``. A row is
``{"id", "domain", "language", "prompt", "correct", "distractors": [...]}``; an ending follows the prompt after one
space. Wrong endings are right ones of other facts of the same domain and language, so that no ending is odd in itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.facts_sources import LANGUAGES, Country, Names, folded

FORMAT = 1
FACTS_FILE, INFO_FILE = "facts.jsonl", "facts.json"

PROMPTS = {
    ("capital", "en"): "The capital of {subject} is",
    ("capital", "de"): "Die Hauptstadt von {subject} ist",
    ("capital", "hi"): "{subject} की राजधानी का नाम है",
    ("continent", "en"): "{subject} is a country on the continent of",
    ("continent", "de"): "{subject} liegt auf dem Kontinent",
    ("continent", "hi"): "{subject} के महाद्वीप का नाम है",
    ("language", "en"): "The official language of {subject} is",
    ("language", "de"): "Die Amtssprache von {subject} ist",
    ("language", "hi"): "{subject} की राजभाषा है",
    ("country_name", "de"): "Das Land {subject} heißt auf Deutsch",
    ("country_name", "hi"): "{subject} को हिन्दी में कहते हैं",
    ("language_name", "de"): "Die Sprache {subject} heißt auf Deutsch",
    ("language_name", "hi"): "{subject} भाषा को हिन्दी में कहते हैं",
    ("currency_name", "de"): "Die Währung {subject} heißt auf Deutsch",
    ("currency_name", "hi"): "{subject} मुद्रा को हिन्दी में कहते हैं",
}
"""How a fact of a domain is put in a language."""
DOMAINS = tuple(dict.fromkeys(domain for domain, _ in PROMPTS))

# Capitals that changed after the table was made, or where seat of government and capital differ.
_UNSETTLED_CAPITALS = frozenset({"BJ", "BO", "CI", "CS", "IL", "KZ", "LK", "MM", "NL", "PS", "SZ", "TW", "TZ", "ZA"})
# Names that need an article after a preposition in English or German; a prompt without it would be no sentence.
_WITH_ARTICLE = frozenset(
    "AE BS CD CF CG CH CI DO GB GM IQ IR KM KY LB MH MN MV NE NL PH SB SC SD SK SS TD TR UA US VA YE".split()
)
_ON_TWO_CONTINENTS = frozenset({"AM", "AZ", "CY", "EG", "GE", "KZ", "RU", "TR"})
# The table leaves out a second official language.
_MORE_LANGUAGES = frozenset({"DZ", "ET", "MA", "PH"})


@dataclasses.dataclass(frozen=True)
class Statement:
    """A subject and what is true of it, before wrong endings are chosen."""

    domain: str
    language: str
    subject: str
    correct: str


def read_facts(directory: Path | str) -> Iterator[dict[str, Any]]:
    """Rows of a facts artifact.

    Raises:
        ValueError: when the folder is none, or the facts are not those of the recorded hash (TRAPS M2).
    """
    path = Path(directory) / FACTS_FILE
    if not path.is_file():
        raise ValueError(f"{directory} must be a facts artifact; {FACTS_FILE} is missing; run the facts stage")
    content, expected = path.read_bytes(), facts_info(directory)["hash"]
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{path} must hash to {expected}; got {found}; restore it or run the facts stage again")
    for line in content.splitlines():
        yield json.loads(line)


def facts_info(directory: Path | str) -> dict[str, Any]:
    """What ``facts.json`` says: ``hash``, ``domains``, ``languages``, ``licences``, ``sources``."""
    return dict(json.loads((Path(directory) / INFO_FILE).read_text(encoding="utf-8")))


def statements(countries: Sequence[Country], names: Mapping[str, Names]) -> list[Statement]:
    """Everything that the tables state in each domain and language, subjects of populous countries first."""
    found: dict[Statement, None] = {}
    for language in LANGUAGES:
        for country in countries:
            found |= dict.fromkeys(_of_country(country, names["en"], names[language], language))
        if language != "en":
            found |= dict.fromkeys(_of_names(countries, names["en"], names[language], language))
    return [one for one in found if _is_fair(one)]


def with_distractors(
    stated: Sequence[Statement], *, count: int, max_length_difference: int, per_domain: int
) -> list[dict[str, Any]]:
    """Rows for the first ``per_domain`` statements of each domain and language that find ``count`` wrong endings.

    A wrong ending is true of another subject and not of this one, and differs by at most ``max_length_difference``
    characters (marks do not count); of those that fit, a hash of the pair decides, so that little changes with other
    facts.
    """
    true_of: dict[tuple[str, str, str], set[str]] = {}
    endings: dict[tuple[str, str], set[str]] = {}
    for one in stated:
        true_of.setdefault((one.domain, one.language, one.subject), set()).add(one.correct)
        endings.setdefault((one.domain, one.language), set()).add(one.correct)
    rows, taken = [], Counter[tuple[str, str]]()
    for one in stated:
        group = (one.domain, one.language)
        wrong = endings[group] - true_of[one.domain, one.language, one.subject]
        fitting = [ending for ending in wrong if abs(length(ending) - length(one.correct)) <= max_length_difference]
        if taken[group] < per_domain and len(fitting) >= count:
            taken[group] += 1
            rows.append(_row(one, sorted(fitting, key=lambda ending: _hash(one.subject, ending))[:count]))
    return rows


def write_facts(directory: Path, rows: Sequence[Mapping[str, Any]], sources: Iterable[Mapping[str, str]]) -> Any:
    """Write the artifact; returns the content of ``facts.json``.

    Raises:
        DataError: when two facts have one id.
    """
    if len({row["id"] for row in rows}) != len(rows):
        raise DataError([("domains", "must give facts with ids of their own; two are alike; drop a domain")])
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    (directory / FACTS_FILE).write_bytes(text.encode())
    info = {
        "format": FORMAT,
        "facts": len(rows),
        "hash": hashlib.sha256(text.encode()).hexdigest(),
        "domains": dict(sorted(Counter(row["domain"] for row in rows).items())),
        "languages": dict(sorted(Counter(row["language"] for row in rows).items())),
        "sources": list(sources),
    }
    content = json.dumps(info, ensure_ascii=False, indent=1, sort_keys=True)
    (directory / INFO_FILE).write_text(content + "\n", encoding="utf-8")
    return info


def _of_country(country: Country, english: Names, own: Names, language: str) -> Iterator[Statement]:
    name = own.territories.get(country.code)
    if name is None or (language != "hi" and country.code in _WITH_ARTICLE):
        return
    if country.code not in _UNSETTLED_CAPITALS:
        # In English the table itself names the capital; elsewhere CLDR must know the city.
        capital = country.capital if language == "en" else own.cities.get(folded(country.capital))
        if capital is not None:
            yield Statement("capital", language, name, capital)
    if country.continent in own.territories and country.code not in _ON_TWO_CONTINENTS:
        yield Statement("continent", language, name, own.territories[country.continent])
    is_sole = len(country.languages) == 1 and country.code not in _MORE_LANGUAGES
    if is_sole and country.languages[0] in own.languages:
        yield Statement("language", language, name, own.languages[country.languages[0]])


def _of_names(countries: Sequence[Country], english: Names, own: Names, language: str) -> Iterator[Statement]:
    spoken = dict.fromkeys(code for country in countries for code in country.languages)
    paid = dict.fromkeys(code for country in countries for code in country.currencies)
    tables = (
        ("country_name", [country.code for country in countries], english.territories, own.territories),
        ("language_name", list(spoken), english.languages, own.languages),
        ("currency_name", list(paid), english.currencies, own.currencies),
    )
    for domain, codes, theirs, ours in tables:
        for code in codes:
            if code in theirs and code in ours:
                yield Statement(domain, language, theirs[code], ours[code])


def _is_fair(one: Statement) -> bool:
    """Neither bracketed by-names nor dates, and the answer not to be read off the prompt."""
    both = one.subject + one.correct
    is_odd = " - " in both or bool(set("()[]0123456789&") & set(both))
    return not is_odd and one.correct.casefold()[:4] not in one.subject.casefold()


def length(text: str) -> int:
    """Characters without the marks on them: a Devanagari syllable counts its letters."""
    return sum(not unicodedata.category(character).startswith("M") for character in text)


def _row(one: Statement, distractors: list[str]) -> dict[str, Any]:
    prompt = PROMPTS[one.domain, one.language].format(subject=one.subject)
    return {
        "id": f"{one.domain}-{one.language}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}",
        "domain": one.domain,
        "language": one.language,
        "prompt": prompt,
        "correct": one.correct,
        "distractors": distractors,
    }


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
