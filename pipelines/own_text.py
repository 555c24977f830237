"""``--data DIR``: one's own text in place of the recipe's, wherever the recipe draws on what ``clean`` made."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from pipelines.document import Document
from stages.base import Fault

if TYPE_CHECKING:
    from data.own_text import OwnText

FLAG = "--data"
HELD_OUT = 20
"""Documents of a source that ``clean`` holds out at least, where its configuration says nothing else."""


def use_own_text(document: Document, data: Path) -> None:
    """Give every ``clean`` stage the text in ``data``, and every ``messages`` stage what it can draw from that.

    Passages to name the language of are taken from one's own text; questions about titles are left out, since the
    title of a file is its path. What cannot be done is added to the document's faults.
    """
    from data.own_text import read_directory
    from data.sources import SourceError

    sections = document.data.get("stages")
    found = {name: raw for name, raw in sections.items() if isinstance(raw, dict)} if isinstance(sections, dict) else {}
    cleaning = [name for name, raw in found.items() if raw.get("kind") == "clean"]
    if not cleaning:
        document.faults.append(((FLAG,), Fault(FLAG, "needs a stage of kind clean; the recipe has none")))
    try:
        own = read_directory(data)
    except (SourceError, OSError) as error:
        document.faults.append(((FLAG,), Fault(FLAG, str(error))))
        return
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(f"{FLAG}: {line}" for line in own.lines(data)), file=sys.stderr)
    document.faults += [((FLAG,), Fault(FLAG, message)) for message in _too_little(found, own)]
    sources = own.sources
    for name in cleaning:
        _replace(document, name, sources)
    for name, raw in found.items():
        if raw.get("kind") == "messages" and isinstance(raw.get("sources"), list):
            _replace(document, name, _conversations(raw["sources"], sources))
            if not any(source.get("type") == "corpus" for source in raw["sources"] if isinstance(source, dict)):
                raw.pop("corpus", None)


def _too_little(stages: Mapping[str, Mapping[str, Any]], own: OwnText) -> list[str]:
    """What the recipe's stages would find out late: text that certainly does not suffice."""
    if own.documents is None:
        return []
    found = [_too_few_documents(name, raw, own.documents) for name, raw in stages.items()]
    found += [_too_few_bytes(name, raw, own.text_bytes) for name, raw in stages.items()]
    return [message for message in found if message]


def _too_few_documents(name: str, raw: Mapping[str, Any], documents: Mapping[str, int]) -> str | None:
    """A ``tokenize`` stage wants every chat special some times, in the share of documents that are told as a chat."""
    share, least = raw.get("chat_share", 0.02), raw.get("min_special_count", 8)
    if raw.get("kind") != "tokenize" or not (_is_number(share) and _is_number(least) and 0 < share <= 1):
        return None
    # Half of a small source is held out. A chat has two turns; half of the expected number may still turn up.
    left = sum(number - min(HELD_OUT, number // 2) for number in documents.values())
    if left >= max(least, least / (4 * share)):
        return None
    return (
        f"must hold more documents: {name} needs {least} of each chat special in the {share:g} of documents that are "
        f"told as a chat; got {sum(documents.values())} documents; add files (one document each, a lone one is split "
        f"at blank lines), set {name}.chat_share={min(1.0, max(share, least / max(1, left))):.2g} or more, or lower "
        f"{name}.min_special_count"
    )


def _too_few_bytes(name: str, raw: Mapping[str, Any], text_bytes: int) -> str | None:
    """A ``pretrain`` stage reads no text more than ``max_epochs`` times; a token is a byte at least."""
    asked = [raw.get(field) for field in ("max_steps", "global_batch_size", "seq_len")] + [raw.get("max_epochs", 4.0)]
    numbers = [number for number in asked if _is_number(number) and number > 0]
    if raw.get("kind") != "pretrain" or len(numbers) < len(asked):
        # What is no number is refused by itself.
        return None
    steps, rows, length, epochs = *map(int, numbers[:3]), float(numbers[3])
    needed = int(steps * rows * length / epochs)
    if text_bytes >= needed:
        return None
    most = int(text_bytes * epochs / (rows * length))
    return (
        f"must hold more text: the {steps} steps of {name} ({rows} x {length} tokens each) read at least {needed:,} "
        f"bytes at {epochs:g} passes; got {text_bytes:,}; add text, set {name}.max_steps={max(1, most // 4)} or so, or "
        f"raise {name}.max_epochs"
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _replace(document: Document, stage: str, sources: list[Any]) -> None:
    document.data["stages"][stage]["sources"] = sources
    document.overridden.add(("stages", stage, "sources"))


def _conversations(asked: list[Any], own: list[dict[str, Any]]) -> list[Any]:
    """The sources of a ``messages`` stage, those that draw on a corpus made anew from one's own text."""
    drawn = [source for source in asked if isinstance(source, dict) and source.get("type") == "corpus"]
    patterns = [source for source in drawn if source.get("turns") == "language"]
    # The last one stands for all: those of a recipe differ in how many passages its own documents give.
    return [source for source in asked if source not in drawn] + [
        {**patterns[-1], **{key: text[key] for key in ("language", "licence")}, "name": f"{text['name'][:54]}-passages"}
        | {"corpus_source": text["name"]}
        for text in own
        if patterns
    ]
