"""Quality rules by kind of source, and language, as datatrove filters. Imports datatrove: import late.

A rule drops a whole document, under its name; none edits text. Thresholds follow Rae et al. 2021 (Gopher, table A1),
Penedo et al. 2024 (FineWeb) and, for code, Kocetkov et al. 2022 (The Stack); rule sets for edited text leave out those
that only web pages call for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from data.source_config import RuleSet, Source
from data.words import count_letters, has_fewer_words, words_and_signs

Rule = Callable[[Document], str | None]

LANGUAGE_SAMPLE_CHARACTERS = 2000
MIN_LETTER_SHARE = {"web": 0.5, "prose": 0.5, "messages": 0.4, "code": 0.25}
MAX_CODE_LINE = 1000
_LEADING = re.compile(r"\A(?:\ufeff|[^\S\n]*\n)+")
MAX_CODE_MEAN_LINE = 100


class Words(WordTokenizer):
    """datatrove's word splitting by one regular expression: any script, no model, tens of megabytes a second."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words and single signs of ``text``."""
        return words_and_signs(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Lines: no rule used here asks for sentences."""
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Not offered."""
        raise NotImplementedError("spans are not needed by the rules used here")


WORDS = Words()


def normalise(text: str) -> str:
    r"""NFC, ``\n`` line ends, no byte-order mark or empty line before the text, no white space after it. Idempotent.

    Nothing else changes: the first line keeps its indentation, and so does every other.
    """
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).rstrip()
    return _LEADING.sub("", text, count=1)


class Normalise(PipelineStep):
    """Bring every document into the corpus's form."""

    name = "normalise"
    type = "formatter"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Documents with ``normalise`` applied."""
        for document in data:
            document.text = normalise(document.text)
            yield document


class SourceRules(BaseFilter):
    """Each document through the rules of its source, cheapest first; the first that objects names the drop."""

    name = "quality rules"

    def __init__(self, sources: Sequence[Source], exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.sources = {source.name: source for source in sources}
        self._rules: dict[str, list[Rule]] = {}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or False with the rule's name."""
        name = doc.metadata["source"]
        if name not in self._rules:  # built in the worker: rules hold models that are slow to send
            self._rules[name] = rules_of(self.sources[name])
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
    gopher = GopherQualityFilter(language=WORDS, min_stop_words=stop_words, min_doc_words=source.min_words)
    return [
        _datatrove(FineWebQualityFilter(language=WORDS)),
        _datatrove(gopher),
        _datatrove(GopherRepetitionFilter(language=WORDS)),
    ]


def _prose_rules(source: Source) -> list[Rule]:
    # Without the n-gram rules: in a summary of two sentences a name said twice already trips them.
    return [_datatrove(GopherRepetitionFilter(top_n_grams=(), dup_n_grams=((10, 0.10),), language=WORDS))]


def _code_rules(source: Source) -> list[Rule]:
    return [_long_lines]


def _long_lines(doc: Document) -> str | None:
    lines = doc.text.split("\n")
    if max(map(len, lines)) > MAX_CODE_LINE:
        return "long_line"
    return "long_lines" if len(doc.text) / len(lines) > MAX_CODE_MEAN_LINE else None


_KIND_RULES: dict[str, Callable[[Source], list[Rule]]] = {
    "web": _web_rules,
    "prose": _prose_rules,
    "messages": lambda source: [],
    "code": _code_rules,
}


class _Language:
    """Drops a document that is hardly in its source's language, by py3langid's bundled model."""

    def __init__(self, language: str, threshold: float) -> None:
        self.language, self.threshold = language, threshold

    def __call__(self, doc: Document) -> str | None:
        sample = doc.text[:LANGUAGE_SAMPLE_CHARACTERS]
        if _identifier().classify(sample)[0] == self.language:
            return None
        ranked = dict(_identifier().rank(sample))
        return "language" if ranked.get(self.language, 1.0) < self.threshold else None


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """py3langid's identifier with normalised probabilities; loading takes most of a second, so once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
