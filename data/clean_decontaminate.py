"""Documents that hold an evaluation item are removed before anything is split or trained on (TRAPS M4).

A document is contaminated by a set when it shares ``ngram`` consecutive words with one of its items, case and signs
aside (Brown et al. 2020, appendix C, use 13). A shorter item of at least ``min_words`` words counts when the document
holds all of it in sequence. Shorter ones ("What is 3 + 4?", "The capital of France is Paris") are not looked for: any
text may hold them, and a model can know only what some text says. How many those are is part of the report.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.clean_config import DecontaminateConfig, EvaluationFile
from data.compressed import MAX_ROW_BYTES, UnreadableFile, bounded_lines
from data.errors import DataError
from data.rows import MissingField, lookup
from data.words import Array, WordRuns, words

STAGE_SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tasks": ("heldout.jsonl", ("prompt",)),
    "facts": ("facts.jsonl", ("prompt", "correct")),
    "preferences": ("heldout.jsonl", ("prompt",)),
    "messages": ("heldout.jsonl", ("messages",)),
    "problems": ("problems.jsonl", ("prompt", "solution")),
}
"""What each kind of set is read from: file of the artifact, and the fields of a row that hold text."""
JOINED = frozenset({"facts"})
"""Sets whose fields make one sentence together."""
_ROLE_KEYS = frozenset({"role", "name"})


@dataclasses.dataclass
class SetFacts:
    """One evaluation set: its items, and those too short to be looked for."""

    name: str
    items: int = 0
    unchecked_items: int = 0


class ContaminationIndex:
    """Runs of words of evaluation sets by their length, and the set that each came from first.

    ``lengths`` maps a number of words to (hashes, sets): sorted uint64, and the number of each hash's set.
    """

    def __init__(self, facts: list[SetFacts], lengths: Mapping[int, tuple[Array, Array]]) -> None:
        self.facts = facts
        self.lengths = {length: found for length, found in lengths.items() if len(found[0])}
        self._runs = WordRuns(max(self.lengths, default=1))

    def find(self, text: str) -> tuple[str, str] | None:
        """The set that contaminates ``text``, and the words that they share; None for a clean text."""
        if not self.lengths:
            return None
        runs = self._runs.by_length(text, sorted(self.lengths))
        for length in sorted(self.lengths, reverse=True):
            hashes, sets = self.lengths[length]
            places = np.minimum(np.searchsorted(hashes, runs[length]), len(hashes) - 1)
            hits = np.flatnonzero(hashes[places] == runs[length])
            if len(hits):
                start = int(hits[0])
                shared = words(text.casefold())[start : start + length]
                return self.facts[int(sets[places[start]])].name, " ".join(shared)
        return None

    def save(self, path: Path) -> None:
        """Write the index, to be read by workers."""
        arrays: dict[str, Any] = {"facts": np.frombuffer(json.dumps(list(map(vars, self.facts))).encode(), np.uint8)}
        for length, (hashes, sets) in self.lengths.items():
            arrays |= {f"h_{length}": hashes, f"s_{length}": sets}
        with path.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> ContaminationIndex:
        """The index that ``save`` wrote."""
        with np.load(path) as file:
            facts = [SetFacts(**one) for one in json.loads(file["facts"].tobytes())]
            lengths = {int(name[2:]): (file[name], file[f"s{name[1:]}"]) for name in file.files if name[:2] == "h_"}
        return cls(facts, lengths)


def build_index(config: DecontaminateConfig, sets: Mapping[str, Iterator[list[str]]]) -> ContaminationIndex:
    """The index of ``sets``, each an iterator of items, each item the texts of which one is enough."""
    facts: list[SetFacts] = []
    found: dict[int, list[tuple[Array, int]]] = {n: [] for n in range(config.min_words, config.ngram + 1)}
    runs = WordRuns(config.ngram)
    for number, (name, items) in enumerate(sets.items()):
        facts.append(SetFacts(name))
        for texts in items:
            facts[number].items += 1
            lengths = [(text, min(len(words(text)), config.ngram)) for text in texts]
            checked = [(text, length) for text, length in lengths if length >= config.min_words]
            facts[number].unchecked_items += not checked
            for text, length in checked:
                found[length].append((runs.by_length(text, [length])[length], number))
    return ContaminationIndex(facts, {length: _sorted(parts) for length, parts in found.items()})


def _sorted(parts: list[tuple[Array, int]]) -> tuple[Array, Array]:
    if not parts:
        return np.empty(0, np.uint64), np.empty(0, np.uint16)
    hashes, first = np.unique(np.concatenate([hashes for hashes, _ in parts]), return_index=True)
    sets = np.concatenate([np.full(len(hashes), number, np.uint16) for hashes, number in parts])
    return hashes, sets[first]


def evaluation_sets(parents: Mapping[str, Path], files: Sequence[EvaluationFile]) -> dict[str, Iterator[list[str]]]:
    """Items by set: of the stages' outputs by the input's field, then of the files by their names."""
    sets = {kind: _stage_items(kind, folder) for kind, folder in parents.items()}
    return sets | {file.name: file_items(file, f"decontaminate.files.{i}") for i, file in enumerate(files)}


def _stage_items(kind: str, folder: Path) -> Iterator[list[str]]:
    name, fields = STAGE_SETS[kind]
    with (folder / name).open(encoding="utf-8") as lines:
        for line in lines:
            texts = [text for field in fields for text in texts_in(json.loads(line).get(field))]
            yield [" ".join(texts)] if kind in JOINED else texts


def texts_in(value: Any) -> Iterator[str]:
    """All texts of a value: itself, or those that it holds at any depth; the roles of messages are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from () if key in _ROLE_KEYS else texts_in(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from texts_in(inner)


def file_items(file: EvaluationFile, field: str) -> Iterator[list[str]]:
    """Items of one JSONL file; a row that is none, or lacks a field, is a ``DataError`` with file and line."""
    path = Path(file.path)
    try:
        for number, line in enumerate(bounded_lines(path, MAX_ROW_BYTES), start=1):
            if line.content is None or line.content.strip():
                yield _row_texts(file, line.content, f"{path.name}:{number}", field)
    except UnreadableFile as error:
        raise DataError([(f"{field}.path", f"must be readable to its end; got {path}: {error}; restore it")]) from error


def _row_texts(file: EvaluationFile, content: bytes | None, where: str, field: str) -> list[str]:
    try:
        row = json.loads(content or b"")
        if not isinstance(row, Mapping):
            raise ValueError
        return [text for name in file.fields for text in texts_in(lookup(row, name))]
    except MissingField as missing:
        got = f"{missing.args[0]!r}, which {where} lacks; it has: {', '.join(sorted(row))}"
        raise DataError([(f"{field}.fields", f"must name fields of every row; got {got}; mend it")]) from None
    except ValueError:
        raise DataError([(f"{field}.path", f"must hold a JSON object a line; got {where}; mend it")]) from None
