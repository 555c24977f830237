"""Documents of one source in one lane of a stream: shuffled in windows, cut into rows, with an exact place to resume.

``datasets`` tells where a stream of rows stands (``state_dict``), but not what lies in its shuffle buffer. So the order
here is one that needs no memory: a window of documents is read, permuted by a key, and handed out; the place is where
the window began, how many of its documents are done, and how many tokens of the next. To resume, the window is read
again from there.
"""

from __future__ import annotations

import copy
import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.compressed import UnreadableFile
from data.corpus import document_id
from data.documents import RawDocument, SourceError, row_as_document
from data.encoding import Encoder
from data.errors import DataError
from data.hub import broken_off, hub_stream
from data.mix import hash64, permute
from data.source_config import FilesSource, HubSource

if TYPE_CHECKING:
    from datasets import IterableDataset

_BATCH_DOCUMENTS = 32
_FIELDS = [field.name for field in dataclasses.fields(RawDocument)]
Document = dict[str, str | None]


def open_stream(source: FilesSource | HubSource, cache: Path | None) -> IterableDataset:
    """The source's rows as a ``datasets`` stream: files one by one (their number is ``num_shards``), or the hub's."""
    if isinstance(source, HubSource):
        return hub_stream(source.repository, source.revision, source.subset, source.hub_split, cache)
    from datasets import IterableDataset

    from data.sources import matching_files

    files = [str(path) for path in matching_files(source, Path(source.path))]
    return IterableDataset.from_generator(partial(_file_rows, source), gen_kwargs={"files": files})


def _file_rows(source: FilesSource, files: list[str]) -> Iterator[dict[str, Any]]:
    from data.file_readers import read_file

    for name in files:
        count, short = 0, Path(name).name
        try:
            for document in read_file(source, Path(name), short):
                yield {field: getattr(document, field) for field in _FIELDS}
                count += 1
        except UnreadableFile as error:
            reason = f"must name whole files; got {short}, which cannot be read beyond its first {count} documents"
            raise SourceError(source.name, "path", f"{reason} ({error}); fetch it again or exclude it") from error


