"""The messages artifact: conversations in OpenAI's form, split into train and held-out by their first question.

Layout (the ``output/`` folder of a finished ``messages`` stage)::

    train.jsonl   heldout.jsonl   left_out.jsonl   messages.json

A row is ``{"id": hex, "family": hex, "messages": [{"role", "content"}], "source": str, "language": str}``; ``id`` is
the first 32 hex digits of the SHA-256 of its messages, ``family`` the same for rows that are not independent of each
other (one question's, or one document's passages). ``left_out.jsonl`` names each row that was not taken, with its rule
and origin.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.heldout_split import choose_heldout
from data.messages_config import MessagesHeldout, MessagesSource
from data.messages_rules import RULES, Message, MessagesFault
from data.messages_sources import RESERVE, Read, read_conversations
from data.source_config import HeldoutConfig

SPLITS = ("train", "heldout")
FORMAT = 1
INFO_FILE = "messages.json"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One kept row; rows of one ``question`` (its hash) share a side, ``side`` its split, or reserve, where given."""

    id: str
    question: str
    messages: list[Message]
    source: str
    language: str
    origin: str
    side: str | None = None

    def row(self) -> dict[str, Any]:
        """The row as it is written."""
        plain = {"id": self.id, "family": self.question, "messages": self.messages}
        return {**plain, "source": self.source, "language": self.language}


@dataclasses.dataclass(frozen=True)
class TaskSides:
    """Questions of the tasks by the side on which they stand there, as ``question_id``."""

    train: frozenset[str] = frozenset()
    heldout: frozenset[str] = frozenset()

    def placed(self, row: Conversation) -> Conversation:
        """``row`` on the side of its question: whoever trains on tasks trains on nothing that is measured here."""
        if row.question in self.train:
            return dataclasses.replace(row, side="train")
        side = "heldout" if row.question in self.heldout and row.side != RESERVE else row.side
        return dataclasses.replace(row, side=side)


NO_TASKS = TaskSides()


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """One row that was not taken."""

    source: str
    origin: str
    fault: MessagesFault


def read_messages(directory: Path | str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of ``split`` (``"train"`` or ``"heldout"``) of a messages artifact, in the order of the recipe's sources.

    Raises:
        ValueError: for another split, or a folder that is no messages artifact.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    path = Path(directory) / f"{split}.jsonl"
    if not path.is_file():
        raise ValueError(f"{directory} must be a messages artifact; {path.name} is missing; run the messages stage")
    with path.open("rb") as lines:
        for line in lines:
            yield json.loads(line)


def messages_info(directory: Path | str) -> dict[str, Any]:
    """What ``messages.json`` says: ``sources``, ``languages``, ``heldout_hash``."""
    return dict(json.loads((Path(directory) / INFO_FILE).read_text(encoding="utf-8")))


def conversation_id(messages: Iterable[Message]) -> str:
    """The first 32 hex digits of the SHA-256 of the messages as compact JSON."""
    plain = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()[:32]


def question_id(messages: Iterable[Message]) -> str:
    """Hash of the first user message without regard to case and spaces: equal questions stay on one side."""
    question = next(message["content"] for message in messages if message["role"] == "user")
    return hashlib.sha256(" ".join(question.casefold().split()).encode()).hexdigest()[:32]


def task_sides(tasks: Path) -> TaskSides:
    """The questions of a ``tasks`` artifact's output."""
    found = {}
    for side in SPLITS:
        with (tasks / f"{side}.jsonl").open("rb") as lines:
            found[side] = frozenset(question_id(json.loads(line)["prompt"]) for line in lines)
    return TaskSides(found["train"], found["heldout"])


def gather(
    sources: Iterable[MessagesSource],
    cache: Path,
    parents: Mapping[str, Path],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Conversation], list[LeftOut]]:
    """All conversations, exact duplicates left out (that of the earlier source stays), and what was left out."""
    kept: dict[str, Conversation] = {}
    left_out: list[LeftOut] = []
    for source in sources:
        mine: list[Conversation] = []
        for read in read_conversations(source, cache, parents, say):
            if read.messages is None:
                assert read.fault is not None, "a row is a conversation or a fault"
                left_out.append(LeftOut(source.name, read.origin, read.fault))
                continue
            conversation = _conversation(source, read, read.messages)
            if conversation.id in kept:
                fault = MessagesFault("duplicate", f"that of {kept[conversation.id].origin}")
                left_out.append(LeftOut(source.name, read.origin, fault))
            else:
                kept[conversation.id] = conversation
                mine.append(conversation)
        for conversation in _beyond(mine, source.max_rows):
            del kept[conversation.id]
            left_out.append(LeftOut(source.name, conversation.origin, MessagesFault("beyond_max_rows")))
    return list(kept.values()), left_out


