"""Retrieval from context: which of several numbers in a long text belongs to the thing that is asked for, by depth.

A row is held-out text with needles in it, sentences that give a thing a number, and at its end the beginning of one of
them. All numbers stand in the text, so that copying any of them earns no more than chance (as the multi-key needles of
Hsieh et al. 2024, RULER, arXiv:2404.06654). What is asked is likelihoods: a base model can be measured, and no decoding
is mixed in.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data.heldout import HeldoutSet
from data.tokenizer import encode_text
from stages.base import ConfigError, Fault
from stages.runtime.suites import bpb
from stages.runtime.suites.bench import Bench
from stages.runtime.suites.config import BpbConfig, NeedlesConfig
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash

VERSION = 1
SENTENCES = {
    "en": "The number of the {thing} is {number}.",
    "de": "Die Nummer von {thing} ist {number}.",
    "hi": "{thing} की संख्या है {number}।",
}
THINGS = {
    "en": ("red house", "old bridge", "green door", "stone tower", "quiet garden", "blue train", "small harbour",
           "white church"),
    "de": ("Haus Rot", "Brücke Alt", "Tür Grün", "Turm Stein", "Garten Still", "Zug Blau", "Hafen Klein",
           "Kirche Weiß"),
    "hi": ("लाल घर", "पुराने पुल", "हरे दरवाज़े", "पत्थर के मीनार", "शांत बगीचे", "नीली रेल", "छोटे बंदरगाह", "सफ़ेद मंदिर"),
}  # fmt: skip
"""Things that have a number, in words that go into ``SENTENCES`` as they are."""


_DOCUMENTS = 200
"""Held-out documents of a source that make up the text."""


class Needle(NamedTuple):
    """One row: ids without an answer, and the answers, the right one first."""

    id: str
    language: str
    length: int
    depth: float
    family: str
    prompt: list[int]
    answers: list[list[int]]


def run(bench: Bench, config: NeedlesConfig) -> SuiteResult:
    """``needles/accuracy`` (the right number is the likeliest of those in the text) and ``needles/exact``.

    ``exact`` is the share where each of the right number's tokens is the likeliest of the whole vocabulary, as greedy
    decoding would have it. Both by length, depth, and both; rows that share their text are a family.

    Raises:
        ConfigError: when a language has no held-out text, or a length leaves none.
    """
    needles = make(bench, config)
    rows = [(needle.prompt + answer, len(needle.prompt)) for needle in needles for answer in needle.answers]
    scored = iter(bench.score(rows))
    found = [[next(scored) for _ in needle.answers] for needle in needles]
    right = [float(one.nats.mean() < min(other.nats.mean() for other in rest)) for one, *rest in found]
    exact = [float(one.is_greedy) for one, *_ in found]
    heldout = HeldoutSet(bench.inputs["data"])
    set_hash = content_hash([heldout.hash, [[needle.id, needle.prompt, needle.answers] for needle in needles]])
    sheet = ScoreSheet("needles", VERSION, set_hash, {"heldout_hash": heldout.hash, "others": config.others})
    for name, values, settings in (
        ("accuracy", right, {"chance": round(config.chance, 6)}), ("exact", exact, {}),
    ):  # fmt: skip
        _put(sheet, f"needles/{name}", needles, values, settings)
    return sheet.result()


def check(bench: Bench, config: NeedlesConfig) -> None:
    """Make the rows before any suite is run.

    Raises:
        ConfigError: as ``run`` does.
    """
    make(bench, config)


def _put(
    sheet: ScoreSheet, name: str, needles: Sequence[Needle], values: list[float], settings: Mapping[str, Any]
) -> None:
    families = [needle.family for needle in needles]
    items = Items([needle.id for needle in needles], values, families=families)
    facts: dict[str, Any] = {"unit": "share", "better": "higher", "n_unit": "needles", **settings}
    whole = True
    for part, groups in (
        ("language", [needle.language for needle in needles]),
        ("length", [f"length_{needle.length}" for needle in needles]),
        ("depth", [f"depth_{needle.depth:g}" for needle in needles]),
        ("cell", [f"length_{needle.length}_depth_{needle.depth:g}" for needle in needles]),
    ):
        sheet.add_groups(name, items, groups, part=part, whole=whole, **facts)
        whole = False


def make(bench: Bench, config: NeedlesConfig) -> list[Needle]:
    """The rows: the same for the same held-out set, tokenizer and config."""
    made = []
    for language in config.languages:
        haystack = _haystack(bench, language)
        for length in config.lengths:
            made += [_needle(bench, config, language, length, depth, number, haystack)
                     for number in range(config.needles) for depth in config.depths]  # fmt: skip
    return made


def _haystack(bench: Bench, language: str) -> list[int]:
    """Held-out text of a language in one, documents parted by a line."""
    found: list[int] = []
    gap = encode_text(bench.tokenizer, "\n\n")
    for document in bpb.chosen(bench.inputs["data"], BpbConfig(documents=_DOCUMENTS, document_tokens=None)):
        if document.language == language:
            found += document.ids + gap
    if not found:
        message = f"must be languages with held-out documents; got {language}, which has none; leave it out"
        raise ConfigError(Fault("suites.needles.languages", message))
    return found


def _needle(
    bench: Bench, config: NeedlesConfig, language: str, length: int, depth: float, number: int, haystack: list[int]
) -> Needle:
    """One row of exactly ``length`` tokens, its longest answer included; the text is the same at every depth."""
    family = f"{language}-{length}-{number}"
    drawn = random.Random(int.from_bytes(hashlib.sha256(family.encode()).digest()[:8], "big"))
    things = drawn.sample(THINGS[language], 1 + config.others)
    numbers = [str(one) for one in drawn.sample(range(1000, 10000), 1 + config.others)]
    start = drawn.randrange(len(haystack))
    template = SENTENCES[language]
    sentences = [
        encode_text(bench.tokenizer, f" {template.format(thing=thing, number=value)}\n")
        for thing, value in zip(things, numbers, strict=True)
    ]
    before, _, _ = template.format(thing=things[0], number="\0").partition("\0")
    question = encode_text(bench.tokenizer, f"\n\n{before.rstrip()}")
    answers = [encode_text(bench.tokenizer, f" {value}") for value in numbers]
    room = length - len(question) - max(map(len, answers)) - sum(map(len, sentences))
    if room < len(sentences):
        message = (
            f"must leave room for text beside needles and question; got {length}; set {length - room + 32} or more"
        )
        raise ConfigError(Fault("suites.needles.lengths", message))
    # Round the haystack as often as it must be: a long row of a small set repeats its text.
    text = [haystack[(start + place) % len(haystack)] for place in range(room)]
    places = [(round(depth * room), 0)]
    places += [(drawn.randrange(room + 1), which) for which in range(1, len(sentences))]
    ids = list(text)
    for place, which in sorted(places, reverse=True):
        ids[place:place] = sentences[which]
    return Needle(f"{family}-{depth:g}", language, length, depth, family, [*ids, *question], answers)
