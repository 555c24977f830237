"""``--status``: what each stage's artifacts say of themselves, the one of the recipe's key marked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.chain import Chain, Node
from pipelines.gates_graph import gates_of
from pipelines.staleness import extension_story, standing, variants
from pipelines.table import age, with_last_column
from stages.runtime import artifact
from stages.runtime.journal import broken_lines


def status(chain: Chain) -> list[dict[str, Any]]:
    """One entry an artifact, stages in the recipe's order; ``current`` marks the recipe's key.

    A finished evaluation with gates has its judgements under ``gates``, and the state ``gate closed`` where they stop
    the chain.
    """
    return [_with_broken_lines(_with_gates(chain, node, entry)) for node in chain for entry in _entries(node)]


def status_lines(entries: list[dict[str, Any]], width: int | None = None) -> list[str]:
    """The status for a person; notes are cut to ``width`` columns, or stand below where the table leaves no room."""
    headers = ["", "artifact", "state", "step", "loss", "bpb", "tok/s", "checkpoint", "last sign", "note"]
    rows = [
        [
            "*" if entry["current"] else " ",
            f"{entry['stage']}-{entry['key'][:8]}",
            entry["state"],
            _of(entry["step"], entry["max_steps"]),
            _number(entry["loss"], ".4f"),
            _number(entry["bpb"], ".4f"),
            _number(entry["tokens_per_s"], ",.0f"),
            _ago(entry["checkpoint_age_s"]),
            _ago(entry["age_s"]),
            "; ".join(filter(None, [entry.get("alarms") and f"ALARM: {entry['alarms']}", entry["note"]])),
        ]
        for entry in entries
    ]
    return [*with_last_column(headers, rows, width), "", "* the artifact of the recipe as it stands"]


def _with_gates(chain: Chain, node: Node, entry: dict[str, Any]) -> dict[str, Any]:
    """``entry`` with what its gates say, in the note as well."""
    if not (gates_of(node.job.config) and entry["current"] and entry["state"] == "done"):
        return entry
    from pipelines.gates import judge, line, plain, verdict_of

    try:
        found = judge(chain, node)
    except artifact.ArtifactError as error:
        return {**entry, "state": "gate closed", "note": f"its gates cannot be judged: {error}"}
    told = [line(one) for one in found if one.closed]
    note = "; ".join(told) or f"gates: {verdict_of(found)}"
    state = "gate closed" if told else entry["state"]
    return {**entry, "state": state, "note": note, "gates": [plain(one) for one in found]}


def _with_broken_lines(entry: dict[str, Any]) -> dict[str, Any]:
    """``entry`` with a word in the note on what cannot be read in the middle of its metrics."""
    broken = broken_lines(Path(entry["directory"]))
    if not broken:
        return entry
    which = f"line {broken[0]} is no row" if len(broken) == 1 else f"{len(broken)} lines are no rows, first {broken[0]}"
    return {**entry, "note": "; ".join(filter(None, [entry["note"], f"{artifact.METRICS}: {which}"]))}


def _entries(node: Node) -> list[dict[str, Any]]:
    found = standing(node)
    state, note = found.state, "; ".join(found.reasons)
    current = node.job.directory
    # Not read again: a record that cannot be read is one stage's note and must not hide the others.
    extended = found.done and bool(found.reasons)
    entries = [_entry(node.name, node.job.key, current, found.record, extended)]
    entries[0].update(state=state, note=note, current=True)
    for record in variants(current.parent, node.name):
        if record["directory"] != current:
            entry = _entry(node.name, record["key"], record["directory"], record)
            entries.append({**entry, "note": "; ".join(extension_story(record, record["directory"])) or entry["note"]})
    return entries


def _entry(
    stage: str, key: str, directory: Path, record: Mapping[str, Any] | None, extended: bool = False
) -> dict[str, Any]:
    """``extended`` where a longer run goes on from what ``record`` finished: the rows of metrics are that one's."""
    record = record or {}
    rows = {} if extended else artifact.last_events(directory)
    train, evaluated = (record["metrics"],) * 2 if extended else (rows.get("train", {}), rows.get("eval", {}))
    return {
        "stage": stage,
        "key": key,
        "directory": str(directory),
        "current": False,
        "state": _state(record),
        "step": train.get("step", record.get("step")),
        "max_steps": (record.get("config") or {}).get("max_steps"),
        "loss": next((train[name] for name in train if name.startswith(("loss", "final_loss"))), None),
        "bpb": evaluated.get("bpb"),
        "tokens_per_s": train.get("tokens_per_s"),
        "checkpoint_age_s": _checkpoint_age_s(directory),
        "age_s": _age_s(directory, record),
        "note": record.get("error") or "",
        "alarms": _standing_alarms(rows),
    }


def _standing_alarms(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What the newest row of an alarm says is wrong; empty where nothing is."""
    told = [rows[event] for event in ("alarm_loss", "alarm_heldout") if event in rows]
    return str(max(told, key=lambda row: row["time"])["standing"]) if told else ""


def _state(record: Mapping[str, Any]) -> str:
    """The recorded state, but for a process that is dead."""
    if record.get("state") == "running" and artifact.process_is_alive(record) is False:
        return "interrupted"
    return str(record.get("state", "never run"))


def _checkpoint_age_s(directory: Path) -> float | None:
    steps = artifact.checkpoint_steps(directory)
    if not steps:
        return None
    return time.time() - (directory / "checkpoints" / f"step-{steps[-1]:08d}" / "manifest.json").stat().st_mtime


def _age_s(directory: Path, record: Mapping[str, Any]) -> float | None:
    """Seconds since the artifact last said anything: its record, or a row of metrics."""
    if not record:
        return None
    metrics = directory / artifact.METRICS
    ages = [artifact.seconds_since(record["updated_at"])]
    ages += [time.time() - metrics.stat().st_mtime] if metrics.exists() else []
    return min(ages)


def _of(step: int | None, max_steps: int | None) -> str:
    if step is None:
        return "-"
    return str(step) if max_steps is None else f"{step}/{max_steps}"


def _number(value: Any, style: str) -> str:
    return format(value, style) if isinstance(value, int | float) else "-"


def _ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{age(seconds)} ago"