def rows_of(source: FilesSource | HubSource, stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of ``open_stream``; a file that breaks is a ``SourceError``, a hub's stream that does a ``HubError``."""
    count, rows = 0, iter(stream)
    while True:
        try:
            row = next(rows, None)
        except SourceError:
            raise
        except Exception as error:  # whatever datasets and the hub's client say, one line is enough
            if isinstance(source, HubSource):
                raise broken_off(source.repository, source.revision, count, error) from error
            raise
        if row is None:
            return
        yield row
        count += 1


def raw_document(source: FilesSource | HubSource, row: Mapping[str, Any], number: int) -> RawDocument:
    """Row ``number`` of ``open_stream`` as a document."""
    if isinstance(source, HubSource):
        return row_as_document(source, row, f"{source.repository}:{number + 1}", first=number == 0)
    return RawDocument(**row)


def usable(source: FilesSource | HubSource, raw: RawDocument) -> Document | str:
    """The document as the corpus would hold it, or the name of the rule that leaves it out."""
    if raw.fault:
        return raw.fault
    # Code is left as it was written.
    text = raw.text if source.language == "code" else unicodedata.normalize("NFC", raw.text)
    if not text.strip():
        return "empty"
    try:
        one = document_id(text)
    except UnicodeEncodeError:
        return "invalid_unicode"
    return {"id": one, "text": text, "title": raw.title, "source": source.name, "language": source.language}


def is_held_out(document: Mapping[str, Any], share: float) -> bool:
    """Whether a document's hash lies in the held-out share, as in ``data.heldout_split.choose_heldout``."""
    return int(document["id"][:12], 16) < share * 16**12


@dataclasses.dataclass
class Place:
    """Where one source's lane stands; plain JSON data."""

    number: int = 0
    """Passes that are done."""
    rows: int = 0
    """Rows of this pass that were read before the window."""
    state: dict[str, Any] | None = None
    """What ``datasets`` says of the stream before the window; None is its beginning."""
    taken: int = 0
    """Documents of the window that are done."""
    offset: int = 0
    """Tokens of the next document that are done."""
    document: str = ""
    """Id of that document, by which a resume knows that it reads the same again; empty between two windows."""
    documents: int = 0
    """Documents that this pass held before the window."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Documents left out before the window, by rule, all passes together."""
    ended: bool = False


@dataclasses.dataclass
class _Window:
    """Documents that are shuffled together, read from one place of the rows on."""

    state: dict[str, Any] | None
    """What ``datasets`` says of the stream before it."""
    rows: int = 0
    documents: list[Document] = dataclasses.field(default_factory=list)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    order: list[int] = dataclasses.field(default_factory=list)
    """Places of ``documents`` in the order in which they are handed out."""
    is_last: bool = False
    """Whether the stream ended in it."""

    def document(self, taken: int) -> str:
        """Id of the document that is handed out after so many; empty behind the last one."""
        return str(self.documents[self.order[taken]]["id"]) if taken < len(self.documents) else ""


class SourceLane:
    """One source's documents in one lane, as rows of tokens.

    Args:
        source: where the rows come from.
        lane: this one of ``lanes``; with as many files as lanes each reads files of its own, else every n-th row.
        window: documents shuffled at a time.
        passes: how often the source may be read.
        key: decides the order, with the lane, the pass and the window.
        left_out: rule by which a usable document is not trained on, or an empty string.
        say: receives a line when a pass ends.
    """

    def __init__(
        self,
        source: FilesSource | HubSource,
        *,
        lane: int,
        lanes: int,
        encoder: Encoder,
        window: int,
        passes: int,
        key: int,
        left_out: Callable[[Document], str],
        cache: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.source, self.lane, self.passes = source, lane, passes
        self._encoder, self._size, self._key, self._left_out, self._say = encoder, window, key, left_out, say
        stream = open_stream(source, cache)
        limit = source.max_documents if isinstance(source, HubSource) else None
        own_files = limit is None and stream.num_shards >= lanes
        self._stream = stream.shard(num_shards=lanes, index=lane, contiguous=False) if own_files else stream
        self._every, self._limit = (1 if own_files else lanes), limit
        self.place = Place()
        self._forget()

    def row(self, length: int) -> np.ndarray | None:
        """(length,) int64 ids of the next row; None when the last pass is done (what is left is no whole row)."""
        pieces: list[np.ndarray] = []
        missing = length
        while missing:
            ids = self._current()
            if ids is None:
                return None
            piece = ids[self.place.offset : self.place.offset + missing]
            pieces.append(piece)
            missing -= len(piece)
            self._advance(len(piece), len(ids))
        self._read_ahead()
        return np.concatenate(pieces)

    def position(self) -> dict[str, Any]:
        """The place, as plain data of its own."""
        place = self.place
        document = self._window.document(place.taken) or place.document
        return {**dataclasses.asdict(place), "state": copy.deepcopy(place.state), "document": document}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go on from ``position``; the window that it stands in is read again."""
        self.place = Place(**copy.deepcopy(dict(position)))
        self._forget()

    @property
    def dropped(self) -> dict[str, int]:
        """Documents left out so far, by rule."""
        return dict(Counter(self.place.dropped) + self._window.dropped)

    def _forget(self) -> None:
        self._window = _Window(None)
        self._ahead: _Window | None = None
        self._encoded: dict[int, np.ndarray] = {}
        self._iterator: Iterator[tuple[int, Mapping[str, Any]]] | None = None

    def _current(self) -> np.ndarray | None:
        """Ids of the document in progress, the next one where that is done."""
        if self.place.ended:
            return None
        if self._iterator is None:
            self._open()
            self._check_same()
        while self.place.taken == len(self._window.documents):
            self._next_window()
            if self.place.ended:
                return None
        if self.place.taken not in self._encoded:
            self._encode()
        return self._encoded[self.place.taken]

    def _check_same(self) -> None:
        """Refuse to go on in the middle of another document than the one that was left."""
        place = self.place
        found = self._window.document(place.taken)
        if place.document and found != place.document:
            raise DataError(
                f"source {self.source.name} must give the documents again that it gave before; document "
                f"{place.document} was expected in lane {self.lane}, {found or 'none'} came; start the run anew"
            )
        place.document = ""

    def _advance(self, tokens: int, size: int) -> None:
        self.place.offset += tokens
        if self.place.offset == size:
            del self._encoded[self.place.taken]
            self.place.taken, self.place.offset = self.place.taken + 1, 0

    def _encode(self) -> None:
        window, first = self._window, self.place.taken
        places = range(first, min(first + _BATCH_DOCUMENTS, len(window.documents)))
        documents = [window.documents[window.order[place]] for place in places]
        for place, ids in zip(places, self._encoder.encode(documents, chat=True), strict=True):
            self._encoded[place] = np.asarray(ids, dtype=np.int64)

    def _next_window(self) -> None:
        place, window = self.place, self._window
        if window.rows == 0:
            self._next_pass()
            if not place.ended:
                self._open()
            return
        place.rows += window.rows
        place.documents += len(window.documents)
        place.dropped = self.dropped
        self._begin(self._ahead or self._window_here())

    def _next_pass(self) -> None:
        place = self.place
        if not place.documents:
            lost = ", ".join(f"{rule} {count}" for rule, count in self.dropped.items()) or "nothing"
            raise DataError(
                f"source {self.source.name} must hold a document for lane {self.lane}; got none of {place.rows} rows "
                f"(left out: {lost}); give it more text, or set fewer lanes"
            )
        place.number += 1
        what = f"source {self.source.name}, lane {self.lane}: pass {place.number} of {self.passes} ended"
        self._say(f"{what} after {place.documents:,} documents")
        place.ended = place.number >= self.passes
        place.rows = place.documents = place.taken = place.offset = 0
        place.state = None

    def _open(self) -> None:
        """Open the stream at the place, and read the window that begins there."""
        place = self.place
        # A state of None would leave the stream where another pass ended.
        self._stream.load_state_dict(copy.deepcopy(place.state))
        self._iterator = enumerate(rows_of(self.source, self._stream), start=place.rows)
        taken, offset = place.taken, place.offset
        self._begin(_Window(place.state))
        place.taken, place.offset = taken, offset

    def _begin(self, window: _Window) -> None:
        """Go on with ``window``, read to its end, from its first document."""
        place = self.place
        self._fill(window, self._size)
        key = hash64("window", self._key, self.source.name, self.lane, place.number, place.rows)
        count = len(window.documents)
        window.order = permute(np.arange(count), max(1, count), key).tolist()
        place.state, place.taken, place.offset = window.state, 0, 0
        self._window, self._ahead, self._encoded = window, None, {}

    def _window_here(self) -> _Window:
        return _Window(copy.deepcopy(self._stream.state_dict()))

    def _read_ahead(self) -> None:
        """Read as much of the next window as was taken of this one, so that no row pays for a whole window."""
        window = self._window
        if window.documents and not self.place.ended:
            self._ahead = self._ahead or self._window_here()
            self._fill(self._ahead, self._size * self.place.taken // len(window.documents))

    def _fill(self, window: _Window, documents: int) -> None:
        """Read until ``window`` holds so many documents, or the stream ends."""
        while not window.is_last and len(window.documents) < documents:
            number, row = self._next_row()
            if number < 0 or (self._limit is not None and number >= self._limit):
                window.is_last = True
                return
            window.rows += 1
            if number % self._every == self.lane % self._every:
                self._keep(window, usable(self.source, raw_document(self.source, row, number)))

    def _next_row(self) -> tuple[int, Mapping[str, Any]]:
        assert self._iterator is not None, "a window opens its stream"
        try:
            return next(self._iterator, (-1, {}))
        except SourceError as error:
            raise DataError([("data", f"source {error.source}: {error.field} {error}")]) from error

    def _keep(self, window: _Window, document: Document | str) -> None:
        rule = document if isinstance(document, str) else self._left_out(document)
        if isinstance(document, str) or rule:
            window.dropped[rule] += 1
        else:
            window.documents.append(document)
