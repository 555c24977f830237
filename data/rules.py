"""Quality rules by kind of source, and language, as datatrove filters. Imports datatrove: import late.

A rule drops a whole document, under its name; none edits text (``data.clean_form`` does). Thresholds follow Rae et al.
2021 (Gopher, table A1), Penedo et al. 2024 (FineWeb) and, for code, Kocetkov et al. 2022 (The Stack); rule sets for
edited text leave out those that only web pages call for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters import FineWebQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from data.clean_decontaminate import ContaminationIndex
from data.clean_quality import QualityModel
from data.clean_words import DUPLICATED_N_GRAMS, TOP_N_GRAMS, TextWords
from data.source_config import RuleSet, Source
from data.words import count_letters, has_fewer_words

Rule = Callable[[Document], str | None]

LANGUAGE_SAMPLE_CHARACTERS = 1000
MIN_LETTER_SHARE = {"web": 0.5, "prose": 0.5, "messages": 0.4, "code": 0.25}
MAX_CODE_LINE = 1000
CONTAMINATED = "contaminated_"
FUNCTION_WORDS = {
    "en": frozenset("the of and to is that with for by as it are this from which be or not you have has at on".split()),
    "de": frozenset(
        "der das und ist nicht mit von den dem ein eine einen für auf zu sich wird oder im bei auch".split()
    ),
    "hi": frozenset("के है में की को से का और पर हैं यह लिए एक नहीं कि ने करने करें किसी या तो इस".split()),
}
"""Frequent words that few other languages share."""
FUNCTION_WORD_SAMPLE = 200
FUNCTION_WORD_SHARE = 0.15
MIN_FUNCTION_WORDS = 4
MAX_CODE_MEAN_LINE = 100


@lru_cache(maxsize=1)
def words_of(text: str) -> TextWords:
    """The words of ``text``, split once for all rules that see the document one after another."""
    return TextWords(text)


class Words(WordTokenizer):
    """datatrove's word splitting by one regular expression: any script, no model, tens of megabytes a second."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words and single signs of ``text``."""
        return words_of(text).words

    def sent_tokenize(self, text: str) -> list[str]:
        """Lines: no rule used here asks for sentences."""
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Not offered."""
        raise NotImplementedError("spans are not needed by the rules used here")


WORDS = Words()


@dataclasses.dataclass(frozen=True)
class Content:
    """What documents are judged by beyond their form: files of the work folder, so that workers read them once."""

    contamination: Path | None = None
    """The index of evaluation sets (``data.clean_decontaminate``)."""
    quality: Path | None = None
    """The classifier (``data.clean_quality``)."""
    judged: tuple[str, ...] = ()
    """Names of the sources that the classifier judges."""


class SourceRules(BaseFilter):
    """Each document through the rules of its source, cheapest first; the first that objects names the drop."""

    name = "rules"

    def __init__(self, sources: Sequence[Source], exclusion_writer: Any = None, content: Content | None = None) -> None:
        super().__init__(exclusion_writer)
        self.sources = {source.name: source for source in sources}
        self.content = content or Content()
        self._rules: dict[str, list[Rule]] = {}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or False with the rule's name."""
        name = doc.metadata["source"]
        if name not in self._rules:  # built in the worker: rules hold models that are slow to send
            self._rules[name] = rules_of(self.sources[name]) + content_rules(name, self.content)
        reason = next((found for rule in self._rules[name] if (found := rule(doc))), None)
        return True if reason is None else (False, reason)


def rules_of(source: Source) -> list[Rule]:
    """The rules for one source; each returns the name under which a document is dropped, or none."""
    rules: list[Rule] = [_usable]
    if source.rules == "none":
        return rules
    rules.append(lambda doc: "too_short" if has_fewer_words(doc.text, source.min_words) else None)
    rules.append(lambda doc: _letters(doc, source.rules))
    rules += _KIND_RULES[source.rules](source)
    if source.language != "code" and source.language_threshold > 0:
        rules.append(_Language(source.language, source.language_threshold))
    return rules


def content_rules(name: str, content: Content) -> list[Rule]:
    """The rules that look into what a document says."""
    rules: list[Rule] = []
    if content.contamination is not None:
        rules.append(_Contamination(content.contamination))
    if content.quality is not None and name in content.judged:
        rules.append(_Quality(content.quality))
    return rules


