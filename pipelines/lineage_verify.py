"""``verify``: is an artifact still what it was made as, and are its ancestors, its sources and its code?

Faults are what contradicts a record: bytes, digests, keys, edges, raw files. Notes are what cannot be held against it:
a source that does not lie here any more, code that has moved on since.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.gates_record import damage
from pipelines.lineage_read import SHORT, Node, pins_of, read_node
from stages import STAGES
from stages.base import ConfigError
from stages.runtime.artifact import canonical_digest
from stages.runtime.code import CODE_FILE, code_digest, code_files, read_code
from stages.runtime.manifest import MANIFEST, CheckpointError, verify_manifest

PACKAGE_PIN = re.compile(r"^(?P<name>.+)==(?P<version>[^:]+):(?P<sha256>[0-9a-f]{64})$")


@dataclasses.dataclass
class Findings:
    """What was found of one artifact, a line each."""

    whole: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def verify(node: Node, cache: Path) -> Findings:
    """Hash all that is sealed in one artifact, and compare its record, edges, sources and code with what lies there."""
    found = Findings(faults=[node.edges_fault] if node.edges_fault else [])
    if node.fault:
        found.faults.append(node.fault)
    elif not node.record:
        found.faults.append(f"{node.directory}: there is no stage.json; restore the artifact or run its stage again")
    else:
        _verify_files(node, found)
        found.faults += [*_record_faults(node), *_edge_faults(node), *filter(None, [damage(node.directory)])]
        _verify_sources(node, cache, found)
        _verify_code(node, found)
    return found


def _verify_files(node: Node, found: Findings) -> None:
    sealed = [path.parent for path in sorted(node.directory.glob("checkpoints/*/" + MANIFEST))]
    if (node.directory / "output").exists() or node.record["state"] == "done":
        sealed.append(node.directory / "output")
    for folder in sealed:
        try:
            found.whole.append(f"{folder}: {verify_manifest(folder)[:SHORT]}")
        except CheckpointError as error:
            found.faults.append(str(error))


def _record_faults(node: Node) -> Iterator[str]:
    """A record that names another output than lies there, or a key that is not the hash of what it stands for."""
    record, recorded = node.record, node.record.get("output_digest")
    if record["state"] == "done" and recorded != node.digest:
        yield f"{node.directory}: stage.json names output {recorded}, but there lies {node.digest}"
    identity = record.get("identity")
    if identity is None:
        return
    key = canonical_digest(identity)
    if key != record.get("key"):
        yield f"{node.directory}: key {str(record.get('key'))[:SHORT]} must be that of its identity, {key[:SHORT]}"
    for name in ("seed", "sources", "code_version"):
        if name in record and record[name] != identity[name]:
            yield f"{node.directory}: {name} {record[name]} must be the identity's, {identity[name]}"


def _edge_faults(node: Node) -> Iterator[str]:
    for edge in node.edges:
        now = read_node(edge.directory).digest
        if now != edge.digest:
            state = "which is gone" if now is None else f"which is {now[:SHORT]} now"
            yield f"{node.directory}: was made from {edge.name} {edge.digest[:SHORT]}, {state}"
    taken = {edge.digest for edge in node.edges}
    for field, link in node.record.get("parents", {}).items():
        digest = (link or {}).get("digest")
        if digest is not None and digest not in taken:
            yield f"{node.directory}: stage.json has input {field} {digest[:SHORT]}, lineage.json has no such edge"


def _verify_sources(node: Node, cache: Path, found: Findings) -> None:
    """Raw data: packages in the cache by their files' digests, one's own files by hashing them again."""
    for name, pin in pins_of(node.record):
        match = PACKAGE_PIN.match(pin)
        if match:
            _verify_package(f"{node.name} source {name}", match, cache, found)
    if not node.record.get("sources") or "config" not in node.record:
        return
    now = _sources_now(node.record, found)
    if now is None:
        return
    for name, revision in node.record["sources"].items():
        if name not in now or now[name] == revision:
            continue
        found.faults.append(f"{node.directory}: source {name} was {revision}; what lies there now is {now[name]}")


def _verify_package(where: str, pin: re.Match[str], cache: Path, found: Findings) -> None:
    from data.fetch import FetchError, fetch_package
    from data.source_config import Package

    package = Package(**pin.groupdict())
    folder = cache / "packages" / f"{package.name.lower()}-{package.version}-{package.sha256[:8]}"
    if not folder.is_dir():
        found.notes.append(f"{where}: {package.name}=={package.version} is not in {cache}; fetching checks its pin")
        return
    try:
        fetch_package(package, cache)
        found.whole.append(f"{where}: {folder}")
    except FetchError as error:
        found.faults.append(f"{where}: {error}")


def _sources_now(record: dict[str, Any], found: Findings) -> dict[str, str] | None:
    """What pins the record's sources as they lie there now; None, with a note, where that cannot be told."""
    stage = STAGES.get(record["kind"])
    if stage is None:
        return None
    try:
        return stage.source_revisions(stage.Config.model_validate(record["config"]))
    except (ConfigError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        found.notes.append(f"{record.get('stage')}: its sources cannot be read from here: {reason[:200]}")
        return None


def _verify_code(node: Node, found: Findings) -> None:
    recorded, files = node.record.get("code_digest"), read_code(node.directory)
    if recorded is None:
        return
    digest = code_digest(files)
    if digest != recorded:
        found.faults.append(f"{node.directory / CODE_FILE} must hash to {recorded[:SHORT]}; got {digest[:SHORT]}")
        return
    changed = changed_files(files, code_files())
    if changed:
        found.notes.append(f"{node.name}: {len(changed)} files of the code here are not what made it: {some(changed)}")


def changed_files(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Paths whose content differs, or that one side lacks."""
    return sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))


def some(names: list[str], limit: int = 3) -> str:
    """The first of ``names``, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
