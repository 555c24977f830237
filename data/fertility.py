"""What a tokenizer costs by language: bytes a token, words split, bytes spelled one by one, words cut at a matra."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from data.corpus import read_documents, sources
from data.errors import DataError
from data.tokenizer import encode_texts, token_byte_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = np.ndarray
Figures = dict[str, Any]

# Joiners stand inside Hindi words.
_WORD = regex.compile(r"[\p{L}\p{M}]+(?:[\u200c\u200d]+[\p{L}\p{M}]+)*")
_MARK = regex.compile(r"\p{M}")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_BATCH_TEXTS = 64
_FEW = 0.005
"""A share of words below which a split rule is not what cuts them: odd marks that no letter precedes."""


def measure_fertility(
    tokenizer: PreTrainedTokenizerBase, corpus: Path, *, max_bytes: int = 1_000_000
) -> dict[str, Figures]:
    """The figures of ``measure_texts`` by language of a corpus.

    Measured on held-out text where a language has any, up to ``max_bytes`` a language; on training text otherwise.
    """
    report = {}
    for language, texts in language_texts(corpus, max_bytes).items():
        figures = measure_texts(tokenizer, texts)
        if figures["tokens"] and figures["words"]:
            report[language] = figures
    return report


def language_texts(corpus: Path, max_bytes: int) -> dict[str, list[str]]:
    """The texts that ``measure_fertility`` measures, by language; the last one may go past ``max_bytes``.

    A language's sources take turns, document by document, so that no source fills the measure alone.
    """
    found = {}
    for language in sorted({source["language"] for source in sources(corpus)}):
        texts, size = [], 0
        for text in _texts(corpus, language):
            texts.append(text)
            size += len(text.encode())
            if size >= max_bytes:
                break
        found[language] = texts
    return found


def measure_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Figures:
    """Counts and shares of one tokenizer on some texts.

    A word is a run of letters with the marks on them; it is split where a token ends inside it. A token is a byte token
    when its bytes alone are no text, so a part of a character, or when byte fallback spelled it. A word is cut at a
    matra when a token begins with a mark of it (a vowel sign, a virama, a nukta), or inside one. Two things do that:
    the rule that splits text before any vocabulary is asked, which no training mends; and, inside what the rule leaves
    whole, merges that the vocabulary has no place for.

    Returns:
        ``documents bytes tokens words words_with_marks`` (counts), ``bytes_per_token``, ``tokens_per_word`` (words
        between white space, as is usual), the shares ``words_split`` (of words), ``byte_tokens`` (of tokens),
        ``words_cut_at_mark`` and ``words_cut_at_mark_by_rule`` (of words with marks; None where there are none: by
        tokens whatever the cause, and by the rule alone), and ``lost_bytes`` that no token has.

    Raises:
        DataError: if the tokens stand for more bytes than the text has.
    """
    total: dict[str, int] = dict.fromkeys(
        ("documents", "bytes", "tokens", "spaced", "words", "split", "byte", "with_marks", "cut", "ruled", "lost"), 0
    )
    lengths, is_byte = _tables(tokenizer)
    for batch in _batches(texts):
        for text, ids in zip(batch, encode_texts(tokenizer, batch), strict=True):
            for name, count in _count(text, np.array(ids, np.int64), lengths, is_byte).items():
                total[name] += count
            total["ruled"] += _cut_by_rule(tokenizer, text)
    return _figures(total)


def _count(text: str, ids: Array, lengths: Array, is_byte: Array) -> Mapping[str, int]:
    size = len(text.encode())
    ends = np.cumsum(lengths[ids])
    covered = int(ends[-1]) if len(ends) else 0
    if covered > size:
        raise DataError(f"tokens must stand for the text's {size} bytes; got {covered}; name one that adds nothing")
    counts = {"documents": 1, "bytes": size, "tokens": len(ids), "spaced": len(text.split()), "lost": size - covered}
    counts["byte"] = int(is_byte[ids].sum())
    # Where bytes are lost, the ends drift, and words cannot be told from one another.
    return counts if covered < size else counts | _count_words(text, ends)


def _count_words(text: str, ends: Array) -> dict[str, int]:
    """Words, those with an end of a token strictly inside, and those with such an end before or in a mark."""
    starts = _character_starts(text)
    words = np.array([match.span() for match in _WORD.finditer(text)], np.int64).reshape(-1, 2)
    marks = np.array([match.start() for match in _MARK.finditer(text)], np.int64)
    first, last = starts[words[:, 0]], starts[words[:, 1]]
    is_split = np.searchsorted(ends, last, "left") > np.searchsorted(ends, first, "right")
    has_marks = np.searchsorted(marks, words[:, 1], "left") > np.searchsorted(marks, words[:, 0], "left")
    # An end at byte e lies before or in the character that byte e belongs to.
    owners = np.searchsorted(starts, ends, "right") - 1
    cuts = np.unique(owners[np.isin(owners, marks)])
    is_cut = np.searchsorted(cuts, words[:, 1], "left") > np.searchsorted(cuts, words[:, 0], "right")
    return {
        "words": len(words), "split": int(is_split.sum()), "with_marks": int(has_marks.sum()), "cut": int(is_cut.sum())
    }  # fmt: skip


def _cut_by_rule(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Words that the split before BPE cuts before one of their marks."""
    rule = tokenizer.backend_tokenizer.pre_tokenizer
    if rule is None or not _MARK.search(text):
        return 0
    starts = sorted({start for _, (start, _) in rule.pre_tokenize_str(text) if _MARK.match(text, start)})
    spans = np.array([match.span() for match in _WORD.finditer(text)], np.int64).reshape(-1, 2)
    cuts = np.array(starts, np.int64)
    return int((np.searchsorted(cuts, spans[:, 1], "left") > np.searchsorted(cuts, spans[:, 0], "right")).sum())


