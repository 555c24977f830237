"""Whether a stage's artifact is what the recipe asks for, and if not, why not, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from pipelines.chain import Chain, Node
from stages.base import Fault
from stages.runtime import artifact
from stages.runtime.artifact import ArtifactError
from stages.runtime.manifest import damage_at_a_glance


@dataclass(frozen=True)
class Standing:
    """``state`` is ``done`` or why it is not; ``reasons`` are for people; ``record`` is the artifact's stage.json.

    Where a longer run extends what is done, ``record`` is that of the shorter one, and the reason tells of the longer.
    """

    state: str
    reasons: list[str]
    record: Mapping[str, Any] | None = None
    refusal: Fault | None = None
    """Why a run of it is refused, with what to set; a plan may still be made."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.state == "done"


def standings(chain: Chain) -> dict[str, Standing]:
    """Each stage's standing, by name."""
    return {node.name: standing(node) for node in chain}


def standing(node: Node) -> Standing:
    """Where one stage stands, from the ``stage.json`` of its key's directory and of its neighbours."""
    job = node.job
    try:
        record = artifact.read_record(job.directory)
    except ArtifactError as error:
        return Standing("failed", [str(error)])
    if record is None:
        return Standing("stale", _why_new(node))
    if record["key"] != job.key:
        return Standing("failed", [f"{job.directory} belongs to another key; move it away"])
    if artifact.is_done(record, job):
        finished = artifact.finished_of(record, job.directory) or record
        return _damaged(node, finished) or Standing("done", extension_story(record, job.directory), finished)
    return _longer(node, record) or _unfinished(node, record)


def _unfinished(node: Node, record: Mapping[str, Any]) -> Standing:
    directory = node.job.directory
    if record["state"] == "done" and record["extension"] != dict(node.job.extension):
        changes = leaf_changes(record["extension"], dict(node.job.extension))
        return Standing("extended", [f"extended: {', '.join(changes)}"], record)
    if record["state"] == "done":
        return Standing("stale", [f"its output is gone from {artifact.shown(directory)}"], record)
    state, what = _state_in_words(record, directory)
    return Standing(state, extension_story(record, directory) or [what], record)


def _state_in_words(record: Mapping[str, Any], directory: Path) -> tuple[str, str]:
    """The state of a run that is not done, as it is by now, and a sentence on it."""
    state = record["state"]
    step = artifact.reached_step(directory, record)
    at_step = "" if step is None else f" at step {step}"
    if state == "running":
        alive = artifact.process_is_alive(record)
        who = f"process {record['pid']} on {record['host']}"
        if alive is not False:
            note = "" if alive else ", which cannot be seen from here"
            return "running", f"running since {record['started_at']} as {who}{note}"
        return "interrupted", f"interrupted{at_step}: {who} is dead"
    return ("saved", f"saved{at_step}") if state == "saved" else ("failed", f"failed{at_step}: {record['error']}")


def extension_story(record: Mapping[str, Any], directory: Path) -> list[str]:
    """One line on a longer run that extends a finished one and is not finished itself; none where there is none."""
    finished = artifact.finished_of(record, directory)
    if finished is None or finished is record or finished["extension"] == record["extension"]:
        return []
    changes = ", ".join(leaf_changes(finished["extension"], record["extension"]))
    settings = " ".join(f"--set {record['stage']}.{name}={value}" for name, value in record["extension"].items())
    go_on = "" if (told := _state_in_words(record, directory))[0] == "running" else f"; {settings} goes on with it"
    return [f"finished at step {finished['step']}, which stays; extension ({changes}) {told[1]}{go_on}"]


def _damaged(node: Node, record: Mapping[str, Any]) -> Standing | None:
    """The standing of a finished artifact whose files are not those that were sealed, by names and sizes alone."""
    damage = damage_at_a_glance(node.job.directory / "output", record.get("output_digest"))
    if damage is None:
        return None
    there = artifact.shown(node.job.directory)
    way = f"restore {there}/output, or rm -r {there} and run {node.name} again"
    message = f"must be whole where it is finished; got an output in which {damage}; {way}"
    return Standing("damaged", [f"damaged: {damage}; {way}"], record, Fault(node.name, message))


def _longer(node: Node, record: Mapping[str, Any]) -> Standing | None:
    """The standing of an artifact that holds a longer run than the recipe asks for.

    What has been trained cannot be untrained in the same directory, and what the recipe's children would be made from
    is not what lies there.
    """
    step = artifact.reached_step(node.job.directory, record) or 0
    for field, wanted in node.job.extension.items():
        before = record["extension"].get(field)
        trained = before if record["state"] == "done" else min(before or step, step)
        if (finished := artifact.finished_of(record, node.job.directory)) is not None:
            trained = max(trained, finished["extension"].get(field) or 0)
        if isinstance(trained, int) and isinstance(wanted, int) and wanted < trained:
            there, path = artifact.shown(node.job.directory), f"{node.name}.{field}"
            go_on = before if isinstance(before, int) else trained
            reason = f"holds {trained} of {field}, the recipe asks for {wanted}: set {path}={go_on} to go on from it"
            message = (
                f"must be at least {trained}, which {there} has already done; got {wanted}; set it in the recipe or by "
                f"--set {path}={go_on}, or move that directory away to start over"
            )
            return Standing("longer", [reason], record, Fault(path, message))
    return None


