"""The held-out split: chosen by document hash, and no training document shares a run of words with it (TRAPS M4).

The strata are the sources, each of one language and one domain. Within one, a document's side depends on its own text
alone (but for small sources, which get a minimum), so it never changes sides when other documents come or go, and
cleaning a cleaned corpus again gives the same split. Nothing downstream has a say in it: no tokenizer, share or seed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from data.errors import DataError
from data.source_config import HeldoutConfig
from data.words import Array, WordRuns


@dataclasses.dataclass(frozen=True)
class Split:
    """Which documents (by id) are held out, and which are removed from training with a run of words they share."""

    heldout: frozenset[str]
    overlapping: Mapping[str, str]


def choose_heldout(ids: Mapping[str, Iterable[str]], config: HeldoutConfig) -> frozenset[str]:
    """Ids held out of each source: every one whose hash lies below ``share``, and the lowest up to ``min_documents``.

    The minimum never takes more than half of a source. Ids are hex digests, so they are the hash themselves.
    """
    chosen: set[str] = set()
    for of_source in ids.values():
        ordered = sorted(of_source)
        least = min(config.min_documents, len(ordered) // 2)
        chosen.update(ordered[:least])
        chosen.update(one for one in ordered[least:] if int(one[:12], 16) < config.share * 16**12)
    return frozenset(chosen)


def split_documents(documents: Callable[[], Iterator[tuple[str, str, str]]], config: HeldoutConfig) -> Split:
    """Choose the held-out documents and find the training documents that overlap with them.

    ``documents`` yields (source, id, text) anew at each call. Where the removal of overlapping documents changes the
    choice (a source smaller than twice the minimum), the choice is made again until it stands. Raises ``DataError``
    with every source that would lose more than ``config.max_overlap_share`` of its training documents.
    """
    ids: dict[str, set[str]] = defaultdict(set)
    for source, one, _ in documents():
        ids[source].add(one)
    before = {source: len(of_source) for source, of_source in ids.items()}
    overlapping: dict[str, str] = {}
    heldout = choose_heldout(ids, config)
    while True:
        found = find_overlap(
            ((one, text) for _, one, text in documents() if one in heldout),
            ((one, text) for _, one, text in documents() if one not in heldout and one not in overlapping),
            config,
        )
        overlapping |= found
        for of_source in ids.values():
            of_source.difference_update(found)
        chosen = choose_heldout(ids, config)
        if chosen == heldout:
            _refuse_large_overlap(before, ids, heldout, config)
            return Split(heldout, overlapping)
        heldout = chosen


def _refuse_large_overlap(
    before: Mapping[str, int], left: Mapping[str, set[str]], heldout: frozenset[str], config: HeldoutConfig
) -> None:
    """What removes most of a source is no accident: copies of the held-out text, or boilerplate that is not known."""
    faults = []
    for source, count in before.items():
        removed, train = count - len(left[source]), count - len(left[source] & heldout)
        if removed > config.max_overlap_share * train:
            message = (
                "must be at least the share of training documents that overlap removes; got "
                f"{config.max_overlap_share:g}, while {removed} of {train} of {source} share {config.ngram} words with "
                "held-out ones; turn on dedup.near, raise heldout.common_documents for boilerplate, or raise this"
            )
            faults.append(("heldout.max_overlap_share", message))
    if faults:
        raise DataError(faults)


class HeldoutIndex:
    """The runs of words of held-out text, to ask whether another text shares one; 8 bytes a run.

    For text that arrives one by one: unlike ``find_overlap`` it cannot know what is boilerplate, so that any shared run
    counts.
    """

    def __init__(self, ngram: int, texts: Iterable[str]) -> None:
        self._runs = WordRuns(ngram)
        known = [self._runs.of(text) for text in texts]
        self._index = np.unique(np.concatenate(known)) if known else np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self._index)

    def overlaps(self, text: str) -> bool:
        """Whether ``text`` shares a run of words with held-out text."""
        return bool(len(self._index)) and self._runs.any_of(text, self._index)

    def shared(self, text: str) -> str:
        """The words that ``text`` shares with held-out text; empty where it shares none."""
        found = self._runs.shared(text, self._index)
        return self._runs.spell(text, int(found[0])) if len(found) else ""


def find_overlap(
    heldout: Iterable[tuple[str, str]], train: Iterable[tuple[str, str]], config: HeldoutConfig
) -> dict[str, str]:
    """Training documents that share ``config.ngram`` consecutive words with a held-out one, by id, with those words.

    Both iterables yield (id, text). Words are compared without case and signs. A document of fewer words is compared as
    a whole. Runs of words that more than ``config.common_documents`` training documents hold are boilerplate and do not
    count, as in the overlap analysis of Brown et al. 2020 (appendix C).
    """
    runs = WordRuns(config.ngram)
    known = [runs.of(text) for _, text in heldout]
    index = np.unique(np.concatenate(known)) if known else np.empty(0, np.uint64)
    hits: dict[str, tuple[Array, str]] = {}
    for one, text in train:
        if len(shared := runs.shared(text, index)):
            hits[one] = shared, text
    return _not_boilerplate(hits, runs, config.common_documents)


def _not_boilerplate(hits: dict[str, tuple[Array, str]], runs: WordRuns, common: int) -> dict[str, str]:
    """Removing a document makes its runs rarer, so the count is repeated over those that stay until it is stable."""
    removed: dict[str, str] = {}
    while True:
        counts = Counter(run for shared, _ in hits.values() for run in shared.tolist())
        rare = {
            one: next(run for run in shared.tolist() if counts[run] <= common)
            for one, (shared, _) in hits.items()
            if any(counts[run] <= common for run in shared.tolist())
        }
        if not rare:
            return removed
        for one, run in rare.items():
            removed[one] = runs.spell(hits.pop(one)[1], run)
