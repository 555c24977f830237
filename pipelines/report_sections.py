"""The report's sections as plain data for its template, worked out from what was read of the stages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from pipelines.comparison import Beside, Comparison, beside, compare, mismatches
from pipelines.paired import Verdict, difference
from pipelines.report_charts import Chart, forest_svg, training_charts
from pipelines.report_format import cell, duration
from pipelines.report_read import StageView
from pipelines.scores import SCORED, Evaluation, Score
from pipelines.table import figure, size
from stages.base import ConfigError

MAX_BANDS = 12
"""Scores that get a drawing, the first of each suite before the second of any."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model's score; ``verdict`` compares it with its parent's; ``other_set`` marks another set than the row's."""

    score: Score | None
    verdict: Verdict | None = None
    other_set: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """One model: a stage of the recipe, or an artifact elsewhere that a stage evaluates; and what it started from."""

    name: str
    subject: str | None


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """One score over all models."""

    name: str
    unit: str
    better: str
    cells: list[Cell]
    is_part: bool = False
    """Whether it is one of a part of the set, other than bits per byte."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """The stage-by-score table; ``rows`` are by suite."""

    columns: list[Column]
    rows: list[tuple[str, list[ScoreRow]]]
    charts: list[Chart]
    not_run: list[tuple[str, str, list[str]]]
    """Suite, why, and the evaluations that left it out."""


@dataclasses.dataclass(frozen=True)
class Variants:
    """Models of one kind from one parent, compared; or why they cannot be."""

    title: str
    found: Comparison | None = None
    fault: str = ""
    missing: list[str] = dataclasses.field(default_factory=list)


def models(stages: Sequence[StageView]) -> list[StageView]:
    """The stages that make a model."""
    return [stage for stage in stages if stage.produces == "model"]


def columns_of(stages: Sequence[StageView]) -> list[Column]:
    """All models, those from elsewhere first."""
    outside = [stage.outside for stage in stages if stage.produces == SCORED and stage.outside is not None]
    elsewhere = [Column(name, None) for name in dict.fromkeys(outside)]
    return [*elsewhere, *(Column(stage.name, stage.subject) for stage in models(stages))]


def evaluations(stages: Sequence[StageView]) -> dict[str, list[Evaluation]]:
    """What was measured of each model, by its name."""
    found: dict[str, list[Evaluation]] = {column.name: [] for column in columns_of(stages)}
    for stage in stages:
        if stage.evaluation is not None and stage.subject in found:
            found[stage.subject].append(stage.evaluation)
    return found


def score_table(stages: Sequence[StageView]) -> Scores:
    """Every score of every model, each beside its interval, its n and how it stands to the model's parent."""
    columns, measured = columns_of(stages), evaluations(stages)
    by_model = {
        name: {score.name: score for each in found for score in each.scores} for name, found in measured.items()
    }
    suites: dict[str, list[str]] = {}
    for scores in by_model.values():
        for score in scores.values():
            names = suites.setdefault(score.suite, [])
            names += [] if score.name in names else [score.name]
    rows = [(suite, [_row(name, columns, by_model) for name in names]) for suite, names in suites.items()]
    left: dict[tuple[str, str], list[str]] = {}
    for each in (each for found in measured.values() for each in found):
        for suite, why in each.not_run.items():
            left.setdefault((suite, cell(why)), []).append(each.stage)
    return Scores(columns, rows, _bands(columns, rows), [(suite, why, who) for (suite, why), who in left.items()])


def _row(name: str, columns: Sequence[Column], by_model: dict[str, dict[str, Score]]) -> ScoreRow:
    cells: list[Cell] = []
    first = next(scores[name] for scores in by_model.values() if name in scores)
    for column in columns:
        score = by_model[column.name].get(name)
        parent = by_model.get(column.subject or "", {}).get(name)
        other = score is not None and score.set_hash != first.set_hash
        cells.append(Cell(score, _verdict(parent, score), other))
    is_part = first.part is not None and first.suite != "bpb"
    return ScoreRow(name, first.unit, first.better, cells, is_part)


def _verdict(parent: Score | None, score: Score | None) -> Verdict | None:
    """How a model stands to its parent; nothing where the two were not measured alike (TRAPS M3)."""
    if parent is None or score is None or mismatches(("parent", "model"), (parent, score)):
        return None
    try:
        return difference(parent, score).verdict
    except ConfigError:
        return "not paired"


def _bands(columns: Sequence[Column], rows: Sequence[tuple[str, list[ScoreRow]]]) -> list[Chart]:
    """Drawings of the scores that at least two models have on one set."""
    drawn: list[tuple[int, Chart]] = []
    for _, suite in rows:
        for place, row in enumerate(suite):
            if row.is_part:
                continue
            points = [
                (column.name, each.score.value, each.score.interval)
                for column, each in zip(columns, row.cells, strict=True)
                if each.score is not None and each.score.value is not None and not each.other_set
            ]
            if len(points) > 1 and place < MAX_BANDS:
                drawn.append((place, Chart(f"{row.name}, {row.unit}", forest_svg(row.name, points))))
    return [chart for _, chart in sorted(drawn, key=lambda pair: pair[0])[:MAX_BANDS]]


def variants(stages: Sequence[StageView]) -> list[Variants]:
    """Each family of models of one kind from one parent, the first of them the baseline."""
    families: dict[tuple[str, str], list[str]] = {}
    for stage in models(stages):
        if stage.subject is not None:
            families.setdefault((stage.kind, stage.subject), []).append(stage.name)
    measured = evaluations(stages)
    return [_family(names, measured) for names in families.values() if len(names) > 1]


