"""What a corpus holds by language and domain, in tokens, estimated from a sample of documents that hashes choose.

Every document of a source is drawn with one probability p, and counts 1/p times (Horvitz and Thompson 1952): an
unbiased estimate, whose variance is estimated by the sum of size**2 * (1 - p) / p**2 over the documents drawn. A source
that fits into the sample whole (p = 1) is counted exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.corpus import CorpusDocument, read_documents, sources
from data.domains import CODE, DIALOGUE, DOMAINS, LANGUAGES, TOPICS, classify
from data.mix import hash64
from data.tokenizer import encode_texts, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[str, str]
"""Language and domain."""
_BATCH_DOCUMENTS = 64
_SHOWN_CHARACTERS, _SHOWN = 120, 3
_Z95 = 1.959964


@dataclasses.dataclass
class Cell:
    """What the sample says of one language and domain; figures are estimates for all training documents."""

    language: str
    domain: str
    stated: bool
    """Whether a source declares the domain of itself; other documents were classified."""
    documents: float = 0.0
    bytes: float = 0.0
    tokens: float = 0.0
    variance: float = 0.0
    """Of ``tokens``."""
    sampled_documents: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    @property
    def half_width_tokens(self) -> float:
        """Of the 95% interval around ``tokens``; zero where every document was counted."""
        return _Z95 * math.sqrt(self.variance)


@dataclasses.dataclass
class Declared:
    """What a source declares its domain to be, beside what the classifier makes of the same documents."""

    source: str
    language: str
    domain: str
    believed: bool
    """Whether the cells take the word; one that is no domain of knowledge (``web``) says where text comes from."""
    tokens: float = 0.0
    classified: dict[str, float] = dataclasses.field(default_factory=dict)
    """Tokens by the classifier's domain."""

    @property
    def shares(self) -> dict[str, float]:
        """Of its tokens by the classifier's domain, the largest first."""
        ranked = sorted(self.classified.items(), key=lambda item: (-item[1], item[0]))
        return {domain: tokens / max(self.tokens, 1.0) for domain, tokens in ranked}


def profile_corpus(
    corpus: Path, tokenizer_dir: Path, *, sample_bytes: int, seed: int, progress_seconds: float = 10.0
) -> tuple[list[Cell], list[Declared]]:
    """Cells of the training documents that a corpus has, by language and then by tokens; what sources declare.

    A source's ``domain`` is believed where it is one of ``DOMAINS``; any other word is no answer to what a document is
    about, so that the documents of such a source are classified like those of a source that says nothing.

    Args:
        corpus: a corpus artifact.
        tokenizer_dir: the tokenizer whose tokens are counted.
        sample_bytes: about how much text of each source is read closely.
        seed: of the sample.
        progress_seconds: between lines of progress.
    """
    tokenizer, cells, declared = load(tokenizer_dir), dict[tuple[str, str, bool], Cell](), list[Declared]()
    started = shown = time.monotonic()
    for source in sources(corpus):
        rate = min(1.0, sample_bytes / max(1, source["train"]["bytes"]))
        own = _declared(source)
        declared += [own] if own else []
        for batch in _batches(_drawn(corpus, source["name"], rate, seed)):
            _count(cells, own, batch, tokenizer, rate)
            if time.monotonic() - shown > progress_seconds:
                shown = time.monotonic()
                read = sum(cell.sampled_documents for cell in cells.values())
                print(f"profile: {source['name']}, {read:,} documents, {shown - started:.0f} s", flush=True)
    return sorted(cells.values(), key=lambda cell: (cell.language, -cell.tokens, cell.domain)), declared


def _declared(source: Mapping[str, Any]) -> Declared | None:
    domain = source.get("domain")
    return Declared(source["name"], source["language"], domain, domain in DOMAINS) if domain else None


def _drawn(corpus: Path, source: str, rate: float, seed: int) -> Iterator[CorpusDocument]:
    for document in read_documents(corpus, "train", source):
        if hash64("profile", seed, document["id"]) / 2**64 < rate:
            yield document


