"""Conversations in OpenAI's messages format, read and rendered as token ids with the assistant's words as labels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from data.chat import render
from data.errors import DataError
from data.packing import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverLength = Literal["drop", "truncate"]


class Conversation(NamedTuple):
    """One conversation in ids. ``labels`` equals ``ids`` where the assistant speaks, its ``<|im_end|>`` included.

    Conversations of one ``family`` (a document's passages) are not independent of each other.
    """

    id: str
    language: str
    ids: list[int]
    labels: list[int]
    family: str


@dataclasses.dataclass
class Counts:
    """What became of the rows of one file."""

    rows: int = 0
    conversations: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    over_length: int = 0
    """Conversations longer than the limit, dropped or truncated by the policy."""
    unsupervised: int = 0
    """Conversations without any token of the assistant's (within the limit), left out."""

    @property
    def line(self) -> str:
        """All counts in one line."""
        return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in dataclasses.asdict(self).items())


def read_conversations(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, over_length: OverLength
) -> tuple[list[Conversation], Counts]:
    """Every row of a JSONL file of ``{"id", "messages", "language", "family"}``, rendered by the tokenizer's template.

    A conversation of more than ``max_length`` tokens is left out (``drop``) or loses its end (``truncate``); one in
    which nothing is then to be learnt is left out. All are counted.

    Raises:
        DataError: for a row that is no conversation, naming its line; for a file in which nothing is to be learnt.
    """
    kept, counts = [], Counts()
    for number, row in _rows(path):
        counts.rows += 1
        try:
            rendered = render(tokenizer, row["messages"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path.name} line {number} must be a conversation; {error}; correct it") from error
        ids, mask = rendered.ids, rendered.assistant_mask
        if len(ids) > max_length:
            counts.over_length += 1
            if over_length == "drop":
                continue
            ids, mask = ids[:max_length], mask[:max_length]
        # Nothing comes before the first token, so it cannot be predicted.
        labels = [
            token if flag and place else IGNORE_INDEX for place, (token, flag) in enumerate(zip(ids, mask, strict=True))
        ]
        supervised = sum(label != IGNORE_INDEX for label in labels)
        if not supervised:
            counts.unsupervised += 1
            continue
        counts.conversations += 1
        counts.tokens += len(ids)
        counts.supervised_tokens += supervised
        name = str(row.get("id", number))
        kept.append(Conversation(name, str(row.get("language", "")), ids, labels, str(row.get("family", name))))
    if not kept:
        raise DataError(
            f"{path.name} must hold a token of the assistant's to learn from within max_length {max_length}; got none "
            f"({counts.line}); raise max_length, or look at the messages"
        )
    return kept, counts


def scored_hash(conversations: Iterable[Conversation]) -> str:
    """SHA-256 of ids and labels, in order: the name of what is scored, which a limit of length changes (TRAPS M3)."""
    content = [(conversation.ids, conversation.labels) for conversation in conversations]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"{path.name} line {number} must be a JSON object; got {error}; correct it") from error