class _Contamination:
    """Drops a document that holds an item of an evaluation set, under the set's name."""

    def __init__(self, path: Path) -> None:
        self.index = ContaminationIndex.load(path)

    def __call__(self, doc: Document) -> str | None:
        if not (found := self.index.find(doc.text)):
            return None
        name, doc.metadata["detail"] = found
        return f"{CONTAMINATED}{name}"


class _Quality:
    """Drops what the trained classifier scores below its threshold."""

    def __init__(self, path: Path) -> None:
        self.model = QualityModel.load(path)

    def __call__(self, doc: Document) -> str | None:
        score = self.model.score(doc.text)
        if score >= self.model.threshold:
            return None
        doc.metadata["detail"] = f"score {score:.4f} below {self.model.threshold:.4f}"
        return "low_quality"


def _usable(doc: Document) -> str | None:
    if fault := doc.metadata.get("fault"):
        return str(fault)
    if not doc.text:
        return "empty"
    return "binary" if "\0" in doc.text else None


def _letters(doc: Document, rules: RuleSet) -> str | None:
    visible = sum(map(len, doc.text.split()))
    return "few_letters" if count_letters(doc.text) < MIN_LETTER_SHARE[rules] * visible else None


def _datatrove(block: BaseFilter) -> Rule:
    """A datatrove filter as a rule."""

    def rule(doc: Document) -> str | None:
        found = block.filter(doc)
        if isinstance(found, tuple):
            return None if found[0] else found[1]
        return None if found else type(block).__name__

    return rule


def _web_rules(source: Source) -> list[Rule]:
    # Gopher's stop words are English; in other languages they would drop everything.
    stop_words = 2 if source.language == "en" else 0
    return [
        _datatrove(FineWebQualityFilter(language=WORDS)),
        lambda doc: words_of(doc.text).quality(source.min_words, stop_words),
        _REPEATED_LINES,
        lambda doc: words_of(doc.text).repetition(TOP_N_GRAMS, DUPLICATED_N_GRAMS),
    ]


def _prose_rules(source: Source) -> list[Rule]:
    # Without the short n-grams: in a summary of two sentences a name said twice already trips them.
    return [_REPEATED_LINES, lambda doc: words_of(doc.text).repetition((), DUPLICATED_N_GRAMS[-1:])]


def _code_rules(source: Source) -> list[Rule]:
    return [_long_lines]


def _long_lines(doc: Document) -> str | None:
    lines = doc.text.split("\n")
    if max(map(len, lines)) > MAX_CODE_LINE:
        return "long_line"
    return "long_lines" if len(doc.text) / len(lines) > MAX_CODE_MEAN_LINE else None


_REPEATED_LINES = _datatrove(GopherRepetitionFilter(top_n_grams=(), dup_n_grams=(), language=WORDS))
_KIND_RULES: dict[str, Callable[[Source], list[Rule]]] = {
    "web": _web_rules,
    "prose": _prose_rules,
    "messages": lambda source: [],
    "code": _code_rules,
}


class _Language:
    """Drops a document that is hardly in its source's language, by py3langid's bundled model.

    The model takes longer than all other rules together, so it is not asked of a text whose first words are full of
    the language's own function words.
    """

    def __init__(self, language: str, threshold: float) -> None:
        self.language, self.threshold = language, threshold
        self.function_words = FUNCTION_WORDS.get(language, frozenset())

    def __call__(self, doc: Document) -> str | None:
        if self.function_words and self._is_plain(words_of(doc.text).words[:FUNCTION_WORD_SAMPLE]):
            return None
        sample = doc.text[:LANGUAGE_SAMPLE_CHARACTERS]
        if _identifier().classify(sample)[0] == self.language:
            return None
        ranked = dict(_identifier().rank(sample))
        return "language" if ranked.get(self.language, 1.0) < self.threshold else None

    def _is_plain(self, words: list[str]) -> bool:
        found = [word for word in words if word in self.function_words]
        return len(found) >= FUNCTION_WORD_SHARE * len(words) and len(set(found)) >= MIN_FUNCTION_WORDS


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """py3langid's identifier with normalised probabilities; loading takes most of a second, so once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
