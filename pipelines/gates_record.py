"""What was judged of an evaluation and who let it pass: ``gates.json`` beside its ``stage.json``.

``{"format": 1, "judgements": [...], "overrides": [{"metric", "rule", "said", "digest", "at"}]}``. An override is bound
to the digest of what it overrode: other scores, another baseline or another limit are judged anew.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.runtime.artifact import ArtifactError
from stages.runtime.manifest import write_atomic

RECORD = "gates.json"
FORMAT = 1
FLAG = "--override-gate"
"""The option of ``run.py`` that lets a closed gate pass."""


@dataclasses.dataclass(frozen=True)
class Override:
    """One judgement that was let pass by hand: what it said, and when (UTC)."""

    metric: str
    rule: str
    said: str
    digest: str
    at: str


def read_gates(directory: Path) -> dict[str, Any]:
    """The content of ``directory/gates.json``; an empty one where there is none.

    Raises:
        ArtifactError: when the file is not what is written here; what was let pass must not be forgotten silently.
    """
    path = directory / RECORD
    if not path.is_file():
        return {"format": FORMAT, "judgements": [], "overrides": []}
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        [Override(**plain) for plain in content["overrides"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path} must hold judgements and overrides; {type(error).__name__}: {error}"
        raise ArtifactError(f"{message}; delete it, and give --override-gate again where it is wanted") from error
    return dict(content)


def damage(directory: Path) -> str | None:
    """Why what was judged of the artifact in ``directory`` cannot be read; None where it can, or nothing was judged."""
    try:
        read_gates(directory)
    except ArtifactError as error:
        return str(error)
    return None


def overrides_of(directory: Path) -> dict[str, Override]:
    """What was let pass of the evaluation in ``directory``, by digest."""
    return {plain["digest"]: Override(**plain) for plain in read_gates(directory)["overrides"]}


def write_gates(directory: Path, judgements: Sequence[Mapping[str, Any]], added: Sequence[Override]) -> None:
    """Write ``judgements`` in place of the earlier ones, and ``added`` to the overrides, which are never taken away."""
    content = read_gates(directory)
    known = {plain["digest"] for plain in content["overrides"]}
    content["overrides"] += [dataclasses.asdict(one) for one in added if one.digest not in known]
    content["judgements"] = list(judgements)
    text = json.dumps(content, ensure_ascii=False, indent=1, default=str) + "\n"
    write_atomic(directory / RECORD, text.encode())
