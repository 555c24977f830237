"""``--data DIR``: one's own text in place of the recipe's, wherever the recipe draws on what ``clean`` made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.document import Document
from stages.base import Fault

FLAG = "--data"


def use_own_text(document: Document, data: Path) -> None:
    """Give every ``clean`` stage the text in ``data``, and every ``messages`` stage what it can draw from that.

    Passages to name the language of are taken from one's own text; questions about titles are left out, since the
    title of a file is its path. What cannot be done is added to the document's faults.
    """
    from data.own_text import sources_from_directory
    from data.sources import SourceError

    sections = document.data.get("stages")
    found = {name: raw for name, raw in sections.items() if isinstance(raw, dict)} if isinstance(sections, dict) else {}
    cleaning = [name for name, raw in found.items() if raw.get("kind") == "clean"]
    if not cleaning:
        document.faults.append(((FLAG,), Fault(FLAG, "needs a stage of kind clean; the recipe has none")))
    try:
        sources = sources_from_directory(data)
    except SourceError as error:
        document.faults.append(((FLAG,), Fault(FLAG, str(error))))
        return
    for name in cleaning:
        _replace(document, name, sources)
    for name, raw in found.items():
        if raw.get("kind") == "messages" and isinstance(raw.get("sources"), list):
            _replace(document, name, _conversations(raw["sources"], sources))
            if not any(source.get("type") == "corpus" for source in raw["sources"] if isinstance(source, dict)):
                raw.pop("corpus", None)


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
