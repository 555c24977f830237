"""Where raw text comes from, as plain validated data: pinned packages, one's own files, a hub's dataset."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data.catalogue import EntrySchema, resolve_entry
from data.languages import LanguageOrCode

RuleSet = Literal["web", "prose", "messages", "code", "none"]
FileFormat = Literal["auto", "text", "jsonl", "json", "parquet", "gettext"]
Scalar = str | bool | int | float
NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"


def _stays_inside(pattern: str) -> str:
    parts = pattern.split("/")
    if pattern.startswith("/") or ".." in parts:
        raise ValueError(f"must stay inside the source's folder; got {pattern!r}; write it without leading / and ..")
    # Some versions of Python refuse these when they search, others find nothing.
    if not pattern or any("**" in part and part != "**" for part in parts):
        raise ValueError(f"must have ** only as a whole folder's name; got {pattern!r}; write **/*.txt, say")
    return pattern


Pattern = Annotated[str, AfterValidator(_stays_inside)]
PLACEHOLDER = re.compile(r"\{([\w-]+(?:\.[\w-]+)*)\}")
"""``{field}`` or ``{field.key}`` in a template; all other braces are text."""


def _names_fields(template: str) -> str:
    text = PLACEHOLDER.sub("", template)
    # A brace and a word that do not close as a field: forgotten, or Python's {title!r}, {title[0]}, {title:>9}.
    if broken := re.search(r"\{\w[\w.-]*(?:[!:\[][^{}\s]*)?\}|\{\w[^{}]*(?=\{|\Z)", text):
        raise ValueError(f"must write fields as {{field}} or {{field.key}}; got {broken[0]!r}; close the brace")
    fields = PLACEHOLDER.findall(template)
    if not fields:
        raise ValueError(f"must name a field of the rows, or all texts were alike; got {template!r}; write {{text}}")
    if inner := [field for field in fields if any(part.startswith("__") for part in field.split("."))]:
        raise ValueError(f"must name fields of the rows; got {inner[0]!r}, which is an attribute; write {{text}}")
    return template


Template = Annotated[str, AfterValidator(_names_fields)]


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RowFilter(Section):
    """A condition on one field of a row; a row that fails it is left out and counted as ``filter_<field>``.

    A row whose field has no value (null) fails; a source whose first row lacks the field altogether is refused.
    """

    model_config = ConfigDict(populate_by_name=True)

    field: str = Field(min_length=1)
    """Field of the row; ``a.b`` reaches into a mapping."""
    min: float | None = None
    """Smallest number that is kept."""
    max: float | None = None
    """Largest number that is kept."""
    equals: Scalar | None = None
    """The one value that is kept."""
    in_: list[Scalar] | None = Field(None, alias="in", min_length=1)
    """The values that are kept."""

    @model_validator(mode="after")
    def _asks_something(self) -> RowFilter:
        if self.min is None and self.max is None and self.equals is None and self.in_ is None:
            raise ValueError("must set at least one condition; got none; set min, max, equals or in")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"must have min at most max; got {self.min:g} and {self.max:g}; no row could pass")
        return self


class SourceBase(Section):
    """What every source says of itself."""

    name: str = Field(pattern=NAME)
    """Name of the source: its files in the corpus, its share in a mixture."""
    language: LanguageOrCode
    """ISO 639 code of the text (``en``, ``de``, ``hi``), or ``code``; decides the language check."""
    domain: str | None = Field(None, pattern=NAME)
    """What the text is about (``science``, ``medicine``, ``code``); a mixture or score may go by it."""
    licence: str = Field(min_length=1)
    """Licence of the text, stated in the corpus."""
    rules: RuleSet
    """Quality rules: ``web`` (Gopher, FineWeb), ``prose`` (edited text), ``messages``, ``code``, or ``none``."""
    min_words: int = Field(5, ge=0, le=1_000_000)
    """Shortest document that is kept, in words (``rules: none`` keeps all)."""
    language_threshold: float = Field(0.05, ge=0, lt=1)
    """A document is dropped when the probability of its source's language is below this; 0 turns the check off."""
    template: Template = "{text}"
    """How a row (JSON, JSONL, Parquet, hub) becomes text: ``{field}`` or ``{field.key}``; a list or mapping of options
    is rendered one ``A. ...`` a line."""
    title: str | None = None
    """Field of a row that holds the document's title; text files and code take their path."""
    filters: list[RowFilter] = []
    """Rows to keep, by their fields: all conditions must hold. For rows alone, not for text files or catalogs."""
    max_document_bytes: int = Field(16_000_000, ge=1_000, le=2**31)
    """Longest document, and longest line of a JSONL file, in bytes; what is longer is counted, never held."""


