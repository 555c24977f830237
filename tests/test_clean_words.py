"""Our counts of words decide as datatrove's own filters do on the same words."""

import random

import pytest
from clean_cases import CODE, ENGLISH, HINDI, invented
from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from data.clean_words import DUPLICATED_N_GRAMS, TOP_N_GRAMS, TextWords
from data.words import words_and_signs

SENTENCES = [
    *invented(6, words=9),
    ENGLISH,
    HINDI,
    "the be to of and",
    "# # #",
    "...",
    "- item",
    "• Punkt",
    "1 2 3",
    "___",
]


class PlainWords(WordTokenizer):
    """The same split, without anything remembered."""

    def word_tokenize(self, text):
        return words_and_signs(text)

    def sent_tokenize(self, text):
        raise NotImplementedError

    def span_tokenize(self, text):
        raise NotImplementedError


def verdict(block, text: str) -> str | None:
    found = block.filter(Document(text=text, id="1"))
    return found[1] if isinstance(found, tuple) and not found[0] else None


def texts() -> list[str]:
    draw = random.Random(2)
    made = [" \n"[draw.random() < 0.2].join(draw.choices(SENTENCES, k=draw.randint(1, 40))) for _ in range(250)]
    # Many words of which few or none repeat, and repeats at each length that a rule asks for.
    many = [" ".join(invented(20)), CODE * 3]
    for length in range(2, 12):
        run = " ".join(invented(1, words=length, seed=7)[0].split())
        many += [f"{' '.join(invented(12, words=8, seed=seed))} {run} x {run} y {run}" for seed in range(2)]
    return made + many


def test_quality_is_judged_as_by_datatrove():
    library = GopherQualityFilter(language=PlainWords(), min_doc_words=5, min_stop_words=2)
    judged = [(TextWords(text).quality(5, 2), verdict(library, text)) for text in texts() if words_and_signs(text)]
    assert [ours for ours, _ in judged] == [theirs for _, theirs in judged]
    assert len({ours for ours, _ in judged}) >= 7


@pytest.mark.parametrize("top", [TOP_N_GRAMS, ()])
@pytest.mark.parametrize("duplicated", [DUPLICATED_N_GRAMS, DUPLICATED_N_GRAMS[-1:], ()])
def test_repetition_is_judged_as_by_datatrove(top, duplicated):
    lines_aside = {"dup_line_frac": None, "dup_para_frac": None, "dup_line_char_frac": None, "dup_para_char_frac": None}
    library = GopherRepetitionFilter(language=PlainWords(), top_n_grams=top, dup_n_grams=duplicated, **lines_aside)
    judged = [(TextWords(text).repetition(top, duplicated), verdict(library, text)) for text in texts()]
    assert [ours for ours, _ in judged] == [theirs for _, theirs in judged]
    assert len({ours for ours, _ in judged}) >= 1 + bool(top) * 3 + (len(duplicated) > 0)