def _character_starts(text: str) -> Array:
    """(len + 1,) byte offset of each character in UTF-8, and of the end."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])


@functools.lru_cache(maxsize=4)
def _tables(tokenizer: PreTrainedTokenizerBase) -> tuple[Array, Array]:
    """Of each id how many bytes it stands for, and whether it is a byte token."""
    table = token_byte_strings(tokenizer)
    is_byte = np.array([not _is_text(token) for token in table])
    for name, token in tokenizer.get_vocab().items():
        if _BYTE_PIECE.fullmatch(name) and len(table[token]) == 1:
            is_byte[token] = True
    return np.array([len(token) for token in table], np.int64), is_byte


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _figures(total: Mapping[str, int]) -> Figures:
    def share(part: str, whole: str) -> float | None:
        return round(total[part] / total[whole], 6) if total[whole] else None

    return {
        **{name: total[name] for name in ("documents", "bytes", "tokens", "words")},
        "words_with_marks": total["with_marks"],
        "bytes_per_token": round(total["bytes"] / max(1, total["tokens"]), 4),
        "tokens_per_word": round(total["tokens"] / max(1, total["spaced"]), 4),
        "words_split": share("split", "words"),
        "byte_tokens": share("byte", "tokens"),
        "words_cut_at_mark": share("cut", "with_marks"),
        "words_cut_at_mark_by_rule": share("ruled", "with_marks"),
        "lost_bytes": total["lost"],
    }


def _batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH_TEXTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _texts(corpus: Path, language: str) -> Iterator[str]:
    """Documents of one language, its sources in turn."""
    mine = [source for source in sources(corpus) if source["language"] == language]
    split = "heldout" if any(source["heldout"]["documents"] for source in mine) else "train"
    streams = [read_documents(corpus, split, source["name"]) for source in mine]
    while streams:
        left = []
        for stream in streams:
            document = next(stream, None)
            if document is not None:
                yield document["text"]
                left.append(stream)
        streams = left


def table(report: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """A screen of text from ``{tokenizer: {language: figures}}``: a line a language and tokenizer, and what cuts words
    at their matras, where there are any.
    """
    width = max([9, *(len(name) for name in report)])
    lines = [
        f"{'language':<8}  {'tokenizer':<{width}}  bytes/token  tokens/word  words split  byte tokens        "
        f"bytes      words"
    ]
    for language in sorted({language for rows in report.values() for language in rows}):
        for name, rows in report.items():
            if language in rows:
                lines.append(f"{language:<8}  {name:<{width}}  {_line(rows[language])}")
    return [*lines, *_mark_lines(report)]


def _mark_lines(report: Mapping[str, Mapping[str, Figures]]) -> Iterator[str]:
    for name, rows in report.items():
        for language, row in sorted(rows.items()):
            if row["words_with_marks"]:
                rule, cut = row.get("words_cut_at_mark_by_rule"), row["words_cut_at_mark"]
                by_rule = "not measured" if rule is None else f"{rule:.1%}"
                yield (
                    f"{language}, {name}: of {row['words_with_marks']:,} words with a matra or another mark the split "
                    f"rule cuts {by_rule} at one, and tokens cut {cut:.1%}{_cause(rule, cut)}"
                )


def _cause(rule: float | None, cut: float) -> str:
    """What cuts words at their marks; nothing where nothing does, or where the rule was not measured."""
    if rule is None or not cut:
        return ""
    if rule < _FEW:
        return ": what the rule leaves whole is cut for want of vocabulary"
    return ": the split rule itself cuts at marks, which no vocabulary mends"


def _line(row: Figures) -> str:
    def percent(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]:.2%}"

    return (
        f"{row['bytes_per_token']:>11.2f}  {row['tokens_per_word']:>11.2f}  {percent('words_split'):>11}  "
        f"{percent('byte_tokens'):>11}  {row['bytes']:>11,}  {row['words']:>9,}"
    )
