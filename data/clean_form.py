"""A document's form: NFC, line ends, mojibake, boilerplate lines, personal data. Edits repeat until nothing changes.

So ``settle`` gives texts that it would not change again: cleaning is idempotent by construction, whatever the edits.
Code is left as it is written (TRAPS T12): no edit applies to it and no character is composed, since a string literal
may hold a decomposed one on purpose; only line ends, a byte-order mark and empty lines around the text go.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection

from data.clean_config import FormConfig, PersonalKind
from data.clean_pii import replace_personal
from data.source_config import RuleSet

MAX_ROUNDS = 6
"""A text that has not settled after so many rounds is dropped as ``unsettled``."""
EXCERPT = 160

_LEADING = re.compile(r"\A(?:\ufeff|[^\S\n]*\n)+")
# Mojibake leaves a lead and a continuation byte side by side, both outside ASCII, or a lead before a lost no-break
# space; scripts that no single-byte encoding has cannot come of it, so that Hindi is passed over at once.
_SUSPECT = re.compile(r"[\x80-\u08ff\u2000-\u2bff\uf000-\uffff]{2}|[\u00c0-\u00f4\u0390-\u03cf\u0410-\u044f] ")

_BOILERPLATE = re.compile(
    r"""
    (?:we|this\s(?:web)?site|wir|diese\s(?:web)?seite)\s(?:also\s)?(?:uses?|verwende[nt]?|nutz(?:en|t)|benutzt)\s.{0,40}cookies\b.*
    |(?=.*\b(?:you|your|we|our|us|continuing|sie|ihre[mnrs]?|wir|unsere?\w*|आप|हम)\b).{0,80}\bcookies\b.{0,60}\b(?:accept|agree|consent|zustimm\w*|einverstanden|akzeptier\w*|स्वीकार|सहमत\w*)\b.*
    |.{0,40}\b(?:enable|aktivieren|activate|requires?|benötigt|सक्षम)\b.{0,30}\bjavascript\b.{0,40}
    |.{0,30}\bjavascript\b.{0,30}\b(?:enabled?|disabled|aktiviert|deaktiviert|required|erforderlich|सक्षम|अक्षम)\b.{0,12}
    |(?:copyright\s?(?=\(c\)|©|:|by\b|notice\b|[\d-])|copyright$|\(c\)|©).{0,80}
    |.{0,80}\b(?:all\srights\sreserved|alle\srechte\svorbehalten|सर्वाधिकार\sसुरक्षित)\b.{0,20}
    |(?:skip|jump|zum|zur|direkt\szum)\s(?:to\s)?(?:main\s)?(?:content|navigation|inhalt|hauptinhalt)(?:\s(?:springen|wechseln))?
    |(?:read|show|learn|see)\smore|mehr\s(?:lesen|erfahren|anzeigen)|weiterlesen|और\s(?:पढ़ें|देखें)
    |(?:share|tweet|teilen|follow\sus|folgen\ssie\suns|शेयर\sकरें|साझा\sकरें)(?:\s(?:this|on|via|auf|mit)\b.{0,40})?
    |(?:sign|log)\s?(?:in|up|out)(?:\s(?:or|oder|to|/)\b.{0,40})?|(?:anmelden|abmelden|registrieren|लॉग\s?इन(?:\sकरें)?)
    |(?:subscribe|newsletter|abonnieren)(?:\s(?:to|for|now|today|here|our|the|this|my|free|by|via|e-?mail|rss|newsletter|updates?|
    list|channel|blog|feed|sign|up|unsere[nr]?|den|hier|jetzt|kostenlos|abonnieren|anmelden|anmeldung|bestellen)){0,7}[.!…]?
    |(?:privacy\s(?:policy|notice)|terms\s(?:of|and)\s\w+|datenschutz(?:erklärung)?|impressum|agb|गोपनीयता\sनीति)
    (?:\s?[|·•/&,-]?\s?(?:privacy|terms|policy|notice|contact|imprint|cookies?|of|and|use|service|conditions|impressum|kontakt|agb|datenschutz\w*|संपर्क\w*))*
    |(?:home|menu|search|menü|startseite|suche|navigation)(?:\s?[|›»>/·]\s?\w+){1,12}
    |lorem\sipsum\b.*
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""Whole lines that pages carry beside their text."""
_HINT = re.compile(
    "cookie|javascript|copyright|[©|›»>·]|\\(c\\)|rights|rechte|skip|jump|zum |zur |more|mehr|weiter|share|tweet|teil|"
    "follow|folgen|sign|log|mel|regis|subs|news|abon|priv|terms|date|imp|agb|lorem|अधिकार|सर्वा|और|शेयर|साझा|लॉग|गोप",
    re.IGNORECASE,
)
MAX_BOILERPLATE_CHARACTERS = 240


@dataclasses.dataclass
class Edited:
    """A document's text after its edits: how many by rule, and an excerpt for each rule that changed something."""

    text: str
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    excerpts: dict[str, str] = dataclasses.field(default_factory=dict)
    settled: bool = True

    def note(self, rule: str, count: int, excerpt: str) -> None:
        """Count ``count`` edits; the first excerpt of a rule is kept."""
        self.counts[rule] += count
        self.excerpts.setdefault(rule, excerpt[:EXCERPT])


