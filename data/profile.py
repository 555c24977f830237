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
from data.domains import CODE, DIALOGUE, LANGUAGES, TOPICS, classify
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
    """Whether a source says the domain of itself; other documents were classified."""
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


def profile_corpus(
    corpus: Path, tokenizer_dir: Path, *, sample_bytes: int, seed: int, progress_seconds: float = 10.0
) -> list[Cell]:
    """Cells of the training documents that a corpus has, by language and then by tokens.

    Args:
        corpus: a corpus artifact.
        tokenizer_dir: the tokenizer whose tokens are counted.
        sample_bytes: about how much text of each source is read closely.
        seed: of the sample.
        progress_seconds: between lines of progress.
    """
    tokenizer, cells = load(tokenizer_dir), dict[tuple[str, str, bool], Cell]()
    started = shown = time.monotonic()
    for source in sources(corpus):
        rate = min(1.0, sample_bytes / max(1, source["train"]["bytes"]))
        for batch in _batches(_drawn(corpus, source["name"], rate, seed)):
            _count(cells, source, batch, tokenizer, rate)
            if time.monotonic() - shown > progress_seconds:
                shown = time.monotonic()
                read = sum(cell.sampled_documents for cell in cells.values())
                print(f"profile: {source['name']}, {read:,} documents, {shown - started:.0f} s", flush=True)
    return sorted(cells.values(), key=lambda cell: (cell.language, -cell.tokens, cell.domain))


def _drawn(corpus: Path, source: str, rate: float, seed: int) -> Iterator[CorpusDocument]:
    for document in read_documents(corpus, "train", source):
        if hash64("profile", seed, document["id"]) / 2**64 < rate:
            yield document


def _count(
    cells: dict[tuple[str, str, bool], Cell],
    source: Mapping[str, Any],
    batch: Sequence[CorpusDocument],
    tokenizer: PreTrainedTokenizerBase,
    rate: float,
) -> None:
    stated = source.get("domain")
    encoded = encode_texts(tokenizer, [document["text"] for document in batch])
    for document, ids in zip(batch, encoded, strict=True):
        language = document["language"]
        domain = stated or classify(document["text"], language, document["title"])
        cell = cells.setdefault(
            (language, domain, bool(stated)), Cell(language=language, domain=domain, stated=bool(stated))
        )
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


COLLECT, SCARCE, WEAK, UNMEASURED, ENOUGH = (
    "collect: weak and scarce", "scarce", "weak in spite of its text", "not measured", "enough",
)  # fmt: skip
"""Verdicts, most urgent first."""
VERDICTS = (COLLECT, SCARCE, WEAK, UNMEASURED, ENOUGH)


def advise(cells: Sequence[Cell], margins: Mapping[Pair, Margin], scarce_share: float) -> list[Advice]:
    """What to collect next: a verdict on each domain of each language of the corpus, the most urgent first.

    A cell is scarce when it has less than ``scarce_share`` of its language's tokens, and weak when the 95% interval of
    its margin is not above zero, so that the model is not shown to know its facts. Cells of a language that no document
    fell into are scarce too. Of equal verdicts the lower margin, then the fewer tokens come first.
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
        verdict = _verdict(share < scarce_share, margin)
        found.append(Advice(language, domain, count, share, verdict, margin))
    return sorted(found, key=_urgency)


def _verdict(is_scarce: bool, margin: Margin | None) -> str:
    if margin is None:
        return SCARCE if is_scarce else UNMEASURED
    is_weak = margin.interval is None or margin.interval[0] <= 0
    if is_weak:
        return COLLECT if is_scarce else WEAK
    return SCARCE if is_scarce else ENOUGH


def _urgency(advice: Advice) -> tuple[Any, ...]:
    margin = math.inf if advice.margin is None else advice.margin.nats_per_token
    return VERDICTS.index(advice.verdict), margin, advice.tokens, advice.language, advice.domain


def unmatched(margins: Mapping[Pair, Margin], cells: Sequence[Cell]) -> list[Pair]:
    """Measured pairs of which the corpus has no language."""
    languages = {cell.language for cell in cells} - {CODE}
    return sorted(pair for pair in margins if pair[0] not in languages)
