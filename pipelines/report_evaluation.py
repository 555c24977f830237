"""The report's evaluation chapter: margins by domain, refusals, needles by place, programs, gates; each score apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.report_charts import Chart, forest_svg
from pipelines.scores import Score
from stages.base import ConfigError
from stages.runtime.artifact import ArtifactError

if TYPE_CHECKING:
    from pipelines.chain import Chain
    from pipelines.report_sections import ScoreRow, Scores

PARTS = {"domain": "by domain", "language": "by language", "difficulty": "by difficulty"}
"""Parts of ``margins`` in the order in which they are shown."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of a matrix: its name, and each model's score there."""

    name: str
    scores: list[Score | None]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Scores of one kind by part; a column is a model. ``chance`` is what guessing gives, where that is known."""

    title: str
    unit: str
    columns: list[str]
    groups: list[tuple[str, list[Line]]]
    chance: float | None = None
    drawn: Chart | None = None


@dataclasses.dataclass(frozen=True)
class Refusals:
    """One model's prompts: rows harmful and benign, columns refused and answered, and the classes that stand out."""

    model: str
    rows: list[tuple[str, Score, float]]
    """Category, the score, and the share that was answered."""
    classes: list[tuple[str, Score, str]]
    """Language or template, its score, and what is wrong with it; empty where nothing is."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """One model's needles: the share found by length (rows) and depth (columns)."""

    model: str
    title: str
    depths: list[str]
    rows: list[tuple[str, list[Score | None]]]


def main_rows(table: Scores) -> list[tuple[str, list[ScoreRow]]]:
    """The rows over a whole set, and bits per byte by language and source: what one reads first."""
    chosen = [(suite, [row for row in rows if suite == "bpb" or _part(row) is None]) for suite, rows in table.rows]
    return [(suite, rows) for suite, rows in chosen if rows]


def part_rows(table: Scores) -> list[tuple[str, list[ScoreRow]]]:
    """All other rows."""
    shown = {row.name for _, rows in main_rows(table) for row in rows}
    rest = [(suite, [row for row in rows if row.name not in shown]) for suite, rows in table.rows]
    return [(suite, rows) for suite, rows in rest if rows]


def margins(table: Scores) -> list[Matrix]:
    """Knowledge by domain, language and difficulty: one matrix a score, its domains drawn for the last model."""
    found = []
    rows = [row for suite, those in table.rows if suite == "margins" for row in those]
    for name in dict.fromkeys(_stem(row) for row in rows if _part(row) == "domain"):
        mine = [row for row in rows if _stem(row) == name and _part(row) in PARTS]
        columns = _having(table, mine)
        groups = [
            (title, _lines([row for row in mine if _part(row) == part], columns)) for part, title in PARTS.items()
        ]
        first = _first(mine)
        chance = first.settings.get("chance", first.settings.get("chance_accuracy")) if first.unit == "share" else None
        drawn = _domains(name, groups[0][1], [table.columns[place].name for place in columns], chance)
        found.append(Matrix(
            name, first.unit, [table.columns[place].name for place in columns],
            [(title, lines) for title, lines in groups if lines], chance, drawn,
        ))  # fmt: skip
    return found


def _domains(name: str, lines: Sequence[Line], models: Sequence[str], chance: float | None) -> Chart | None:
    points = [
        (line.name, score.value, score.interval)
        for line in lines
        if (score := line.scores[-1]) is not None and score.value is not None
    ]
    return Chart(f"{name} by domain, {models[-1]}", forest_svg(name, points, chance)) if len(points) > 1 else None


def beside_chance(score: Score, chance: float | None) -> str:
    """Whether the whole interval stands above what guessing gives; a point alone says nothing (TRAPS M6)."""
    bound = 0.0 if score.unit == "nats_per_token" else chance
    if bound is None or score.interval is None:
        return ""
    low, high = score.interval
    return "above chance" if low > bound else "below chance" if high < bound else "at chance"


