"""Contrastive facts: a prompt, the right ending, and wrong ones of the same kind and about the same length (TRAPS M5).

Layout (the ``output/`` folder of a finished ``facts`` stage): ``facts.jsonl`` and ``facts.json``. A row is
``{"id", "domain", "language", "family", "prompt", "correct", "distractors": {difficulty: [...]}}``; an ending follows
the prompt after one space, and facts of one family are about one thing. Every wrong ending is the right one of another
fact in the same language, so that none is odd in itself, and about as long as the right one. How hard it is to tell
from the right one goes by what it is:

- ``easy``: of another domain (no capital, where a capital is asked for);
- ``medium``: of the same domain, about any subject; every fact has these;
- ``hard``: of the same domain, about a subject that is close to this one (a country of the same part of the world, the
  day before); those that share most come first. A fact with too few of a difficulty lacks it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data import facts_own
from data.errors import DataError
from data.facts_sources import LANGUAGES, Country, Names, folded

FORMAT = 2
DIFFICULTIES = ("easy", "medium", "hard")
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
    ("weekday", "en"): "The day after {subject} is",
    ("weekday", "de"): "Der Tag nach {subject} ist",
    ("weekday", "hi"): "{subject} के बाद का दिन है",
    ("month", "en"): "The month after {subject} is",
    ("month", "de"): "Der Monat nach {subject} ist",
    ("month", "hi"): "{subject} के बाद का महीना है",
    ("opposite", "en"): "The opposite of {subject} is",
    ("opposite", "de"): "Das Gegenteil von {subject} ist",
    ("opposite", "hi"): "{subject} का विलोम शब्द है",
    ("colour", "en"): "The colour of {subject} is",
    ("colour", "de"): "Die Farbe von {subject} ist",
    ("colour", "hi"): "{subject} का रंग है",
    ("symbol", "en"): "The chemical symbol of {subject} is",
    ("symbol", "de"): "Das chemische Symbol von {subject} ist",
    ("symbol", "hi"): "{subject} का रासायनिक प्रतीक है",
    ("young_animal", "en"): "The young of a {subject} is called a",
    ("young_animal", "de"): "Das Junge {subject} heißt",
    ("young_animal", "hi"): "{subject} के बच्चे को कहते हैं",
    ("sum", "en"): "In words, {subject} is",
    ("sum", "de"): "In Worten: {subject} ist",
    ("sum", "hi"): "{subject} मिलकर होते हैं",
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
    """A subject and what is true of it, before wrong endings are chosen.

    Two statements of a domain are the closer, the more ``tags`` they share. Statements about one thing, in whatever
    language and domain, share their ``family``: a model mostly knows all of them or none.
    """

    domain: str
    language: str
    subject: str
    correct: str
    tags: frozenset[str] = frozenset()
    family: str = ""


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
    """What ``facts.json`` says: ``hash``, ``domains``, ``languages``, ``difficulties``, ``sources`` with licences.

    Raises:
        ValueError: for facts of another format.
    """
    info = dict(json.loads((Path(directory) / INFO_FILE).read_text(encoding="utf-8")))
    if info["format"] != FORMAT:
        raise ValueError(f"{directory} must hold facts of format {FORMAT}; got {info['format']}; run facts again")
    return info


def statements(countries: Sequence[Country], names: Mapping[str, Names]) -> list[Statement]:
    """Everything that the tables state in each domain and language, subjects of populous countries first."""
    found: dict[tuple[str, ...], Statement] = {}
    for language in LANGUAGES:
        own = names[language]
        made = [_of_country(country, names["en"], own, language) for country in countries]
        if language != "en":
            made.append(_of_names(countries, names["en"], own, language))
        for one in itertools.chain(*made, _of_calendar(own, language), _of_own(language)):
            # Two codes can have one name; what is said twice is stated once.
            found.setdefault((one.domain, one.language, one.subject, one.correct), one)
    return [one for one in found.values() if _is_fair(one)]


def with_distractors(
    stated: Sequence[Statement], *, count: int, max_length_difference: int, per_domain: int
) -> list[dict[str, Any]]:
    """Rows for the first ``per_domain`` statements of each domain and language that find ``count`` medium endings.

    A wrong ending is true of another subject and not of this one, and differs by at most ``max_length_difference``
    characters (marks do not count); of those that fit, a hash of the pair decides, so that little changes with other
    facts.
    """
    endings = _Endings(stated)
    rows, taken = [], Counter[tuple[str, str]]()
    for one in stated:
        group = (one.domain, one.language)
        wrong = {
            difficulty: endings.wrong(one, difficulty, max_length_difference)[:count] for difficulty in DIFFICULTIES
        }
        if taken[group] < per_domain and len(wrong["medium"]) >= count:
            taken[group] += 1
            rows.append(_row(one, {name: those for name, those in wrong.items() if len(those) == count}))
    return rows


class _Endings:
    """Right endings by language and domain, each with the tags of its subjects, and those true of a subject."""

    def __init__(self, stated: Sequence[Statement]) -> None:
        self._tags: dict[tuple[str, str], dict[str, list[frozenset[str]]]] = {}
        self._true: dict[tuple[str, str, str], set[str]] = {}
        for one in stated:
            self._tags.setdefault((one.language, one.domain), {}).setdefault(one.correct, []).append(one.tags)
            self._true.setdefault((one.language, one.domain, one.subject), set()).add(one.correct)

    def wrong(self, one: Statement, difficulty: str, max_length_difference: int) -> list[str]:
        """Endings that are wrong for ``one``, the first to be taken first."""
        mine = self._tags[one.language, one.domain]
        if difficulty == "easy":
            others = {ending for (language, domain), those in self._tags.items()
                      if language == one.language and domain != one.domain for ending in those}  # fmt: skip
            candidates = dict.fromkeys(others - set(mine), 0)
        else:
            candidates = {ending: max(len(one.tags & tags) for tags in those) for ending, those in mine.items()}
        is_hard = difficulty == "hard"
        known = self._true[one.language, one.domain, one.subject] | {one.subject}
        fitting = [
            ending for ending, shared in candidates.items()
            if ending not in known and (shared or not is_hard)
            and abs(length(ending) - length(one.correct)) <= max_length_difference
        ]  # fmt: skip
        return sorted(fitting, key=lambda ending: (-candidates[ending] if is_hard else 0, _hash(one.subject, ending)))


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
        "difficulties": dict(sorted(Counter(name for row in rows for name in row["distractors"]).items())),
        "sources": list(sources),
    }
    content = json.dumps(info, ensure_ascii=False, indent=1, sort_keys=True)
    (directory / INFO_FILE).write_text(content + "\n", encoding="utf-8")
    return info


def _of_country(country: Country, english: Names, own: Names, language: str) -> Iterator[Statement]:
    name = own.territories.get(country.code)
    if name is None or (language != "hi" and country.code in _WITH_ARTICLE):
        return
    tags, family = _part_of_the_world(country), f"country/{country.code}"
    if country.code not in _UNSETTLED_CAPITALS:
        # In English the table itself names the capital; elsewhere CLDR must know the city.
        capital = country.capital if language == "en" else own.cities.get(folded(country.capital))
        if capital is not None:
            yield Statement("capital", language, name, capital, tags, family)
    if country.continent in own.territories and country.code not in _ON_TWO_CONTINENTS:
        yield Statement("continent", language, name, own.territories[country.continent], family=family)
    is_sole = len(country.languages) == 1 and country.code not in _MORE_LANGUAGES
    if is_sole and country.languages[0] in own.languages:
        yield Statement("language", language, name, own.languages[country.languages[0]], tags, family)


def _of_names(countries: Sequence[Country], english: Names, own: Names, language: str) -> Iterator[Statement]:
    tables = (
        ("country", _tagged(countries, lambda country: (country.code,)), english.territories, own.territories),
        ("language", _tagged(countries, lambda country: country.languages), english.languages, own.languages),
        ("currency", _tagged(countries, lambda country: country.currencies), english.currencies, own.currencies),
    )
    for kind, codes, theirs, ours in tables:
        for code, tags in codes.items():
            if code in theirs and code in ours:
                yield Statement(f"{kind}_name", language, theirs[code], ours[code], tags, f"{kind}/{code}")


def _tagged(countries: Sequence[Country], codes: Callable[[Country], Iterable[str]]) -> dict[str, frozenset[str]]:
    """Codes in the order of the countries, each with the parts of the world where it is at home."""
    found: dict[str, frozenset[str]] = {}
    for country in countries:
        for code in codes(country):
            found[code] = found.get(code, frozenset()) | _part_of_the_world(country)
    return found


def _part_of_the_world(country: Country) -> frozenset[str]:
    return frozenset({country.continent, country.subregion} - {""})


def _of_calendar(own: Names, language: str) -> Iterator[Statement]:
    for domain, names in (("weekday", own.days), ("month", own.months)):
        for place, name in enumerate(names):
            # Neighbours in the circle share two tags of three, those two steps apart one.
            tags = frozenset(str((place + step) % len(names)) for step in (0, 1, 2))
            yield Statement(domain, language, name, names[(place + 1) % len(names)], tags, f"{domain}/{place}")


def _of_own(language: str) -> Iterator[Statement]:
    for domain, rows in facts_own.TABLES.items():
        for number, row in enumerate(rows):
            pair = getattr(row, language)
            if pair is not None:
                subject, correct = pair
                yield Statement(domain, language, subject, correct, frozenset({row.kin}), f"{domain}/{number}")
    numbers = facts_own.NUMBERS[language]
    for first, second in facts_own.SUMS:
        subject = facts_own.PLUS[language].format(numbers[first - 1], numbers[second - 1])
        near = frozenset(str(first + second + step) for step in (-1, 0, 1))
        yield Statement("sum", language, subject, numbers[first + second - 1], near, f"sum/{first}+{second}")


def _is_fair(one: Statement) -> bool:
    """Neither bracketed by-names nor dates, and the answer not to be read off the prompt."""
    both = one.subject + one.correct
    is_odd = " - " in both or bool(set("()[]0123456789&") & set(both))
    return not is_odd and one.correct.casefold()[:4] not in one.subject.casefold()


def length(text: str) -> int:
    """Characters without the marks on them: a Devanagari syllable counts its letters."""
    return sum(not unicodedata.category(character).startswith("M") for character in text)


def _row(one: Statement, distractors: Mapping[str, list[str]]) -> dict[str, Any]:
    prompt = PROMPTS[one.domain, one.language].format(subject=one.subject)
    return {
        "id": f"{one.domain}-{one.language}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}",
        "domain": one.domain,
        "language": one.language,
        "family": one.family or one.subject,
        "prompt": prompt,
        "correct": one.correct,
        "distractors": dict(distractors),
    }


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
