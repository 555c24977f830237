"""The lineage as a drawing: a stage a row, and what it makes runs down a rail of its own to those that take it.

Rails stand left of the names, so that the drawing stays narrow enough for a phone; a dot marks where a stage takes from
a rail. Colours are the page's style variables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from markupsafe import Markup

from pipelines.report_format import duration
from pipelines.report_read import StageView

ROW, LANE, WIDTH, TOP = 38, 11, 360, 6
INLET, OUTLET = -5, 6
"""Where a row's incoming and outgoing lines run, from its middle."""
KINDS = {"model": "model", "corpus": "data", "tokenizer": "data", "tokens": "data"}


@dataclasses.dataclass(frozen=True)
class Rail:
    """What stage ``row`` makes, drawn in ``lane`` down to the rows that take it."""

    row: int
    lane: int
    children: list[int]
    is_model: bool


def rails(stages: Sequence[StageView]) -> list[Rail]:
    """One rail for each stage that another takes from; a lane is used again below its last child.

    Models get the lane nearest to the names that is free, so that the line of descent stays close to them.
    """
    place = {stage.name: row for row, stage in enumerate(stages)}
    found: list[Rail] = []
    last: list[int] = []
    for row, stage in enumerate(stages):
        children = [place[other.name] for other in stages if stage.name in other.parents.values()]
        if not children:
            continue
        lane = next((number for number, end in enumerate(last) if end < row), len(last))
        last[lane:lane + 1] = [max(children)]  # fmt: skip
        found.append(Rail(row, lane, children, stage.produces == "model"))
    return found


def lineage_svg(stages: Sequence[StageView]) -> Markup:
    """The drawing as inline SVG; each row links to the stage's section."""
    drawn = rails(stages)
    lanes = max((rail.lane for rail in drawn), default=-1) + 1
    names_at = lanes * LANE + 18
    height = TOP * 2 + ROW * len(stages)
    # The rails of data first, so that the models' line lies above them.
    parts = [_rail(rail, lanes, names_at) for rail in sorted(drawn, key=lambda rail: rail.is_model)]
    parts += [_row(row, stage, names_at) for row, stage in enumerate(stages)]
    head = Markup('<svg class="graph" viewBox="0 0 {} {}" role="img" aria-label="Lineage of the stages">')
    return head.format(WIDTH, height) + Markup("\n").join(parts) + Markup("</svg>")


def _middle(row: int) -> int:
    return TOP + ROW * row + ROW // 2


def _rail(rail: Rail, lanes: int, names_at: int) -> Markup:
    x, end = (lanes - rail.lane) * LANE - LANE // 2, names_at - 9
    start = _middle(rail.row) + OUTLET
    path = [f"M{end} {start}H{x + 4}q-4 0 -4 4V{_middle(max(rail.children)) + INLET}"]
    path += [f"M{x} {_middle(child) + INLET}H{end}" for child in rail.children]
    name = "rail model" if rail.is_model else "rail"
    dots = Markup("").join(
        Markup('<circle class="{}" cx="{}" cy="{}" r="2.2"/>').format(name, x, _middle(child) + INLET)
        for child in rail.children
    )
    return Markup('<path class="{}" d="{}"/>').format(name, " ".join(path)) + dots


def _row(row: int, stage: StageView, names_at: int) -> Markup:
    y = _middle(row)
    shape = Markup('<rect class="node {}" x="{}" y="{}" width="7" height="20" rx="3"/>').format(
        "model" if stage.produces == "model" else "other", names_at - 9, y - 10
    )
    words = [stage.kind, stage.key[:8]]
    if stage.record.get("elapsed_s"):
        words.append(duration(stage.record["elapsed_s"]))
    text = Markup(
        '<a href="#stage-{}"><text class="name" x="{}" y="{}">{}</text>'
        '<text class="small" x="{}" y="{}">{}</text>'
        '<text class="state {}" x="{}" y="{}" text-anchor="end">{}</text></a>'
    ).format(
        stage.name, names_at + 4, y - 2, stage.name, names_at + 4, y + 11, " · ".join(words),
        stage.state.replace(" ", "-"), WIDTH - 2, y - 2, stage.state,
    )  # fmt: skip
    return shape + text
