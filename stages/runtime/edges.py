"""``lineage.json``: what a stage took in and what it brought forth, each edge with its digest.

``{"format": 1, "run": {W&B identity}, "inputs": [edge], "outputs": [edge]}``, an edge being ``{"name", "type",
"path", "digest", "metadata", "time"}``. Paths are relative to the artifact directory, so that a moved ``runs/`` keeps
its lineage.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from stages.runtime.artifact import ArtifactError
from stages.runtime.manifest import MANIFEST
from stages.runtime.mirror import RunIdentity

LINEAGE_FILE = "lineage.json"
FORMAT = 1
_READ = {"name": str, "type": str, "path": str, "digest": str, "metadata": dict}
"""Fields of an edge that whoever reads it builds on."""
_UNFINISHED = " (where it is not finished, delete this file alone: going on writes it anew)"


class EdgeFile:
    """Keeps ``directory/lineage.json``; an edge of a known name and digest is not written twice."""

    def __init__(self, directory: Path, run: RunIdentity) -> None:
        self.directory = Path(directory)
        self._content = read_edges(directory) or {"inputs": [], "outputs": []}
        self._content |= {"format": FORMAT, "run": dataclasses.asdict(run)}
        self._write()

    def add(
        self,
        side: Literal["inputs", "outputs"],
        name: str,
        kind: str,
        path: Path,
        digest: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Record one edge; ``digest`` is the sha256 of the artifact's ``manifest.json``."""
        if any(edge["name"] == name and edge["digest"] == digest for edge in self._content[side]):
            return
        self._content[side].append(
            {
                "name": name,
                "type": kind,
                "path": os.path.relpath(Path(path).resolve(), self.directory.resolve()),
                "digest": digest,
                "metadata": dict(metadata or {}),
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
        )
        self._write()

    def _write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f".{LINEAGE_FILE}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self._content, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.directory / LINEAGE_FILE)


def read_edges(directory: Path) -> dict[str, Any] | None:
    """The content of ``directory/lineage.json``; none where there is no such file.

    Raises:
        ArtifactError: when the file is there but cannot be read, or is not what is written here.
    """
    path = Path(directory) / LINEAGE_FILE
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; {way_out(directory)}{_UNFINISHED}") from error
    if wrong := _misshapen(content):
        raise ArtifactError(f"{path} must {wrong}; {way_out(directory)}{_UNFINISHED}")
    return dict(content)


def way_out(directory: Path) -> str:
    """What to do about the ``lineage.json`` of a finished stage that is gone or damaged."""
    return f"restore it from a copy, or delete {directory} and run the stage again"


def _misshapen(content: Any) -> str | None:
    """What the content of a ``lineage.json`` must be and is not."""
    if not isinstance(content, dict):
        return "be an object with a run, its inputs and outputs"
    for side in ("inputs", "outputs"):
        if not isinstance(content.get(side), list):
            return f"hold a list of {side}"
        for number, edge in enumerate(content[side]):
            kinds = edge if isinstance(edge, dict) else {}
            if bad := [name for name, kind in _READ.items() if not isinstance(kinds.get(name), kind)]:
                return f"give {side}.{number} its {', '.join(bad)}"
    return None if isinstance(content.get("run"), dict) else "name its run"


def sealed_digest(folder: Path) -> str | None:
    """What identifies a sealed folder: the SHA-256 of its manifest; none where there is none."""
    manifest = Path(folder) / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