def extension_notes(node: Node) -> list[str]:
    """What a longer run of a finished ``node`` leaves behind: artifacts that were made from its present output."""
    found = standing(node)
    finished = artifact.finished_of(found.record, node.job.directory)
    if finished is None or found.done or found.refusal is not None:
        return []
    left = [directory.name for directory in _made_from(node.job.directory)]
    changes = ", ".join(leaf_changes(finished["extension"], dict(node.job.extension)))
    if not left or not changes:
        return []
    return [
        f"extending {node.name} ({changes}) replaces the output that {', '.join(left)} came from, once it is finished: "
        "they stay as they are but belong to no recipe any more, and their stages run anew; copy "
        f"{artifact.shown(node.job.directory)} first, or give the longer run another stage's name, to keep both"
    ]


def _made_from(directory: Path) -> list[Path]:
    """Finished artifacts of the same pipeline whose ancestors ``directory`` is among, parents before children."""
    done = []
    for path in sorted(directory.parent.glob(f"*/{artifact.RECORD}")):
        try:
            record = artifact.read_record(path.parent)
        except ArtifactError:
            continue
        if (finished := artifact.finished_of(record, path.parent)) is not None:
            done.append((path.parent, [Path(link["path"]) for link in finished["parents"].values()]))
    family = [directory]
    for parent in family:
        family += [child for child, parents in done if parent in parents and child not in family]
    return family[1:]


def _why_new(node: Node) -> list[str]:
    """Why the key has no artifact: what differs from the nearest artifact of the same stage."""
    others = list(variants(node.job.directory.parent, node.name))
    if not others:
        return ["never run"]
    compared = [(list(_differences(node, other)), other) for other in others]
    reasons, _ = min(compared, key=lambda pair: (len(pair[0]), _age_key(pair[1])))
    return reasons or ["never run under this key"]


def variants(pipeline: Path, name: str) -> Iterator[dict[str, Any]]:
    """The readable records of a stage's artifacts in a pipeline's directory, each with its ``directory``."""
    for path in sorted(pipeline.glob(f"{name}-*/{artifact.RECORD}")):
        try:
            record = artifact.read_record(path.parent)
        except ArtifactError:
            continue
        if record is not None and record["stage"] == name:
            yield {**record, "directory": path.parent}


def _age_key(record: Mapping[str, Any]) -> float:
    return artifact.seconds_since(record["started_at"])


def _differences(node: Node, record: Mapping[str, Any]) -> Iterator[str]:
    old, new = record["identity"], node.job.identity
    if old["kind"] != new["kind"]:
        yield f"{node.name}.kind {old['kind']} -> {new['kind']}"
        return
    if old["code_version"] != new["code_version"]:
        yield f"code version {old['code_version']} -> {new['code_version']}"
    yield from leaf_changes(old["config"], new["config"], node.name)
    yield from leaf_changes(old["model"], new["model"], "model")
    yield from leaf_changes(old["seed"], new["seed"], "seed")
    for field in sorted(old["parents"].keys() | new["parents"].keys()):
        if old["parents"].get(field) != new["parents"].get(field):
            yield _parent_change(node, field, record)
    # Sources that came or went are a change of the config, which is named above.
    for source in sorted(old["sources"].keys() & new["sources"].keys()):
        if old["sources"][source] != new["sources"][source]:
            yield f"source {source} changed"


def _parent_change(node: Node, field: str, record: Mapping[str, Any]) -> str:
    new = node.job.parents.get(field)
    old = record["parents"].get(field)
    if old is None or new is None:
        return f"parent {field.rstrip('_')} {'added' if old is None else 'removed'}"
    return f"parent {new.stage} changed" if old["stage"] == new.stage else f"parent {old['stage']} -> {new.stage}"


def leaf_changes(old: Any, new: Any, path: str = "") -> list[str]:
    """``path old -> new`` for each leaf that differs; of lists of sections that cannot be paired, their names."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        below = f"{path}." if path else ""
        return [change for name in names for change in leaf_changes(old.get(name), new.get(name), f"{below}{name}")]
    if old == new:
        return []
    if _are_sections(old) and _are_sections(new):
        if [_section_name(one) for one in old] == [_section_name(one) for one in new]:
            pairs = zip(old, new, strict=True)
            return [change for number, pair in enumerate(pairs) for change in leaf_changes(*pair, f"{path}.{number}")]
        return [f"{path} {_names(old)} -> {_names(new)}"]
    return [f"{path} {plain(old)} -> {plain(new)}"]


def _are_sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _section_name(section: Mapping[str, Any]) -> str:
    return str(section.get("name", section.get("type", "?")))


def _names(sections: list[Mapping[str, Any]]) -> str:
    names = [_section_name(section) for section in sections]
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"


def plain(value: Any) -> str:
    """A value for one line: ``2e-4`` for 0.0002, ``none`` for None, long things cut."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
        mantissa = "".join(map(str, digits))
        point = f"{mantissa[0]}.{mantissa[1:]}".rstrip(".")
        return f"{'-' if sign else ''}{point}e{int(exponent) + len(mantissa) - 1}"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
