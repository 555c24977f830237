"""``diff A B``: what differs between the ancestries of two artifacts, by stage: config, data, code, seed and the rest.

Each side is the artifact with all its ancestors. Artifacts are paired: the same directory with itself, the two that
were asked about when they are of one kind, then by stage name, then by kind where one of it is left on either side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.lineage_read import SHORT, Node, family, lineage_faults
from pipelines.lineage_verify import changed_files, some
from pipelines.staleness import leaf_changes, plain
from stages.runtime.code import read_code

ITEMS = 6
"""Lines of one category of one stage that are shown, so that a comparison stays one screen."""
DECIDES = ("config", "data", "code", "seed")
"""What is named as the same where nothing of it differs."""


@dataclasses.dataclass(frozen=True)
class Pairing:
    """The two families by pairs, and those without a counterpart."""

    same: list[Node]
    pairs: list[tuple[Node, Node]]
    only_a: list[Node]
    only_b: list[Node]


def pair_up(a: Path, b: Path) -> Pairing:
    """Pair the families of two artifact directories; pairs stand from the artifacts down to the raw data."""
    left, right = family(a), family(b)
    both = {node.directory for node in left} & {node.directory for node in right}
    same = [node for node in left if node.directory in both]
    left, right = ([node for node in side if node.directory not in both] for side in (left, right))
    pairs: list[tuple[Node, Node]] = []

    def take(one: Node, other: Node) -> None:
        pairs.append((one, other))
        left.remove(one)
        right.remove(other)

    asked = [side[0] for side in (left, right) if side and side[0].directory in (a.resolve(), b.resolve())]
    if len(asked) == 2 and _kind(asked[0]) == _kind(asked[1]):
        take(*asked)
    for label in (lambda node: node.stage, _kind):
        for one, other in _matches(left, right, label):
            take(one, other)
    return Pairing(same, pairs, left, right)


def _matches(left: Sequence[Node], right: Sequence[Node], label: Callable[[Node], str]) -> list[tuple[Node, Node]]:
    """Pairs of equal labels, where each side has one of them."""
    found = []
    for one in left:
        mine = [node for node in left if label(node) == label(one)]
        theirs = [node for node in right if label(node) == label(one)]
        if len(mine) == len(theirs) == 1:
            found.append((one, theirs[0]))
    return found


def _kind(node: Node) -> str:
    return str(node.record.get("kind", node.stage))


def diff_lines(a: Path, b: Path, *, whole: bool = False) -> list[str]:
    """The comparison as text; ``whole`` shows every item."""
    found = pair_up(a, b)
    lines = [f"A  {a.resolve().parent.name}/{a.resolve().name}", f"B  {b.resolve().parent.name}/{b.resolve().name}"]
    lines += [f"FAULT {fault}" for fault in lineage_faults(a, b)]
    if found.same:
        lines.append(f"one and the same in both: {', '.join(node.name for node in found.same)}")
    for one, other in found.pairs:
        lines += _pair_lines(one, other, whole)
    for title, nodes in (("only in A", found.only_a), ("only in B", found.only_b)):
        lines += [f"{title}: {node.name}  {_kind(node)}  key {_key(node)}" for node in nodes]
    return lines


def _key(node: Node) -> str:
    return str(node.record.get("key", "?"))[:SHORT]


def _pair_lines(one: Node, other: Node, whole: bool) -> list[str]:
    categories = {name: list(items) for name, items in _categories(one, other)}
    outputs = [(node.digest or "none")[:SHORT] for node in (one, other)]
    result = f"same output {outputs[0]}" if outputs[0] == outputs[1] else f"output {outputs[0]} -> {outputs[1]}"
    lines = [f"{one.name} -> {other.name}  {result}"]
    for name, items in categories.items():
        shown = items if whole else items[:ITEMS]
        lines += [f"  {name if number == 0 else '':<9} {item}" for number, item in enumerate(shown)]
        if len(shown) < len(items):
            lines.append(f"  {'':<9} and {len(items) - len(shown)} more: --all shows them")
    equal = [name for name in DECIDES if not categories[name]]
    if equal:
        lines.append(f"  {'same':<9} {', '.join(equal)}")
    if not any(categories.values()) and outputs[0] != outputs[1]:
        lines.append("  nothing that is recorded differs, and yet the outputs do: look at it before trusting either")
    return lines


def _categories(one: Node, other: Node) -> Iterator[tuple[str, Iterator[str] | list[str]]]:
    old, new = one.record, other.record
    yield "config", _config_changes(old, new)
    yield "model", leaf_changes(_identity(old).get("model"), _identity(new).get("model"), "model")
    yield "seed", leaf_changes(_seed(old), _seed(new), "seed")
    yield "data", [*_input_changes(old, new), *_source_changes(old, new)]
    yield "code", _code_changes(one, other)
    yield "software", leaf_changes(old.get("versions"), new.get("versions"))
    yield "machine", [*leaf_changes(old.get("hardware"), new.get("hardware")), *_ranks(old, new)]
    yield "operation", _operational_changes(old, new)
    yield "gates", leaf_changes(_overridden(old), _overridden(new), "overridden")


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("identity") or {}


def _seed(record: dict[str, Any]) -> Any:
    return record.get("seed", _identity(record).get("seed"))


def _config_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields that decide the result, and those by which a longer run extends an artifact."""
    found = leaf_changes(_identity(old).get("config", {}), _identity(new).get("config", {}))
    return found + leaf_changes(old.get("extension", {}), new.get("extension", {}))


