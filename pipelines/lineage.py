"""Where an artifact comes from, and whether it is still what it was: ``python -m pipelines.lineage show ARTIFACT``.

``show`` prints the ancestry down to the pinned sources, each artifact with its key and its output's digest; ``verify``
hashes the outputs and checkpoints of an artifact and its ancestors (or of all of ``--runs``) against their manifests,
and compares every edge with what lies there now. It reads ``stage.json`` and ``lineage.json`` and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.base import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, ConfigError, Fault
from stages.runtime.artifact import ArtifactError, read_record
from stages.runtime.edges import read_edges, sealed_digest
from stages.runtime.manifest import MANIFEST, CheckpointError, verify_manifest

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

    @property
    def digest(self) -> str | None:
        """The digest of the output as it lies there, by its manifest."""
        return sealed_digest(self.directory / "output")


def read_node(directory: Path) -> Node:
    """The artifact in ``directory``; its edges come from ``lineage.json``, the newest of each name."""
    directory = directory.resolve()
    newest: dict[str, Edge] = {}
    try:
        for edge in (read_edges(directory) or {"inputs": []})["inputs"]:
            newest[edge["name"]] = Edge(edge["name"], edge["digest"], (directory / edge["path"]).resolve().parent)
        return Node(directory, read_record(directory) or {}, list(newest.values()))
    except ArtifactError as error:
        return Node(directory, {}, list(newest.values()), str(error))


def find_artifact(name: str, runs: Path) -> Path:
    """The directory that the user means: a path, or an artifact's name below ``runs`` (``pretrain-1a2b3c4d``).

    Raises ``ConfigError`` when there is none or more than one.
    """
    if (Path(name) / "stage.json").is_file():
        return Path(name)
    found = sorted(path.parent for path in runs.glob(f"*/{glob_escaped(name)}*/stage.json"))
    if len(found) == 1:
        return found[0]
    near = ", ".join(str(path) for path in found) or "none"
    raise ConfigError(
        Fault("ARTIFACT", f"must name one artifact directory; got {name!r}, which fits {near}; set its path")
    )


def glob_escaped(name: str) -> str:
    """``name`` with nothing left that a glob would expand, and no way out of its folder."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name if c != "/")


def ancestry(directory: Path) -> list[str]:
    """The artifact and all its ancestors, a line each, indented by generation; sources stand under who read them."""
    return list(_lines(read_node(directory), taken=None, depth=0, seen=set()))


def _lines(node: Node, taken: str | None, depth: int, seen: set[Path]) -> Iterator[str]:
    indent = "  " * depth
    yield indent + describe(node, taken)
    if node.directory in seen:
        if node.edges:
            yield f"{indent}  (ancestors as above)"
        return
    seen.add(node.directory)
    for name, revision in sorted(node.record.get("sources", {}).items()):
        yield f"{indent}  source {name}  {revision}"
    for edge in node.edges:
        yield from _lines(read_node(edge.directory), edge.digest, depth + 1, seen)


def describe(node: Node, taken: str | None = None) -> str:
    """One line: name, kind, state, key, digest; ``taken`` is the digest that a child recorded."""
    if node.fault:
        return f"{node.directory.name}  UNREADABLE ({node.fault})"
    if not node.record:
        return f"{node.directory.name}  GONE (its output was {(taken or '?')[:SHORT]})"
    facts = [
        node.directory.name,
        node.record.get("kind", "?"),
        node.record["state"],
        f"key {node.record.get('key', '?')[:SHORT]}",
        f"output {(node.digest or 'none')[:SHORT]}",
    ]
    if taken is not None and taken != node.digest:
        facts.append(f"CHANGED (was {taken[:SHORT]} when taken)")
    return "  ".join(facts)


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


def verify(node: Node) -> tuple[list[str], list[str]]:
    """Hash all that is sealed in one artifact; returns (what was found whole, faults)."""
    if node.fault:
        return [], [node.fault]
    if not node.record:
        return [], [f"{node.directory}: there is no stage.json; restore the artifact or run its stage again"]
    whole, faults = [], []
    sealed = [path.parent for path in sorted(node.directory.glob("checkpoints/*/" + MANIFEST))]
    if (node.directory / "output").exists() or node.record["state"] == "done":
        sealed.append(node.directory / "output")
    for folder in sealed:
        try:
            whole.append(f"{folder}: {verify_manifest(folder)[:SHORT]}")
        except CheckpointError as error:
            faults.append(str(error))
    recorded = node.record.get("output_digest")
    if node.record["state"] == "done" and recorded != node.digest:
        faults.append(f"{node.directory}: stage.json names output {recorded}, but there lies {node.digest}")
    return whole, faults + _edge_faults(node)


def _edge_faults(node: Node) -> list[str]:
    faults = []
    for edge in node.edges:
        now = read_node(edge.directory).digest
        if now != edge.digest:
            faults.append(f"{node.directory}: was made from {edge.name} {edge.digest[:SHORT]}; now it is {now}")
    return faults


def verify_all(nodes: list[Node]) -> int:
    """Print what is whole and what is not; the exit code."""
    code = EXIT_DONE
    for node in nodes:
        whole, faults = verify(node)
        for line in whole:
            print(f"ok    {line}")
        for line in faults:
            print(f"FAULT {line}", file=sys.stderr)
            code = EXIT_FAILED
    return code


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.lineage", description=__doc__, allow_abbrev=False)
    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument("--runs", type=Path, default=argparse.SUPPRESS, help="folder of all pipelines' artifacts (runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all pipelines' artifacts (runs)")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", parents=[runs], help="print the ancestry of an artifact", allow_abbrev=False)
    show.add_argument(
        "artifact",
        nargs="?",
        help="a directory, or a name below --runs such as pretrain-1a2b3c4d; without it all artifacts are listed",
    )
    check = commands.add_parser(
        "verify", parents=[runs], help="hash artifacts against their manifests", allow_abbrev=False
    )
    check.add_argument("artifact", nargs="?", help="this one and its ancestors; without it all below --runs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command: 0 when all is well, 1 when something does not verify, 2 for what the user gave."""
    arguments = parse(argv)
    try:
        if arguments.command == "show" and arguments.artifact is not None:
            print("\n".join(ancestry(find_artifact(arguments.artifact, arguments.runs))))
            return EXIT_DONE
        if arguments.artifact is not None:
            return verify_all(family(find_artifact(arguments.artifact, arguments.runs)))
        found = sorted(path.parent for path in arguments.runs.glob("*/*/stage.json"))
        if not found:
            raise ConfigError(Fault("--runs", f"must hold artifacts; got {arguments.runs}; run a stage first"))
        nodes = [read_node(path) for path in found]
        if arguments.command == "verify":
            return verify_all(nodes)
        print("\n".join(f"{node.directory.parent.name}/{describe(node)}" for node in nodes))
        return EXIT_DONE
    except (ConfigError, ArtifactError) as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG


if __name__ == "__main__":
    sys.exit(main())
