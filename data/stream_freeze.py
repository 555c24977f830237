"""The tokens artifact of a stream: its held-out set, frozen, and what a run needs to read the rest; no training token.

A stream's held-out documents are those whose hash lies in the held-out share. The first of them that each source yields
are frozen and measured; none of them, however late it comes, is ever trained on.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.clean_decontaminate import ContaminationIndex
from data.documents import SourceError
from data.encode_parts import write_json
from data.encoding import Encoder
from data.errors import DataError
from data.hub import HubError
from data.shards import HELDOUT, TRAIN, ShardWriter, read_info
from data.source_config import FilesSource, HubSource
from data.sources import source_revision
from data.stream import CONTAMINATION_FILE, STREAM_FILE
from data.stream_config import StreamSettings
from data.stream_reader import Document, is_held_out, open_stream, raw_document, rows_of, usable
from data.tokenize_corpus import check_specials_trained, describe

if TYPE_CHECKING:
    from datasets import IterableDataset

FORMAT = 1
_READ = ""
"""Where the documents that were read are counted; no set has this name."""


def freeze_stream(
    settings: StreamSettings,
    tokenizer_dir: Path,
    output: Path,
    *,
    seed: int,
    heldout_documents: int,
    sample_documents: int,
    min_special_count: int,
    contamination: ContaminationIndex | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the artifact into ``output``; returns the facts of ``tokens.json``.

    Args:
        heldout_documents: frozen of each source, fewer where it holds fewer.
        sample_documents: of each source, whose tokens give the unigram yardstick.
        contamination: what no document may hold, be it to train on or to measure with.
        min_special_count: fewest occurrences of each special among them (TRAPS T8).

    Raises:
        DataError: if a source yields no document to hold out or to train on, or a special occurs too rarely.
    """
    encoder = Encoder(tokenizer_dir, seed=seed, chat_share=settings.chat_share)
    counts = np.zeros(encoder.vocab_size, dtype=np.int64)
    shared, known = dict[str, int](), set[str]()
    entries, found, index = [], Counter[str](), contamination or ContaminationIndex([], {})
    for source in settings.sources:
        documents = _clean(_documents(source, cache), index, found)
        held, sample = _first(source, documents, settings.heldout_share, heldout_documents, sample_documents)
        say(f"source {source.name}: {len(held)} documents held out, {len(sample)} sampled")
        own = {str(document["id"]) for document in (*held, *sample)}
        shared[source.name], known = len(own & known), known | own
        for ids in encoder.encode(sample, chat=True):
            counts += np.bincount(ids, minlength=encoder.vocab_size)
        entry = {"name": source.name, "language": source.language, "domain": source.domain}
        entries.append(entry | {TRAIN: _write(encoder, output, TRAIN, source.name, [])})
        entries[-1][HELDOUT] = _write(encoder, output, HELDOUT, source.name, held)
    shutil.copytree(tokenizer_dir, output / "tokenizer", dirs_exist_ok=True)
    facts = describe(encoder, output, entries)
    facts["special_token_counts"] = {name: int(counts[token]) for name, token in encoder.specials.items()}
    check_specials_trained(facts["special_token_counts"], min_special_count)
    np.save(output / "unigram.npy", counts)
    if index.lengths:
        index.save(output / CONTAMINATION_FILE)
    facts["read_documents"], facts["shared_documents"] = found[_READ], shared
    sets = [vars(one) | {"removed_documents": found[one.name]} for one in index.facts]
    facts["decontamination"] = {"lengths": sorted(index.lengths), "sets": sets}
    revisions = {source.name: source_revision(source) for source in settings.sources}
    content = {"format": FORMAT, "seed": seed, "revisions": revisions, "settings": settings.model_dump(mode="json")}
    write_json(output / STREAM_FILE, content)
    write_json(output / "tokens.json", facts)
    read_info(output)
    return facts


def _clean(documents: Iterable[Document], index: ContaminationIndex, found: Counter[str]) -> Iterator[Document]:
    """The documents that hold no item; ``found`` counts those that were read, and the others by the set."""
    for document in documents:
        found[_READ] += 1
        if hit := index.find(str(document["text"])):
            found[hit[0]] += 1
        else:
            yield document


def _first(
    source: FilesSource | HubSource,
    documents: Iterable[Document],
    share: float,
    heldout_documents: int,
    sample_documents: int,
) -> tuple[list[Document], list[Document]]:
    """The first held-out and the first other documents of a source; equal ones count once."""
    held: dict[str, Document] = {}
    sample: dict[str, Document] = {}
    for document in documents:
        chosen, most = (held, heldout_documents) if is_held_out(document, share) else (sample, sample_documents)
        if len(chosen) < most:
            chosen.setdefault(str(document["id"]), document)
        if len(held) >= heldout_documents and len(sample) >= sample_documents:
            break
    if not held or not sample:
        raise DataError(
            f"source {source.name} must yield a document to hold out and one to train on; got {len(held)} and "
            f"{len(sample)}; give it more text, or raise heldout_share {share:g}"
        )
    return list(held.values()), list(sample.values())


def _opened(source: FilesSource | HubSource, cache: Path | None) -> IterableDataset:
    try:
        return open_stream(source, cache)
    except HubError as error:
        raise SourceError(source.name, error.field, str(error)) from error


def _documents(source: FilesSource | HubSource, cache: Path | None) -> Iterator[Document]:
    limit = source.max_documents if isinstance(source, HubSource) else None
    for number, row in enumerate(rows_of(source, _opened(source, cache))):
        if limit is not None and number >= limit:
            return
        document = usable(source, raw_document(source, row, number))
        if not isinstance(document, str):
            yield document


def _write(encoder: Encoder, output: Path, split: str, name: str, documents: list[Document]) -> dict[str, Any]:
    with ShardWriter(output, split, name, encoder.dtype) as writer:
        for document, ids in zip(documents, encoder.encode(documents, chat=False), strict=True):
            writer.append(str(document["id"]), ids, encoder.text_bytes(ids))
    return writer.facts()
