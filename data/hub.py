"""Data sets of the Hugging Face hub at a pinned revision, opened here alone. ``datasets`` is imported late."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.fetch import FetchError

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

_REASON_CHARACTERS = 300
_ASK_S = 20.0
"""How long the hub may take to say that it has a data set."""


class HubError(FetchError):
    """A data set that cannot be had as pinned: one line. ``field`` is the config field to look at."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


def hub_stream(
    repository: str, revision: str, subset: str | None, split: str, cache: Path | None = None
) -> IterableDataset:
    """The split as a stream of rows: nothing is stored, and its ``state_dict`` tells where it stands.

    Raises ``HubError``.
    """
    builder = _open(repository, revision, subset, cache)
    try:
        return builder.as_streaming_dataset(split=split)
    except Exception as error:  # whatever the hub and its client say, the recipe's author needs it in one line
        raise _translated(error, repository, revision, subset, split) from error


def hub_rows(
    repository: str,
    revision: str,
    subset: str | None = None,
    split: str = "train",
    *,
    streaming: bool = True,
    limit: int | None = None,
    cache: Path | None = None,
) -> Iterator[Mapping[str, Any]]:
    """At most ``limit`` rows of the split, in the data set's order, the same whether streamed or downloaded.

    ``streaming: False`` first downloads and converts the whole split into ``cache``. Raises ``HubError``, also for a
    stream that breaks off after ``datasets`` has tried again.
    """
    rows: Any = (hub_stream if streaming else _downloaded)(repository, revision, subset, split, cache)
    count = 0
    try:
        for row in rows if limit is None else rows.take(limit):
            yield row
            count += 1
    except Exception as error:  # a generator that is closed raises GeneratorExit, which is none
        raise broken_off(repository, revision, count, error) from error


def broken_off(repository: str, revision: str, rows: int, error: Exception) -> HubError:
    """What is said of a stream that ``error`` ended after so many rows."""
    reason = f"{repository} at {revision[:12]} broke off after {rows:,} rows: {_one_line(error)}; run it again"
    return HubError("repository", reason)


def check_reach(repository: str, revision: str) -> None:
    """Ask the hub, without reading a row, whether it has the data set at this commit; a ``HubError`` where not."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(repository, revision=revision, timeout=_ASK_S)
    except Exception as error:  # as in hub_stream
        field = "revision" if type(error).__name__ == "RevisionNotFoundError" else "repository"
        message = f"must be within reach to be streamed; got {repository} at {revision[:12]}: {_one_line(error)}"
        raise HubError(field, f"{message}; check the name, the network and HF_HUB_OFFLINE") from error


def _open(repository: str, revision: str, subset: str | None, cache: Path | None) -> DatasetBuilder:
    from datasets import load_dataset_builder

    try:
        # With this prefix a folder that happens to have the data set's name is not read in its place.
        builder = load_dataset_builder(
            f"hf://datasets/{repository}", subset, revision=revision, cache_dir=None if cache is None else str(cache)
        )
    except Exception as error:  # as in hub_stream
        raise _translated(error, repository, revision, subset, None) from error
    # Without the hub, datasets takes the newest copy that it finds in its cache, of whatever revision.
    if builder.hash != revision:
        raise HubError(
            "revision",
            f"{repository} must be read at {revision}, which is out of reach; got a cached copy of {builder.hash}; "
            "check the network and HF_HUB_OFFLINE",
        )
    return builder


def _downloaded(repository: str, revision: str, subset: str | None, split: str, cache: Path | None) -> Any:
    builder = _open(repository, revision, subset, cache)
    try:
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except Exception as error:  # as in hub_stream
        raise _translated(error, repository, revision, subset, split) from error


def _translated(error: Exception, repository: str, revision: str, subset: str | None, split: str | None) -> HubError:
    reason = _one_line(error)
    field = "repository"
    if "Revision '" in reason:
        field = "revision"
    elif "BuilderConfig" in reason or "Config name" in reason:
        field = "subset"
    elif split is not None and "split" in reason.lower():
        field = "hub_split"
    asked = f"{repository} at {revision[:12]}" + (f", subset {subset}" if subset else "")
    asked += f", split {split}" if split else ""
    return HubError(field, f"must name a data set that can be read; got {asked}: {reason}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON_CHARACTERS else f"{text[:_REASON_CHARACTERS]}..."
