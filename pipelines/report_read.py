"""What a report shows of each stage, read from its JSON files alone; what cannot be read becomes a notice, no error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.scores import SCORED, SUBJECT, Evaluation, read_evaluation, read_json
from pipelines.staleness import standing
from stages.base import ConfigError
from stages.runtime.artifact import ArtifactError, finished_of, read_record
from stages.runtime.edges import read_edges
from stages.runtime.journal import HISTORY, read_metrics

if TYPE_CHECKING:
    from pipelines.chain import Chain, Node

NOT_RUN = "not run"
ALERTS = ("alert", "alarm_loss", "alarm_heldout")
"""Rows of the journal whose text is for whoever looks after the run."""
PARITY = "parity.json"

T = TypeVar("T")


@dataclasses.dataclass
class StageView:
    """One stage as the report shows it; ``parents`` maps the input's field to the parent's name in the recipe."""

    name: str
    kind: str
    produces: str
    key: str
    state: str
    reasons: list[str]
    parents: dict[str, str]
    outside: str | None
    """The artifact elsewhere that it starts from, evaluates or exports, by its directory's name."""
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    alerts: list[str] = dataclasses.field(default_factory=list)
    resumed_at: list[int] = dataclasses.field(default_factory=list)
    taken: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluation: Evaluation | None = None
    parity: dict[str, Any] | None = None
    sources: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Sources with their licences as the stage found them, beside those that the recipe states."""
    pages: list[str] = dataclasses.field(default_factory=list)
    """Pages that the stage wrote for itself, relative to the runs of the pipeline."""
    notices: list[str] = dataclasses.field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether it is finished as the recipe stands."""
        return self.state == "done"

    @property
    def subject(self) -> str | None:
        """The model that it starts from, evaluates or exports."""
        return self.parents.get(SUBJECT, self.outside)


def read_stages(chain: Chain) -> list[StageView]:
    """All stages of the recipe in its order."""
    return [read_stage(node) for node in chain]


def read_stage(node: Node) -> StageView:
    """One stage, with whatever of its artifact can be read."""
    directory = node.job.directory
    state, reasons = _state(node)
    view = StageView(
        node.name, node.stage.kind, node.stage.produces, node.job.key, state, reasons, dict(node.parents),
        _outside(node),
    )  # fmt: skip
    if not directory.is_dir():
        return view
    view.record = _or_notice(view, lambda: _record(directory, state), {})
    nothing: list[dict[str, Any]] = []
    rows = _or_notice(view, lambda: read_metrics(directory), nothing)
    view.rows = [row for row in rows if row["event"] not in HISTORY]
    view.alerts = [str(row.get("text", row)) for row in rows if row["event"] in ALERTS]
    view.resumed_at = [int(row["step"]) for row in rows if row["event"] == "resume" and row["step"]]
    view.taken = _or_notice(view, lambda: list((read_edges(directory) or {"inputs": []})["inputs"]), [])
    if state == "done":
        _read_output(view, directory)
    return view


def _record(directory: Path, state: str) -> dict[str, Any]:
    """The artifact's record; while a longer run extends what is done, that of the finished one."""
    record = read_record(directory) or {}
    return dict(finished_of(record, directory) or {}) if state == "done" else record


def _outside(node: Node) -> str | None:
    link = node.job.parents.get(SUBJECT)
    return None if link is None or SUBJECT in node.parents else link.path.name


def _state(node: Node) -> tuple[str, list[str]]:
    try:
        found = standing(node)
    except ConfigError as error:
        return "refused", [fault.message for fault in error.faults]
    if found.record is None and found.state == "stale":
        return NOT_RUN, found.reasons
    return found.state, found.reasons


def _read_output(view: StageView, directory: Path) -> None:
    if view.produces == SCORED:
        view.evaluation = _or_notice(view, lambda: read_evaluation(view.name, directory), None)
    if (directory / "output" / PARITY).is_file():
        view.parity = _or_notice(view, lambda: read_json(directory / "output" / PARITY), None)

    view.pages = sorted(f"{directory.name}/output/{path.name}" for path in (directory / "output").glob("*.html"))
    if (directory / "output" / f"{view.kind}.json").is_file():
        view.sources = _or_notice(view, lambda: _sources(directory / "output" / f"{view.kind}.json"), [])


def _sources(path: Path) -> list[dict[str, Any]]:
    found = read_json(path).get("sources")
    return [source for source in found if isinstance(source, dict)] if isinstance(found, list) else []


def _or_notice(view: StageView, read: Callable[[], T], instead: T) -> T:
    try:
        return read()
    except (ArtifactError, ValueError, OSError, KeyError, TypeError) as error:
        view.notices.append(f"{type(error).__name__}: {error}")
        return instead
