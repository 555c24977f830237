"""Where a published tokenizer comes from, as plain validated data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data.source_config import NAME, Package, Section


class PublicTokenizer(Section):
    """A published tokenizer: a file of a pinned package, a folder, or a pinned repository of the hub."""

    name: str = Field(pattern=NAME)
    """What it is called in reports."""
    source: str | None = None
    """A folder with a ``tokenizer.json``, or a hub name together with ``revision``; none means ``package``."""
    revision: str | None = None
    """Commit hash of the hub's repository; a branch's name would not pin it."""
    package: Package | None = None
    """Pinned package that ships the tokenizer, in place of ``source``."""
    file: str | None = None
    """Glob of the one file of ``package``: ``tokenizer.json``, ranks (``*.tiktoken``), or a model (``*.gguf``)."""
    split: Literal["qwen2", "qwen35"] | None = None
    """How text is cut into words where the file does not say (``*.tiktoken``), by llama.cpp's name."""