def _operational_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields that differ and cannot change the result; inputs stand under data."""
    inputs = {field.rstrip("_") for record in (old, new) for field in record.get("parents", {})}
    decided = {change.partition(" ")[0] for change in _config_changes(old, new)}
    found = leaf_changes(old.get("config", {}), new.get("config", {}))
    return [change for change in found if (path := change.partition(" ")[0]) not in decided and path not in inputs]


def _input_changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    before, after = old.get("parents", {}), new.get("parents", {})
    for field in sorted(before.keys() | after.keys()):
        one, other = before.get(field), after.get(field)
        if one is None or other is None:
            yield f"input {field.rstrip('_')} {'added' if one is None else 'removed'}: {(one or other or {})['stage']}"
        elif one.get("digest") != other.get("digest"):
            names = [f"{link['stage']}-{link['key'][:8]}" for link in (one, other)]
            yield f"input {field.rstrip('_')} {names[0]} -> {names[1]}"


def _source_changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    before, after = old.get("sources", {}), new.get("sources", {})
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield f"source {name} {'added' if name not in before else 'removed'}"
        elif before[name] != after[name]:
            mine, theirs = (set(str(pins[name]).split(" ")) for pins in (before, after))
            gone, come = " ".join(sorted(mine - theirs)), " ".join(sorted(theirs - mine))
            yield f"source {name} {plain(gone)} -> {plain(come)}"


def _code_changes(one: Node, other: Node) -> Iterator[str]:
    old, new = one.record, other.record
    yield from leaf_changes(old.get("code_version"), new.get("code_version"), "code_version")
    if old.get("code_digest") and old.get("code_digest") == new.get("code_digest"):
        return
    yield from leaf_changes(_commit(old), _commit(new), "commit")
    files = read_code(one.directory), read_code(other.directory)
    if all(files):
        changed = changed_files(*files)
        yield f"{len(changed)} files: {some(changed, 4)}"
    elif any("git" in record for record in (old, new)):
        yield "which files is not known: an artifact from before they were listed"


def _commit(record: dict[str, Any]) -> str | None:
    git = record.get("git") or {}
    if not git.get("commit"):
        return None
    return git["commit"][:SHORT] + (" and changes" if git.get("dirty") else "")


def _ranks(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return leaf_changes(old.get("world_size"), new.get("world_size"), "ranks")


def _overridden(record: dict[str, Any]) -> list[str]:
    return [f"{gate.get('stage')} {gate.get('metric')}" for gate in record.get("overridden_gates") or ()]