def normalise(text: str, *, compose: bool = True) -> str:
    r"""NFC, ``\n`` line ends, no byte-order mark or empty line before the text, no white space after it. Idempotent.

    Nothing else changes: the first line keeps its indentation, and so does every other. Code is not composed.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip()
    return _LEADING.sub("", unicodedata.normalize("NFC", text).rstrip() if compose else text, count=1)


class Form:
    """The edits of one kind of source."""

    def __init__(self, rules: RuleSet, config: FormConfig, repeated: frozenset[int] = frozenset()) -> None:
        self.compose = rules != "code"
        self.mojibake = rules in config.mojibake
        self.boilerplate = rules in config.boilerplate
        self.kinds: Collection[PersonalKind] = config.personal_kinds if rules in config.personal else ()
        self.repeated = repeated if self.boilerplate else frozenset()

    def settle(self, text: str) -> Edited:
        """Apply all edits until none changes anything."""
        edited = Edited(text)
        for _ in range(MAX_ROUNDS):
            before = edited.text
            self._normalise(edited)
            for wanted, edit in (
                (self.mojibake and not edited.text.isascii(), self._repair),
                (self.boilerplate, self._drop_lines),
                (self.kinds, self._hide_personal),
            ):
                if wanted:
                    edit(edited)
            if edited.text == before:
                return edited
        edited.settled = False
        return edited

    def _normalise(self, edited: Edited) -> None:
        text = edited.text
        edited.text = normalise(text, compose=self.compose)
        if edited.text == text:
            return
        if "\r" in text:
            edited.note("line_ends", text.count("\r"), "")
        if self.compose and not unicodedata.is_normalized("NFC", text):
            edited.note("nfc", 1, self._change(text, unicodedata.normalize("NFC", text)))
        if not edited.counts:
            edited.note("edges", 1, "")

    def _repair(self, edited: Edited) -> None:
        if not _SUSPECT.search(edited.text):
            return
        lines = edited.text.split("\n")
        for index, line in enumerate(lines):
            if _SUSPECT.search(line) and (fixed := _repaired(line)) != line:
                edited.note("mojibake", 1, self._change(line, fixed))
                lines[index] = fixed
        edited.text = "\n".join(lines)

    def _drop_lines(self, edited: Edited) -> None:
        kept = []
        for line in edited.text.split("\n"):
            if rule := self._line_rule(line):
                edited.note(rule, 1, line.strip())
            else:
                kept.append(line)
        edited.text = "\n".join(kept)

    def _line_rule(self, line: str) -> str | None:
        plain = line.strip()
        if not plain:
            return None
        if len(plain) <= MAX_BOILERPLATE_CHARACTERS and _HINT.search(plain) and _BOILERPLATE.fullmatch(plain):
            return "boilerplate_line"
        return "repeated_line" if self.repeated and line_hash(plain) in self.repeated else None

    def _hide_personal(self, edited: Edited) -> None:
        before = edited.text
        edited.text, counts = replace_personal(before, self.kinds)
        for rule, count in counts.items():
            edited.note(rule, count, _around_placeholder(edited.text, rule))

    def _change(self, before: str, after: str) -> str:
        """Both texts around the first character that differs, without the personal data that the edits will hide."""
        return _first_change(*(replace_personal(text, self.kinds)[0] for text in (before, after)))


def line_hash(line: str) -> int:
    """The identity of a line among all documents' lines: 64 bits."""
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little")


def _repaired(line: str) -> str:
    import ftfy

    # Line breaks that the repair may uncover would move the document's lines.
    fixed = str(ftfy.fix_encoding(line)).replace("\n", " ").replace("\0", "")
    # A letter before a space is a letter (in a table of characters, say) unless something else is repaired too.
    return line if set(fixed) - set(line) <= {"\xa0"} else fixed


def _first_change(before: str, after: str) -> str:
    start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    start = max(0, start - EXCERPT // 8)
    cut: Callable[[str], str] = lambda text: text[start : start + EXCERPT // 3].replace("\n", " ")  # noqa: E731
    return f"{cut(before)} -> {cut(after)}"


def _around_placeholder(text: str, rule: str) -> str:
    place = text.find(f"[{rule.removeprefix('personal_').upper()}]")
    return text[max(0, place - EXCERPT // 2) : place + EXCERPT // 2].replace("\n", " ")
