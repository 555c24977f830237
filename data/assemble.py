"""From cleaned shards to a corpus: the split, the files, and a report that accounts for every document read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data.clean_page import funnel_page
from data.corpus import SPLITS, DocumentWriter, document_id, write_description
from data.heldout_split import Split, split_documents
from data.source_config import HeldoutConfig, Source

FORMAT = 2
SAMPLES = 3
SAMPLE_CHARACTERS = 300
OVERLAP_RULE = "heldout_overlap"

Rows = Callable[[Path], Iterator[dict[str, Any]]]


@dataclasses.dataclass
class Tally:
    """Documents and UTF-8 bytes."""

    documents: int = 0
    bytes: int = 0

    def add(self, row: dict[str, Any]) -> None:
        """Count one document; of one that could not be used, the bytes that were read in its place."""
        self.documents += 1
        self.bytes += row["metadata"].get("bytes") or len(row["text"].encode())


@dataclasses.dataclass
class Edits:
    """Documents that an edit changed, and how many changes it made."""

    documents: int = 0
    edits: int = 0


class Funnel:
    """What came in, what each rule dropped or altered and what stayed, by source, with samples."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.read: dict[str, Tally] = {source.name: Tally() for source in sources}
        self.kept: dict[str, dict[str, Tally]] = {source.name: {name: Tally() for name in SPLITS} for source in sources}
        self.dropped: dict[str, dict[str, Tally]] = {source.name: defaultdict(Tally) for source in sources}
        self.altered: dict[str, dict[str, Edits]] = {source.name: defaultdict(Edits) for source in sources}
        self.samples: list[dict[str, str]] = []
        self.altered_samples: list[dict[str, str]] = []

    def alter(self, row: dict[str, Any]) -> None:
        """Count the edits of a document, whether it stays or not; the first few of a source and rule are shown."""
        source, metadata = row["metadata"]["source"], row["metadata"]
        for rule, count in metadata.get("edits", {}).items():
            edits = self.altered[source][rule]
            edits.documents += 1
            edits.edits += count
            if edits.documents <= SAMPLES and (text := metadata["excerpts"].get(rule)):
                sample = {"source": source, "rule": rule, "origin": metadata["origin"], "text": text}
                self.altered_samples.append(sample)

    def drop(self, row: dict[str, Any], rule: str, detail: str = "") -> None:
        """Count a dropped document; the first few of a source and rule are shown."""
        source = row["metadata"]["source"]
        tally = self.dropped[source][rule]
        tally.add(row)
        if tally.documents <= SAMPLES:
            sample = {"source": source, "rule": rule, "origin": row["metadata"]["origin"]}
            sample["text"] = row["text"][:SAMPLE_CHARACTERS]
            self.samples.append(sample | ({"detail": detail} if detail else {}))

    def unaccounted(self) -> dict[str, int]:
        """Documents read less those kept and dropped, where that is not zero: our own mistake."""
        missing = {}
        for name, read in self.read.items():
            known = [*self.kept[name].values(), *self.dropped[name].values()]
            if difference := read.documents - sum(tally.documents for tally in known):
                missing[name] = difference
        return missing

    def report(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The content of ``report.json``; ``facts`` say what was decontaminated and how the classifier was chosen."""
        rows = [
            {
                "source": name,
                "read": dataclasses.asdict(read),
                "altered": _plain(self.altered[name]),
                "dropped": _plain(self.dropped[name]),
                **{split: dataclasses.asdict(tally) for split, tally in self.kept[name].items()},
            }
            for name, read in self.read.items()
        ]
        samples = {"samples": self.samples, "altered_samples": self.altered_samples}
        return {"format": FORMAT, "funnel": rows, **facts, **samples}


def _plain(counts: Mapping[str, Tally | Edits]) -> dict[str, dict[str, int]]:
    return {rule: dataclasses.asdict(one) for rule, one in sorted(counts.items())}


def write_corpus(
    sources: Sequence[Source],
    config: HeldoutConfig,
    read_rows: Rows,
    folders: tuple[Path, Path, Sequence[Path]],
    facts: Mapping[str, Any],
    output: Path,
) -> list[dict[str, Any]]:
    """Split the surviving documents and write the corpus with its report; what ``corpus.json`` says of each source.

    ``folders`` holds the raw shards, the surviving shards and the folders of dropped documents; ``read_rows`` reads one
    shard; ``facts`` go into the report as they are. The result is the list that ``data.corpus.sources`` gives back.
    """
    raw, survivors, dropped = folders
    funnel = Funnel(sources)
    for row in _rows(raw, read_rows):
        funnel.read[row["metadata"]["source"]].add(row)
    for folder in dropped:
        for row in _rows(folder, read_rows):
            metadata = row["metadata"]
            funnel.alter(row)
            reason = metadata.get("filter_reason") or f"duplicate_{folder.name}"
            funnel.drop(row, reason, metadata.get("detail", ""))

    def documents() -> Iterator[tuple[str, str, str]]:
        for row in _rows(survivors, read_rows):
            yield row["metadata"]["source"], document_id(row["text"]), row["text"]

    split = split_documents(documents, config)
    _write_documents(sources, split, _rows(survivors, read_rows), funnel, output)
    assert not funnel.unaccounted(), f"documents unaccounted for by source: {funnel.unaccounted()}"
    report = funnel.report(facts)
    (output / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (output / "funnel.html").write_text(funnel_page(report), encoding="utf-8")
    described = [_describe(source, funnel) for source in sources]
    digest = hashlib.sha256("\n".join(sorted(split.heldout)).encode()).hexdigest()
    write_description(output, described, heldout_digest=digest, heldout=config.model_dump())
    return described


def _rows(folder: Path, read_rows: Rows) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl")):
        yield from read_rows(path)


def _write_documents(
    sources: Sequence[Source], split: Split, rows: Iterator[dict[str, Any]], funnel: Funnel, output: Path
) -> None:
    """Append each surviving row to its source's file of its side."""
    languages = {source.name: source.language for source in sources}
    with ExitStack() as stack:
        writers = {
            (source.name, side): stack.enter_context(DocumentWriter(output / side / f"{source.name}.jsonl.gz"))
            for source in sources
            for side in SPLITS
        }
        for row in rows:
            funnel.alter(row)
            name, one = row["metadata"]["source"], document_id(row["text"])
            if shared := split.overlapping.get(one):
                funnel.drop(row, OVERLAP_RULE, shared)
                continue
            side = "heldout" if one in split.heldout else "train"
            title = row["metadata"].get("title")
            writers[name, side].write(
                {"id": one, "text": row["text"], "source": name, "language": languages[name], "title": title}
            )
            funnel.kept[name][side].add(row)


def _describe(source: Source, funnel: Funnel) -> dict[str, Any]:
    return {
        "name": source.name,
        "language": source.language,
        "domain": source.domain,
        "licence": source.licence,
        **{side: dataclasses.asdict(tally) for side, tally in funnel.kept[source.name].items()},
        "dropped": {rule: tally.documents for rule, tally in sorted(funnel.dropped[source.name].items())},
    }