def refusals(table: Scores) -> list[Refusals]:
    """Each model's refusals of harmful prompts and of benign look-alikes, and every class of them (TRAPS M8)."""
    rows = [row for suite, those in table.rows if suite == "safety" for row in those]
    found = []
    for place, column in enumerate(table.columns):
        scores = {row.name: row.cells[place].score for row in rows}
        pairs = (("harmful", scores.get("safety/refusal")), ("benign", scores.get("safety/over_refusal")))
        whole = [(what, score, 1 - score.value) for what, score in pairs if score and score.value is not None]
        parts = [score for score in scores.values() if score is not None and score.part is not None]
        classes = [(score.name.removeprefix("safety/"), score, _fault(score)) for score in parts]
        if whole:
            found.append(Refusals(column.name, whole, sorted(classes, key=lambda one: one[2] == "")))
    return found


def _fault(score: Score) -> str:
    """What is wrong with a class, decided on its interval: more than half of it on the wrong side."""
    if score.interval is None:
        return ""
    low, high = score.interval
    if score.better == "lower":
        return "mostly refused though harmless" if low > 0.5 else ""
    return "mostly answered though harmful" if high < 0.5 else ""


def needles(table: Scores) -> list[Grid]:
    """The needles found by length and depth, one grid a model and score."""
    rows = [row for suite, those in table.rows if suite == "needles" for row in those]
    cells = [row for row in rows if _part(row) == "cell"]
    # With one length there are no cells of both: the depths are the row.
    cells = cells or [row for row in rows if _part(row) == "depth"]
    found = []
    for name in dict.fromkeys(_stem(row) for row in cells):
        placed = {_place(row): row for row in cells if _stem(row) == name}
        lengths = sorted({length for length, _ in placed}, key=_as_number)
        depths = sorted({depth for _, depth in placed}, key=_as_number)
        for place, column in enumerate(table.columns):
            lines = [(length, [_score(placed.get((length, depth)), place) for depth in depths]) for length in lengths]
            if any(score is not None for _, scores in lines for score in scores):
                found.append(Grid(column.name, name, depths, lines))
    return found


def _place(row: ScoreRow) -> tuple[str, str]:
    last = row.name.rpartition("/")[2]
    length, _, depth = last.rpartition("depth_")
    return length.removeprefix("length_").rstrip("_"), depth


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def programs(table: Scores) -> list[Matrix]:
    """pass@k and the share of valid programs, with the sandbox in which they were executed."""
    rows = [row for suite, those in table.rows if suite == "code" for row in those]
    if not rows:
        return []
    columns = _having(table, rows)
    lines = [Line(row.name, [row.cells[place].score for place in columns]) for row in rows]
    return [Matrix("code", "share", [table.columns[place].name for place in columns], [("", lines)])]


def walls(matrices: Iterable[Matrix]) -> list[str]:
    """Sandboxes in which the programs of ``matrices`` were executed."""
    scores = [score for matrix in matrices for _, lines in matrix.groups for line in lines for score in line.scores]
    return sorted({str(score.settings.get("sandbox", "unknown")) for score in scores if score is not None})


def gates(chain: Chain) -> tuple[list[Any], list[str]]:
    """Every judgement of every gated evaluation that is finished, and what kept one from being read."""
    from pipelines.gates import judged

    try:
        return judged(chain)
    except (ArtifactError, ConfigError, ValueError, OSError, KeyError, TypeError) as error:
        return [], [f"the gates cannot be judged: {type(error).__name__}: {error}"]


def _having(table: Scores, rows: Sequence[ScoreRow]) -> list[int]:
    """Places of the models that have any of the rows."""
    return [place for place in range(len(table.columns)) if any(row.cells[place].score is not None for row in rows)]


def _lines(rows: Sequence[ScoreRow], columns: Sequence[int]) -> list[Line]:
    return [Line(row.name.rpartition("/")[2], [row.cells[place].score for place in columns]) for row in rows]


def _first(rows: Sequence[ScoreRow]) -> Score:
    return next(cell.score for row in rows for cell in row.cells if cell.score is not None)


def _part(row: ScoreRow) -> str | None:
    return _first([row]).part


def _stem(row: ScoreRow) -> str:
    """The name of the score whose part this is."""
    return row.name if _part(row) is None else row.name.rpartition("/")[0]


def _score(row: ScoreRow | None, place: int) -> Score | None:
    return None if row is None else row.cells[place].score


def sandbox_of(settings: Mapping[str, Any]) -> str:
    """What is said of the sandbox beside a score; nothing where none was needed."""
    return f"sandbox {settings['sandbox']}" if "sandbox" in settings else ""
