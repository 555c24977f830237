"""Where preference pairs come from, as plain validated data: own templates, files, packages, a hub's data set."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data import languages
from data.source_config import NAME, Package, Section

Language = Literal["en", "de", "hi"]
Category = Literal["harmful", "benign", "general"]


class TemplateSource(Section):
    """Safety pairs from this repository's own templates."""

    type: Literal["templates"]
    """Our own templates: harmful requests and benign look-alikes."""
    name: str = Field("safety", pattern=NAME)
    """Name of the source."""
    languages: list[Language] = Field(["en", "de", "hi"], min_length=1)
    """Languages whose templates are written out."""
    max_per_template: int | None = Field(None, ge=1, le=1_000_000_000)
    """At most this many of a template's fillings a language; none takes all."""

    @property
    def licence(self) -> str:
        """Licence of the text: the repository's."""
        return "Apache-2.0"


class RowSource(Section):
    """Rows with a prompt and two answers; each field holds a string or a list of OpenAI messages."""

    name: str = Field(pattern=NAME)
    """Name of the source."""
    licence: str = Field(min_length=1)
    """Licence of the text, stated in the artifact."""
    language: languages.Language
    """ISO 639 code of the rows; a row's own field ``language`` comes first."""
    category: Category = "general"
    """Kind of the rows (``harmful``: refusing is chosen; ``benign``: helping); a row's own ``category`` comes first."""
    prompt: str | None = "prompt"
    """Field with the prompt; none when both answers are whole conversations that begin alike."""
    chosen: str | None = "chosen"
    """Field with the better answer; none, with ``rejected`` none, takes our stock refusal (harmful prompts only)."""
    rejected: str | None = "rejected"
    """Field with the worse answer; none takes our stock compliance."""
    max_rows: int | None = Field(None, ge=1, le=1_000_000_000)
    """Read at most this many rows; none reads all."""
    max_faulty_share: float = Field(0.0, ge=0, lt=1)
    """Share of rows that may be faulty and are then left out and counted; more refuses the source, faults listed."""


class FilePreferences(RowSource):
    """One's own files."""

    type: Literal["files"]
    """Files on this machine."""
    path: str = Field(json_schema_extra={"operational": True})
    """A ``.jsonl``, ``.json`` or ``.yaml`` file, or a folder of them; only its content enters the key."""


class PackagePreferences(RowSource):
    """Files that pinned packages ship."""

    type: Literal["package"]
    """Files inside pinned wheels."""
    packages: list[Package] = Field(min_length=1)
    """The packages, read in this order."""
    include: list[str] = Field(min_length=1)
    """Glob patterns of the files to read, relative to the package."""
    rows: str | None = None
    """Key under which a JSON or YAML file holds its list of rows; none takes the whole file as the list."""


class HubPreferences(RowSource):
    """A data set of the Hugging Face hub, streamed at a pinned revision."""

    type: Literal["hub"]
    """A data set of the Hugging Face hub."""
    repository: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """``owner/name`` of the data set."""
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    """Commit of the data set: 40 hex digits."""
    subset: str | None = None
    """Configuration of the data set."""
    hub_split: str = "train"
    """Split of the data set to read."""


RowSources = FilePreferences | PackagePreferences | HubPreferences
PreferenceSource = Annotated[TemplateSource | FilePreferences | PackagePreferences | HubPreferences,
                             Field(discriminator="type")]  # fmt: skip