def _family(names: Sequence[str], measured: dict[str, list[Evaluation]]) -> Variants:
    title = " / ".join(names)
    missing = [name for name in names if not measured[name]]
    there = {name: measured[name] for name in names if measured[name]}
    if len(there) < 2:
        return Variants(title, missing=missing)
    try:
        return Variants(title, compare(there), missing=missing)
    except ConfigError as error:
        return Variants(title, fault=str(error), missing=missing)


def samples(stages: Sequence[StageView]) -> tuple[list[str], list[Beside]]:
    """The models that have samples, and each prompt with what they said."""
    measured = {name: [s for each in found for s in each.samples] for name, found in evaluations(stages).items()}
    names = [name for name, found in measured.items() if found]
    return names, beside([measured[name] for name in names])


def parity(stages: Sequence[StageView]) -> list[dict[str, Any]]:
    """What each export measured of itself."""
    found = []
    for stage in stages:
        if stage.parity is None:
            continue
        rows = [row for row in stage.parity.get("rows") or [] if isinstance(row, dict)]
        rest = {name: value for name, value in stage.parity.items() if name not in ("rows", "not_run", "format")}
        found.append(
            {
                "name": stage.name,
                "facts": [(name, value) for name, value in rest.items() if not isinstance(value, list)],
                "columns": list(dict.fromkeys(name for row in rows for name in row)),
                "rows": rows,
                "not_run": dict(stage.parity.get("not_run") or {}),
            }
        )
    return found


def facts(stages: Sequence[StageView]) -> list[tuple[str, str]]:
    """What the chain ran on and with: one line where all stages agree, else each value with its stages."""
    read = {
        "commit": lambda record: _commit(record.get("git") or {}),
        "hardware": lambda record: _hardware(record.get("hardware") or {}),
        "versions": lambda record: ", ".join(
            f"{name} {found}" for name, found in (record.get("versions") or {}).items()
        ),
        "ranks": lambda record: str(record.get("world_size", "")),
        "model": lambda record: _model(record),
    }
    ran = [stage for stage in stages if stage.record]
    found = []
    for name, of in read.items():
        values: dict[str, list[str]] = {}
        for stage in ran:
            if value := of(stage.record):
                values.setdefault(value, []).append(stage.name)
        lines = list(values) if len(values) == 1 else [f"{value} ({', '.join(who)})" for value, who in values.items()]
        found += [(name if place == 0 else "", line) for place, line in enumerate(lines)]
    total = sum(stage.record.get("elapsed_s") or 0.0 for stage in ran)
    return [*found, ("time in stages", duration(total))] if ran else [("", "not run: no stage has an artifact yet")]


def _commit(git: dict[str, Any]) -> str:
    commit = git.get("commit")
    if commit is None:
        return "no commit"
    return f"{commit[:12]}{' with changes' if git.get('dirty') else ''}"


def _hardware(found: dict[str, Any]) -> str:
    gpus = found.get("gpus") or []
    cards = f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU"
    return f"{found.get('cpu')}, {found.get('cores')} cores, {size(found.get('memory_bytes') or 0)}, {cards}"


def _model(record: dict[str, Any]) -> str:
    spec = record.get("model")
    if not spec:
        return ""
    shape = f"{spec.get('layers')}, d_model {spec.get('d_model')}, vocabulary {spec.get('vocab_size')}"
    count = (record.get("metrics") or {}).get("parameters")
    return f"{shape}, {count:,} parameters" if isinstance(count, int) else shape


def licences(stages: Sequence[StageView]) -> list[tuple[str, str, str]]:
    """Source, stage and licence of everything that the chain took in."""
    found: list[tuple[str, str, str]] = []
    for stage in stages:
        sources = (stage.record.get("config") or {}).get("sources")
        named = [*(sources if isinstance(sources, list) else []), *stage.sources]
        those = [source for source in named if isinstance(source, dict) and source.get("licence")]
        # What the stage found declared comes last, and does not repeat what the recipe says.
        said = {_source(source): (_source(source), stage.name, str(source["licence"])) for source in reversed(those)}
        found += reversed(said.values())
    return found


def _source(source: dict[str, Any]) -> str:
    name = str(source.get("name", source.get("type")))
    return f"{name} {source['version']}" if source.get("version") and "package" not in source else name


def stage_section(stage: StageView) -> dict[str, Any]:
    """What the template needs of one stage."""
    record = stage.record
    words = [stage.kind, f"key {stage.key[:12]}"]
    words += [f"from {', '.join(dict.fromkeys(stage.parents.values()))}"] if stage.parents else []
    words += [f"started {record['started_at']}"] if record.get("started_at") else []
    words += [duration(record["elapsed_s"])] if record.get("elapsed_s") else []
    words += [f"resumed after step {', '.join(map(str, stage.resumed_at))}"] if stage.resumed_at else []
    return {
        "name": stage.name,
        "state": stage.state,
        "reasons": stage.reasons,
        "line": " · ".join(words),
        "notices": stage.notices,
        "alerts": stage.alerts,
        "pages": stage.pages,
        "summary": record.get("summary") or [],
        "charts": [] if stage.produces == SCORED else training_charts(stage),
        "figures": [(name, figure(name, value)) for name, value in (record.get("metrics") or {}).items()],
        "taken": stage.taken,
        "config": json.dumps(record["config"], indent=1, ensure_ascii=False) if record.get("config") else "",
    }
