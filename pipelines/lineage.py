"""Where an artifact comes from, whether it is still what it was, and how it differs from another one.

``show`` prints the ancestry down to the pinned sources and the code, each artifact with its key and its output's
digest; ``verify`` hashes the outputs and checkpoints of an artifact and its ancestors (or of all of ``--runs``) against
their manifests, and compares keys, edges, raw data and code with what lies there now; ``diff`` says what two
ancestries differ in. They read ``stage.json``, ``lineage.json`` and ``code.json`` and write nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    # For a script Python looks in its own folder first, where the rooms are not found and our modules shadow others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from pipelines.environment import fault

    if missing := fault(sys.argv):
        sys.exit(print(missing, file=sys.stderr) or 2)

from pipelines.folder import refuse_no_folder
from pipelines.lineage_read import (
    SHORT,
    Node,
    code_line,
    family,
    find_artifact,
    lineage_faults,
    override_lines,
    pins_of,
    read_node,
)
from stages.base import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, ConfigError, Fault
from stages.runtime.artifact import ArtifactError


def ancestry(directory: Path) -> list[str]:
    """The artifact and all its ancestors, a line each, indented by generation; sources and code under who used them."""
    return list(_lines(read_node(directory), taken=None, depth=0, seen=set()))


def _lines(node: Node, taken: str | None, depth: int, seen: set[Path]) -> Iterator[str]:
    indent = "  " * depth
    yield indent + describe(node, taken)
    if node.directory in seen:
        if node.edges:
            yield f"{indent}  (ancestors as above)"
        return
    seen.add(node.directory)
    if node.edges_fault:
        yield f"{indent}  FAULT {node.edges_fault}"
    if code := code_line(node.record):
        yield f"{indent}  {code}"
    for line in override_lines(node.record):
        yield f"{indent}  {line}"
    for name, pin in pins_of(node.record):
        yield f"{indent}  source {name}  {pin}"
    for edge in node.edges:
        yield from _lines(read_node(edge.directory), edge.digest, depth + 1, seen)


def describe(node: Node, taken: str | None = None) -> str:
    """One line: name, kind, state, key, digest; ``taken`` is the digest that a child recorded."""
    if node.fault:
        return f"{node.name}  UNREADABLE ({node.fault})"
    if not node.record:
        return f"{node.name}  GONE (its output was {(taken or '?')[:SHORT]})"
    facts = [
        node.name,
        node.record.get("kind", "?"),
        node.record["state"],
        f"key {node.record.get('key', '?')[:SHORT]}",
        f"output {(node.digest or 'none')[:SHORT]}",
    ]
    if taken is not None and taken != node.digest:
        facts.append(f"CHANGED (was {taken[:SHORT]} when taken)")
    return "  ".join(facts)


def verify_all(nodes: list[Node], cache: Path) -> int:
    """Print what is whole, what is not and what cannot be told; the exit code."""
    from pipelines.lineage_verify import verify

    code = EXIT_DONE
    for node in nodes:
        found = verify(node, cache)
        for line in found.whole:
            print(f"ok    {line}")
        for line in found.notes:
            print(f"note  {line}")
        for line in found.faults:
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
    check = commands.add_parser("verify", parents=[runs], help="hash artifacts and raw data again", allow_abbrev=False)
    check.add_argument("artifact", nargs="?", help="this one and its ancestors; without it all below --runs")
    check.add_argument("--cache", type=Path, default=Path(".cache"), help="folder of fetched packages (.cache)")
    diff = commands.add_parser("diff", parents=[runs], help="what two ancestries differ in", allow_abbrev=False)
    diff.add_argument("a", help="an artifact, as for show")
    diff.add_argument("b", help="the other one")
    diff.add_argument("--all", action="store_true", help="every item, more than one screen if need be")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Carry out a parsed command; raises ``ConfigError`` for what names no artifact."""
    named = [word for word in (getattr(arguments, side, None) for side in ("artifact", "a", "b")) if word is not None]
    if not named or not all(Path(word).is_dir() for word in named):
        refuse_no_folder(arguments.runs)
    if arguments.command == "diff":
        from pipelines.lineage_diff import diff_lines

        a, b = (find_artifact(getattr(arguments, side), arguments.runs, side.upper()) for side in ("a", "b"))
        print("\n".join(diff_lines(a, b, whole=arguments.all)))
        return EXIT_FAILED if lineage_faults(a, b) else EXIT_DONE
    if arguments.artifact is not None:
        directory = find_artifact(arguments.artifact, arguments.runs)
        if arguments.command == "verify":
            return verify_all(family(directory), arguments.cache)
        print("\n".join(ancestry(directory)))
        return EXIT_FAILED if lineage_faults(directory) else EXIT_DONE
    found = sorted(path.parent for path in arguments.runs.glob("*/*/stage.json"))
    if not found:
        raise ConfigError(Fault("--runs", f"must hold artifacts; got {arguments.runs}; run a stage first"))
    nodes = [read_node(path) for path in found]
    if arguments.command == "verify":
        return verify_all(nodes, arguments.cache)
    for node in nodes:
        print(f"{node.directory.parent.name}/{describe(node)}")
        if node.edges_fault:
            print(f"  FAULT {node.edges_fault}")
    return EXIT_FAILED if any(node.edges_fault for node in nodes) else EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """The command: 0 when all is well, 1 when something does not verify or lineage lost, 2 for what the user gave."""
    arguments = parse(argv)
    try:
        return run(arguments)
    except (ConfigError, ArtifactError) as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG


if __name__ == "__main__":
    sys.exit(main())
