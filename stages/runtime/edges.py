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

from stages.runtime.manifest import MANIFEST
from stages.runtime.mirror import RunIdentity

LINEAGE_FILE = "lineage.json"
FORMAT = 1


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
    """The content of ``directory/lineage.json``; none where there is no such file."""
    path = Path(directory) / LINEAGE_FILE
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def sealed_digest(folder: Path) -> str | None:
    """What identifies a sealed folder: the SHA-256 of its manifest; none where there is none."""
    manifest = Path(folder) / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
