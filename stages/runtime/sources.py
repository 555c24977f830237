"""What stages that read sources say of faulty ones: the same check, the same words, the same dotted path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from data.sources import SourceError
from stages.base import ConfigError, Fault


def repeated_names(sources: Sequence[Any]) -> list[Fault]:
    """A fault for each source whose name another one has too: files, shares and scores go by it."""
    counts = Counter(source.name for source in sources)
    return [
        Fault(
            f"sources.{index}.name",
            f"must differ from the other sources' names; got {source.name!r} {counts[source.name]} times; rename one",
        )
        for index, source in enumerate(sources)
        if counts[source.name] > 1
    ]


def unreadable(sources: Sequence[Any], kind: type, check: Callable[[Any], Any]) -> list[Fault]:
    """Faults of the sources of one ``kind``: what ``check``, called with each, raises as ``SourceError``."""
    faults = []
    for index, source in enumerate(sources):
        if isinstance(source, kind):
            try:
                check(source)
            except SourceError as error:
                faults.append(Fault(f"sources.{index}.{error.field}", str(error)))
    return faults


def unreachable(sources: Sequence[Any], place: str = "sources") -> list[Fault]:
    """Faults of the hub's data sets that are to be streamed and are out of reach; asks the hub of each."""
    from data.hub import HubError, check_reach

    faults = []
    for index, source in enumerate(sources):
        # What is downloaded may be in the cache already.
        if source.type == "hub" and getattr(source, "streaming", True):
            try:
                check_reach(source.repository, source.revision)
            except HubError as error:
                faults.append(Fault(f"{place}.{index}.{error.field}", str(error)))
    return faults


def source_error(sources: Sequence[Any], error: SourceError) -> ConfigError:
    """``error`` under the dotted path of the source that it is about."""
    index = next((i for i, source in enumerate(sources) if source.name == error.source), None)
    return ConfigError(Fault(f"sources.{index}.{error.field}", str(error)))
