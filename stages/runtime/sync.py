"""Brings what runs left on the disk to W&B later: rows, configuration and edges of every artifact in a folder.

The source is ``metrics.jsonl``, ``lineage.json`` and ``stage.json``, never W&B's own offline files, which a crash cuts
short. A second ``sync`` adds nothing: a run has one id for life, its summary knows the last row that arrived
(``journal/row``), and W&B recognises an artifact by its content. The tests hold W&B's own client against a recorder of
its protocol, which assumes that last rule and refuses whatever it does not know; W&B's server was not spoken to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.base import ConfigError, Fault
from stages.runtime import artifact
from stages.runtime.edges import LINEAGE_FILE, read_edges, sealed_digest
from stages.runtime.journal import RESERVED, Row, current_rows
from stages.runtime.mirror import RunIdentity, WandbMirror, has_api_key
from stages.runtime.scrub import scrub


def sync(runs_dir: Path) -> list[str]:
    """Replay every artifact below ``runs_dir`` into W&B, parents first; returns a line an artifact.

    A stage that is running is left to its own mirror. Raises ``ConfigError`` without an API key or an artifact.
    """
    if not has_api_key():
        raise ConfigError(
            Fault(
                "tracking.wandb", "must be able to log in to sync; got no API key; set WANDB_API_KEY, or `wandb login`"
            )
        )
    directories = artifacts(Path(runs_dir))
    if not directories:
        raise ConfigError(
            Fault("runs", f"must hold artifacts with {LINEAGE_FILE} to sync; got {runs_dir}; run a stage")
        )
    return [_sync_one(directory) for directory in directories]


def artifacts(runs_dir: Path) -> list[Path]:
    """Artifact directories with tracked runs below ``runs_dir``, each after those whose outputs it took in."""
    waiting = {path.parent.resolve() for path in runs_dir.rglob(LINEAGE_FILE)}
    ordered: list[Path] = []
    while waiting:
        ready = sorted(path for path in waiting if not (parents(path) & waiting - {path}))
        # A cycle cannot come from a run; should files have been edited into one, any order will do.
        ready = ready or sorted(waiting)
        ordered += ready
        waiting -= set(ready)
    return ordered


def parents(directory: Path) -> set[Path]:
    """Artifact directories whose outputs this artifact took in."""
    content = read_edges(directory) or {"inputs": []}
    return {(directory / edge["path"]).resolve().parent for edge in content["inputs"]}


def _sync_one(directory: Path) -> str:
    record = artifact.read_record(directory) or {}
    if record.get("state") == "running" and artifact.process_is_alive(record) is not False:
        return f"{directory.name}: is running on {record.get('host')}; left to itself"
    content = read_edges(directory) or {}
    # The same that the lifecycle gave the live mirror, so that a replay changes no field of a run that was online.
    config = scrub({**record.get("identity", {}), "config": record.get("config", {})})
    # Nobody waits for this process to die, so it may take as long as the upload does.
    mirror = WandbMirror(directory, RunIdentity(**content["run"]), config, "online", finish_timeout_s=0.0)
    already = mirror.mirrored_rows
    rows = [row for row in current_rows(directory) if row.number > already]
    gone = list(_replay_edges(mirror, directory, content))
    for row in rows:
        _replay_row(mirror, row)
    lost = mirror.confirm()
    mirror.finish(record.get("state", "failed"))
    if lost or mirror.failure:
        return f"{directory.name}: FAILED, {lost or mirror.failure}; sync again, what arrived is not sent twice"
    missing = f"; no longer on the disk: {', '.join(gone)}" if gone else ""
    return f"{directory.name}: {len(rows)} rows sent, {already} were there, run {content['run']['id']}{missing}"


def _replay_row(mirror: WandbMirror, row: Row) -> None:
    values = {name: value for name, value in row.values.items() if name not in RESERVED}
    mirror.log(row.values["event"], row.values["step"], values, row.number)


def _replay_edges(mirror: WandbMirror, directory: Path, content: dict[str, Any]) -> Iterator[str]:
    """Declare inputs and outputs that are still what they were; yields the names of the pruned and the replaced."""
    sides: list[tuple[str, Callable[..., None]]] = [
        ("inputs", mirror.use_artifact),
        ("outputs", mirror.log_artifact),
    ]
    for side, declare in sides:
        for edge in content[side]:
            path = directory / edge["path"]
            if sealed_digest(path) == edge["digest"]:
                declare(edge["name"], edge["type"], path, {**edge["metadata"], "digest": edge["digest"]})
            else:
                yield edge["name"]