class FileReading(SourceBase):
    """Reading from files: which, and how each becomes documents."""

    include: list[Pattern] = Field(min_length=1)
    """Glob patterns relative to the source's root; ``**`` crosses folders."""
    exclude: list[Pattern] = []
    """Glob patterns of files to leave out; a folder that matches is left out with all in it."""
    format: FileFormat = "auto"
    """How files are read; ``auto`` goes by the ending, ``.gz``, ``.zst``, ``.xz`` or ``.bz2`` behind it aside."""
    split: Literal["file", "blank_line"] = "file"
    """For text files: one document a file, or one between blank lines."""
    message_min_words: int = Field(3, ge=1, le=1_000_000)
    """For gettext catalogs: shorter translations are left out."""
    message_document_bytes: int = Field(1500, ge=1, le=2**31)
    """For gettext catalogs: consecutive translations are gathered, one a line, into documents of about this size."""


class Package(Section):
    """One pinned distribution of the Python package index."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name on the index."""
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")
    """Exact version."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the wheel."""


class PackageSource(FileReading):
    """Files that pinned packages ship."""

    type: Literal["package"]
    """Files inside pinned wheels."""
    packages: list[Package] = Field(min_length=1)
    """The packages, read in this order."""


class FilesSource(FileReading):
    """One's own files."""

    type: Literal["files"]
    """Files on this machine."""
    path: str = Field(json_schema_extra={"operational": True})
    """Folder or file; only its content enters the stage's key, not where it lies."""


class HubSource(SourceBase):
    """A dataset of the Hugging Face hub at a pinned revision."""

    type: Literal["hub"]
    """A data set of the Hugging Face hub."""
    repository: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """``owner/name`` of the dataset."""
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    """Commit of the dataset: 40 hex digits, so that the same recipe always reads the same rows."""
    subset: str | None = None
    """Configuration of the dataset (``sample-10BT``, ``deu_Latn``)."""
    hub_split: str = "train"
    """Split of the dataset to read."""
    max_documents: int | None = Field(None, ge=1, le=1_000_000_000_000)
    """Stop after this many rows, those that filters leave out included; none reads all."""
    streaming: bool = Field(True, json_schema_extra={"operational": True})
    """Read rows as they arrive, storing nothing; false first downloads the split to the cache. Same rows."""


FileSource = PackageSource | FilesSource
Source = Annotated[
    PackageSource | FilesSource | HubSource, Field(discriminator="type"), BeforeValidator(resolve_entry), EntrySchema()
]
"""One source; written with ``entry: NAME``, it takes what ``data.catalogue`` says of that data set."""


class HeldoutConfig(Section):
    """The held-out split: chosen by document hash, per source, so that a document never changes sides."""

    share: float = Field(0.03, gt=0, lt=0.5)
    """Share of a source's documents that is held out."""
    min_documents: int = Field(20, ge=1, le=1_000_000_000)
    """At least this many a source (never more than half of it)."""
    ngram: int = Field(13, ge=5, le=50)
    """A training document that shares this many consecutive words with a held-out one is removed."""
    common_documents: int = Field(10, ge=0, le=1_000_000_000)
    """Word sequences found in more training documents than this are boilerplate (licence headers) and do not count."""
    max_overlap_share: float = Field(0.5, gt=0, le=1)
    """A source that would lose more than this share of its training documents to the rule above is refused instead."""


class DedupConfig(Section):
    """Duplicate removal over all sources: exact always, near by MinHash (Broder 1997) with banding."""

    near: bool = True
    """Whether near duplicates are removed too."""
    shingle_words: int = Field(5, ge=1, le=20)
    """Words a shingle."""
    buckets: int = Field(14, ge=1, le=100)
    """Bands; two documents that agree on one whole band are near duplicates."""
    hashes_per_bucket: int = Field(8, ge=1, le=100)
    """Hashes a band; the threshold is about (1 / buckets) ** (1 / hashes_per_bucket)."""