def _count(
    cells: dict[tuple[str, str, bool], Cell],
    declared: Declared | None,
    batch: Sequence[CorpusDocument],
    tokenizer: PreTrainedTokenizerBase,
    rate: float,
) -> None:
    stated = declared is not None and declared.believed
    encoded = encode_texts(tokenizer, [document["text"] for document in batch])
    for document, ids in zip(batch, encoded, strict=True):
        language = document["language"]
        domain = classified = classify(document["text"], language, document["title"])
        if declared is not None:
            declared.tokens += len(ids) / rate
            declared.classified[classified] = declared.classified.get(classified, 0.0) + len(ids) / rate
            domain = declared.domain if stated else classified
        cell = cells.setdefault((language, domain, stated), Cell(language=language, domain=domain, stated=stated))
        cell.documents += 1 / rate
        cell.bytes += len(document["text"].encode()) / rate
        cell.tokens += len(ids) / rate
        cell.variance += len(ids) ** 2 * (1 - rate) / rate**2
        cell.sampled_documents += 1
        if len(cell.examples) < _SHOWN:
            cell.examples.append(" ".join(document["text"].split())[:_SHOWN_CHARACTERS])


def _batches(documents: Iterable[CorpusDocument]) -> Iterator[list[CorpusDocument]]:
    stream = iter(documents)
    while batch := list(itertools.islice(stream, _BATCH_DOCUMENTS)):
        yield batch


@dataclasses.dataclass(frozen=True)
class Margin:
    """What a model knows of one language and domain: mean margin in nats a token over ``n`` facts, 95% interval."""

    nats_per_token: float
    n: int
    interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Advice:
    """What one cell is, and how urgent more text for it is; see ``advise``."""

    language: str
    domain: str
    tokens: float
    share: float
    verdict: str
    margin: Margin | None
    too_few_facts: bool
    """Whether the margin is of too few facts to say anything of the cell."""

    @property
    def told(self) -> str:
        """The verdict for a person: with how few facts nothing was judged, where that is so."""
        if not self.too_few_facts or self.margin is None:
            return self.verdict
        unjudged = f"too few facts (n={self.margin.n}) to judge"
        return unjudged if self.verdict == UNJUDGED else f"{self.verdict}; {unjudged}"


COLLECT, SCARCE, WEAK, UNJUDGED, UNMEASURED, ENOUGH = (
    "collect: weak and scarce", "scarce", "weak in spite of its text", "too few facts to judge", "not measured",
    "enough",
)  # fmt: skip
"""Verdicts, most urgent first."""
VERDICTS = (COLLECT, SCARCE, WEAK, UNJUDGED, UNMEASURED, ENOUGH)


def advise(cells: Sequence[Cell], margins: Mapping[Pair, Margin], scarce_share: float, min_facts: int) -> list[Advice]:
    """What to collect next: a verdict on each domain of each language of the corpus, the most urgent first.

    A cell is scarce when it has less than ``scarce_share`` of its language's tokens, and weak when the 95% interval of
    its margin, of ``min_facts`` facts or more, is not above zero, so that the model is not shown to know its facts.
    Cells of a language that no document fell into are scarce too. Of equal verdicts the lower margin, then the fewer
    tokens come first.
    """
    tokens: dict[Pair, float] = {}
    for cell in cells:
        tokens[cell.language, cell.domain] = tokens.get((cell.language, cell.domain), 0.0) + cell.tokens
    languages = sorted({language for language, _ in tokens})
    whole = {one: sum(count for (language, _), count in tokens.items() if language == one) for one in languages}
    told = {(one, domain): 0.0 for one in languages if one in LANGUAGES for domain in (*TOPICS, DIALOGUE)}
    found = []
    for (language, domain), count in {**told, **tokens}.items():
        margin, share = margins.get((language, domain)), count / max(whole[language], 1.0)
        too_few = margin is not None and margin.n < min_facts
        verdict = _verdict(share < scarce_share, margin, too_few)
        found.append(Advice(language, domain, count, share, verdict, margin, too_few))
    return sorted(found, key=_urgency)


def _verdict(is_scarce: bool, margin: Margin | None, too_few: bool) -> str:
    if margin is None or too_few:
        return SCARCE if is_scarce else UNMEASURED if margin is None else UNJUDGED
    is_weak = margin.interval is None or margin.interval[0] <= 0
    if is_weak:
        return COLLECT if is_scarce else WEAK
    return SCARCE if is_scarce else ENOUGH


def _urgency(advice: Advice) -> tuple[Any, ...]:
    margin = math.inf if advice.margin is None or advice.too_few_facts else advice.margin.nats_per_token
    return VERDICTS.index(advice.verdict), margin, advice.tokens, advice.language, advice.domain


def unmatched(margins: Mapping[Pair, Margin], cells: Sequence[Cell]) -> list[Pair]:
    """Measured pairs of which the corpus has no language."""
    languages = {cell.language for cell in cells} - {CODE}
    return sorted(pair for pair in margins if pair[0] not in languages)