def split(
    conversations: list[Conversation], config: MessagesHeldout, tasks: TaskSides = NO_TASKS
) -> tuple[dict[str, list[Conversation]], list[LeftOut]]:
    """Rows by split, and those left out: training rows that ask what a held-out one asks (TRAPS M4), reserves.

    A row whose origin decides its side keeps it, and a question of ``tasks`` stands where it stands there: GRPO trains
    on all of their training side, ``reasoning`` asks all of the other. Of the rest each source gives its questions
    with the lowest hashes.
    """
    conversations = [tasks.placed(row) for row in conversations]
    spare = _spare(conversations, config)
    conversations = [row for row in conversations if row.id not in spare]
    questions: dict[str, set[str]] = {}
    for row in conversations:
        if row.side is None:
            questions.setdefault(row.source, set()).add(row.question)
    heldout = choose_heldout(questions, HeldoutConfig(share=config.share, min_documents=config.min_questions))
    heldout |= {row.question for row in conversations if row.side in ("heldout", RESERVE)}
    sides: dict[str, list[Conversation]] = {name: [] for name in SPLITS}
    left_out = [LeftOut(row.source, row.origin, MessagesFault("beyond_heldout_share")) for row in spare.values()]
    for row in conversations:
        if row.question in heldout and row.side == "train":
            left_out.append(LeftOut(row.source, row.origin, MessagesFault("heldout_question")))
        else:
            sides["heldout" if row.question in heldout else "train"].append(row)
    return sides, left_out


def _spare(conversations: Iterable[Conversation], config: MessagesHeldout) -> dict[str, Conversation]:
    """Reserves, by id, beyond the share of their source that is held out; those with the lowest hashes are taken."""
    reserves: dict[str, list[Conversation]] = {}
    trained: Counter[str] = Counter()
    for row in conversations:
        if row.side == RESERVE:
            reserves.setdefault(row.source, []).append(row)
        trained[row.source] += row.side == "train"
    spare = {}
    for source, rows in reserves.items():
        # So that they are this share of the source's rows on both sides.
        wanted = round(trained[source] * config.share / (1 - config.share))
        beyond = sorted(rows, key=lambda row: row.id)[max(config.min_questions, wanted) :]
        spare.update({row.id: row for row in beyond})
    return spare


def write(
    directory: Path,
    sources: list[MessagesSource],
    sides: Mapping[str, list[Conversation]],
    left_out: list[LeftOut],
) -> dict[str, Any]:
    """Write the artifact; returns the content of ``messages.json``. Equal input gives equal bytes."""
    for name, rows in sides.items():
        _write_lines(directory / f"{name}.jsonl", (row.row() for row in rows))
    reasons = ({"source": x.source, "rule": x.fault.rule, "origin": x.origin, "why": str(x.fault)} for x in left_out)
    _write_lines(directory / "left_out.jsonl", reasons)
    languages = sorted({source.language for source in sources})
    info = {
        "format": FORMAT,
        "sources": [_described(source, sides, left_out) for source in sources],
        "languages": {
            language: {name: sum(row.language == language for row in rows) for name, rows in sides.items()}
            for language in languages
        },
        "rules": {name: RULES[name] for name in sorted({x.fault.rule for x in left_out})},
        "heldout_hash": hashlib.sha256((directory / "heldout.jsonl").read_bytes()).hexdigest(),
    }
    text = json.dumps(info, ensure_ascii=False, indent=1, sort_keys=True)
    (directory / INFO_FILE).write_text(text + "\n", encoding="utf-8")
    return info


def _conversation(source: MessagesSource, read: Read, messages: list[Message]) -> Conversation:
    return Conversation(
        conversation_id(messages),
        read.group or question_id(messages),
        messages,
        source.name,
        source.language,
        read.origin,
        read.side,
    )


def _beyond(conversations: list[Conversation], max_rows: int | None) -> list[Conversation]:
    """Those with the highest hashes beyond ``max_rows``; reserves are thinned by the split."""
    mine = [row for row in conversations if row.side != RESERVE]
    return [] if max_rows is None else sorted(mine, key=lambda row: row.id)[max_rows:]


def _described(
    source: MessagesSource, sides: Mapping[str, list[Conversation]], left_out: list[LeftOut]
) -> dict[str, Any]:
    dropped = Counter(x.fault.rule for x in left_out if x.source == source.name)
    counts = {name: _counts([row for row in rows if row.source == source.name]) for name, rows in sides.items()}
    facts = {"name": source.name, "type": source.type, "language": source.language, "licence": source.licence}
    return {**facts, **counts, "left_out": dict(sorted(dropped.items()))}


def _counts(rows: list[Conversation]) -> dict[str, int]:
    assistant = [m["content"] for row in rows for m in row.messages if m["role"] == "assistant"]
    return {
        "rows": len(rows),
        "assistant_turns": len(assistant),
        "assistant_bytes": sum(len(content.encode()) for content in assistant),
    }


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
