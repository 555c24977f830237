"""What a pure stream is: sources, how they are read, and what happens when one ends. Plain validated data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from data.catalogue import EntrySchema, resolve_entry
from data.source_config import FilesSource, HubSource, Section

StreamSource = Annotated[
    FilesSource | HubSource, Field(discriminator="type"), BeforeValidator(resolve_entry), EntrySchema()
]
"""A source that can be read as a stream: one's own files, or a data set of the hub."""


class StreamSettings(Section):
    """All that decides the order and content of a stream's documents."""

    sources: list[StreamSource] = Field(min_length=1)
    """Where the text comes from; read as it is (``rules: none``), composed to NFC, but for code."""
    chat_share: float = Field(0.02, ge=0, le=1)
    """Share of training documents rendered as a chat turn, so that the chat specials are trained from the start."""
    heldout_share: float = Field(0.02, gt=0, lt=0.5)
    """Share of every source's documents that is never trained on, by document hash, wherever they stand."""
    ngram: int = Field(13, ge=5, le=50)
    """A training document that shares this many consecutive words with a frozen held-out one is left out too."""
    shuffle_documents: int = Field(1000, ge=1, le=1_000_000_000)
    """Documents of a source that a lane reads and shuffles at a time."""
    lanes: int = Field(8, ge=1, le=1024)
    """Parts that a step's rows are divided into, each with its own share of every source; ranks take whole lanes, so
    that the number of ranks must divide it, and may change when a run goes on."""
    passes: dict[str, Annotated[int, Field(le=1_000_000)]] = Field(default_factory=dict)
    """How often a source may be read, by its name; once where it has no entry. Each lane goes round by itself."""
    on_end: Literal["fail", "drop"] = "fail"
    """After a source's last pass: ``fail`` ends the run with one line, ``drop`` gives its rows to the other sources."""

    def unfit(
        self, global_batch_size: int, is_weighed: bool, is_capped: bool, passes: Mapping[str, int]
    ) -> Iterator[tuple[str, str]]:
        """(field, message) of what a run asks of this stream that it does not fit; ``passes`` are the run's own."""
        if global_batch_size % self.lanes:
            message = f"must be a multiple of the stream's lanes {self.lanes}; got {global_batch_size}"
            yield "global_batch_size", f"{message}; set a multiple, or other lanes in the stream stage"
        if is_capped:
            yield "cap_epochs", "must be unset with a stream, whose length nobody knows; set passes there"
        if not is_weighed and len(self.sources) > 1:
            yield "mixture", "must weigh the sources of a stream, whose sizes nobody knows; got none; set it"
        names = [source.name for source in self.sources]
        if passes and self.on_end == "drop":
            message = "must be left out where the stream drops what ends, since rows behind an end depend on it"
            yield "passes", f"{message}; got {', '.join(passes)}; set the stream stage's own passes"
        for name in passes:
            if name not in names:
                yield f"passes.{name}", f"must name one of the sources {', '.join(names)}; got {name}; rename it"

    def faults(self) -> Iterator[tuple[str, str]]:
        """(field, message) of what does not fit together."""
        names = [source.name for source in self.sources]
        for number, source in enumerate(self.sources):
            if source.rules != "none":
                message = f"must be none, since a stream is read as it is; got {source.rules}; set none, or use clean"
                yield f"sources.{number}.rules", message
        for name, count in self.passes.items():
            if name not in names:
                yield f"passes.{name}", f"must name one of the sources {', '.join(names)}; got {name}; rename it"
            elif count < 1:
                yield f"passes.{name}", f"must be at least 1; got {count}; set 1, or leave the source out"
