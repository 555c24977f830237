"""Artifacts as they lie on the disk, and how they hang together: what the commands of ``pipelines.lineage`` read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.base import ConfigError, Fault
from stages.runtime.artifact import ArtifactError, read_record
from stages.runtime.edges import LINEAGE_FILE, read_edges, sealed_digest, way_out

SHORT = 12
"""Characters of a digest that are shown."""


@dataclasses.dataclass(frozen=True)
class Edge:
    """One input of an artifact: what it was called and what its digest was when it was taken."""

    name: str
    digest: str
    directory: Path
    """The parent's artifact directory."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One artifact as it lies on the disk; ``record`` is its ``stage.json``, empty where it is gone."""

    directory: Path
    record: dict[str, Any]
    edges: list[Edge]
    fault: str = ""
    """Why its files cannot be read; what lies beside it is looked at all the same."""
    edges_fault: str = ""
    """Why ``lineage.json`` cannot be read; the edges are then those that ``stage.json`` knows as parents."""

    @property
    def digest(self) -> str | None:
        """The digest of the output as it lies there, by its manifest."""
        return sealed_digest(self.directory / "output")

    @property
    def name(self) -> str:
        """The artifact's name, ``<stage>-<key8>``."""
        return self.directory.name

    @property
    def stage(self) -> str:
        """The stage's name in its recipe."""
        return str(self.record.get("stage", self.name.rpartition("-")[0]))


def read_node(directory: Path) -> Node:
    """The artifact in ``directory``; its edges come from ``lineage.json``, the newest of each name."""
    directory = directory.resolve()
    fault = edges_fault = ""
    record: dict[str, Any] = {}
    content: dict[str, Any] | None = None
    try:
        record = read_record(directory) or {}
    except ArtifactError as error:
        fault = str(error)
    try:
        content = read_edges(directory)
    except ArtifactError as error:
        edges_fault = str(error)
    if content is None:
        parents = _parents(directory, record)
        is_done = record.get("state") == "done"
        if not edges_fault and (parents or is_done):
            remedy = way_out(directory) if is_done else "run the stage again: going on writes it anew"
            edges_fault = f"{directory / LINEAGE_FILE} is missing; {remedy}"
        return Node(directory, record, parents, fault, edges_fault)
    newest = {
        edge["name"]: Edge(edge["name"], edge["digest"], (directory / edge["path"]).resolve().parent)
        for edge in content["inputs"]
    }
    return Node(directory, record, list(newest.values()), fault)


def _parents(directory: Path, record: dict[str, Any]) -> list[Edge]:
    """The inputs that were taken, by ``stage.json``; a run that was refused before it took any has none."""
    found = []
    for link in record.get("parents", {}).values():
        if not {"stage", "key", "path", "digest"} <= (link or {}).keys() or link["digest"] is None:
            continue
        # The path is absolute: where runs/ was moved, a parent of the same pipeline still lies beside its child.
        beside = directory.parent / Path(link["path"]).name
        place = beside if beside.is_dir() else Path(link["path"])
        found.append(Edge(f"{link['stage']}-{link['key'][:8]}", link["digest"], place.resolve()))
    return found


def family(directory: Path) -> list[Node]:
    """The artifact and every ancestor once, the artifact first."""
    nodes: dict[Path, Node] = {}
    waiting = [directory.resolve()]
    while waiting:
        path = waiting.pop(0)
        if path not in nodes:
            nodes[path] = read_node(path)
            waiting += [edge.directory for edge in nodes[path].edges]
    return list(nodes.values())


def lineage_faults(*directories: Path) -> list[str]:
    """What is wrong with each ``lineage.json`` of these artifacts and their ancestors, each once."""
    nodes = {node.directory: node for directory in directories for node in family(directory)}
    return [node.edges_fault for node in nodes.values() if node.edges_fault]


def find_artifact(name: str, runs: Path, said: str = "ARTIFACT") -> Path:
    """The directory that the user means: a path, or an artifact's name below ``runs`` (``pretrain-1a2b3c4d``).

    A name that is a stage's to the letter is preferred to one that only begins so: ``dpo`` is not ``dpo-ipo``. Raises
    ``ConfigError`` when there is none or more than one; ``said`` is what the command line calls it.
    """
    if (Path(name) / "stage.json").is_file():
        return Path(name)
    found = sorted(path.parent for path in runs.glob(f"*/{glob_escaped(name)}*/stage.json"))
    exact = [path for path in found if name in (path.name, path.name.rpartition("-")[0])]
    if len(exact or found) == 1:
        return (exact or found)[0]
    near = ", ".join(str(path) for path in exact or found) or "none"
    raise ConfigError(Fault(said, f"must name one artifact directory; got {name!r}, which fits {near}; set its path"))


def glob_escaped(name: str) -> str:
    """``name`` with nothing left that a glob would expand, and no way out of its folder."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name if c != "/")


def pins_of(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each outside source of a record with each of its pins (package hash, commit, digest of a file)."""
    for name, revision in sorted(record.get("sources", {}).items()):
        for pin in str(revision).split(" ") or [""]:
            yield name, pin


def code_line(record: dict[str, Any]) -> str:
    """Commit, digest of the files and main versions of the code that made an artifact; empty where none is recorded."""
    git = record.get("git")
    if git is None:
        return ""
    commit = (git.get("commit") or "no commit")[:SHORT]
    state = {True: "changed", False: "clean"}.get(git.get("dirty"), "state unknown")
    facts = [f"code {commit} ({state})", f"version {record.get('code_version', '?')}"]
    if record.get("code_digest"):
        facts.append(f"files {record['code_digest'][:SHORT]}")
    versions = record.get("versions", {})
    facts += [f"{name} {versions[name]}" for name in ("python", "torch") if name in versions]
    return "  ".join([*facts, f"seed {record.get('seed', '?')}"])


def override_lines(record: dict[str, Any]) -> list[str]:
    """The gates that were overridden for an artifact to be made, a line each."""
    return [
        f"gate overridden: {gate.get('stage')} {gate.get('metric')}: {gate.get('said')} ({gate.get('at')})"
        for gate in record.get("overridden_gates") or ()
    ]
