"""Charts as inline SVG, drawn by hand in colours that the page's style sets for light and dark."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipelines.report_format import number
from pipelines.report_read import StageView

SKIPPED = re.compile(r"(skipped_|scored_|supervised_tokens$|best_|.*(_hash|epoch|_time|num_tokens|_tokens_seen)$)")
"""Values of a row that say nothing as a curve: counts that only grow, bookkeeping."""
FAMILIES = ("bpb", "rewards")
"""Names before a slash whose values share a unit, and so one chart."""
FIRST = ("loss", "bpb", "reward", "accuracy", "margin", "kl", "lr", "grad_norm", "tokens_per_s")
"""What a reader looks for first; other charts follow by name."""
SHOWN = 6
"""Charts of a stage that stand open."""
MAX_LINES, MAX_POINTS, FEW = 7, 500, 12
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 330, 176, 46, 8, 6, 26
_LEGEND_ROW = 12


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    steps: list[float]
    values: list[float]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A titled drawing."""

    title: str
    svg: Markup


@dataclasses.dataclass(frozen=True)
class Scale:
    """From values ``low`` to ``high`` to places ``start`` to ``end`` of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of ``value``, to a tenth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def training_charts(stage: StageView) -> list[Chart]:
    """The curves of a stage's ``metrics.jsonl``, most wanted first."""
    groups = grouped(stage.rows)
    return [Chart(title, curves_svg(title, groups[title], stage.resumed_at)) for title in groups]


def grouped(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Series]]:
    """Series of at least two finite points by the title of their chart: one name of all events, or one family."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("step", "time", "event") or SKIPPED.match(name) or not _finite(value):
                continue
            family = name.partition("/")[0]
            title = family if family in FAMILIES else name
            found.setdefault(title, {}).setdefault(f"{row['event']}: {name}", {})[int(row["step"])] = float(value)
    charts = {title: [_series(label, points) for label, points in each.items()] for title, each in found.items()}
    charts = {title: [line for line in lines if len(line.steps) > 1] for title, lines in charts.items()}
    return {title: charts[title] for title in sorted(charts, key=_rank) if charts[title]}


def _series(label: str, points: Mapping[int, float]) -> Series:
    return Series(label, [float(step) for step in sorted(points)], [points[step] for step in sorted(points)])


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(title: str) -> tuple[int, str]:
    plain = title.lower()
    return next((place for place, word in enumerate(FIRST) if word in plain), len(FIRST)), title


def curves_svg(title: str, lines: Sequence[Series], marks: Sequence[int]) -> Markup:
    """Lines over steps; ``marks`` are steps at which the run was resumed."""
    shown = list(lines[:MAX_LINES])
    legend = [_legend(line.label, title) for line in shown] if len(shown) > 1 else []
    top = TOP + _LEGEND_ROW * math.ceil(len(legend) / 2)
    height = HEIGHT + top - TOP
    steps = [step for line in shown for step in (line.steps[0], line.steps[-1])]
    values = [value for line in shown for value in line.values]
    across = Scale(*_spread(min(steps), max(steps), 0.02), LEFT, WIDTH - RIGHT)
    up = Scale(*_spread(min(values), max(values), 0.06), height - BOTTOM, top)
    parts = [*_grid(across, up, height), *(_mark(across(step), top, height) for step in marks)]
    parts += [part for place, line in enumerate(shown, start=1) for part in _line(line, place, across, up)]
    parts += [_label(place, text) for place, text in enumerate(legend)]
    parts.append(_text(WIDTH - RIGHT, height - 2, "step", "end"))
    return _svg(WIDTH, height, f"{title} over steps", parts)


def _legend(label: str, title: str) -> str:
    event, _, name = label.partition(": ")
    if name == title:
        return "all" if title in FAMILIES else event
    return name.removeprefix(f"{title}/").lstrip("_") or name


def _spread(low: float, high: float, margin: float) -> tuple[float, float]:
    """The range with room on both sides; one value alone gets room too."""
    room = (high - low) * margin or abs(high) * margin or 1.0
    return low - room, high + room


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers in the range, one, two or five times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _grid(across: Scale, up: Scale, height: int) -> list[Markup]:
    rule = Markup('<path class="rule" d="M{} {}H{}"/>')
    parts = [rule.format(LEFT, up(value), WIDTH - RIGHT) for value in ticks(up.low, up.high)]
    parts += [_text(LEFT - 4, up(value) + 3, number(value, ".3g"), "end") for value in ticks(up.low, up.high)]
    # A first or last label in the middle of its tick would reach beyond the drawing.
    places = [value for value in ticks(across.low, across.high) if across(value) < WIDTH - 40]
    return parts + [_text(across(value), height - BOTTOM + 12, number(value, ".6g"), "middle") for value in places]


def _mark(place: float, top: float, height: float) -> Markup:
    return Markup('<path class="mark" d="M{} {}V{}"/>').format(place, top, height - BOTTOM)


def _line(line: Series, place: int, across: Scale, up: Scale) -> list[Markup]:
    points = [(across(step), up(value)) for step, value in thinned(line)]
    path = "M" + "L".join(f"{x} {y}" for x, y in points)
    parts = [Markup('<path class="curve s{}" d="{}"/>').format(place, path)]
    if len(points) <= FEW:
        parts += [Markup('<circle class="s{}" cx="{}" cy="{}" r="2.2"/>').format(place, x, y) for x, y in points]
    return parts


def thinned(line: Series) -> list[tuple[float, float]]:
    """The points, or of many the lowest and highest of each stretch, so that no spike is lost."""
    points = list(zip(line.steps, line.values, strict=True))
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _label(place: int, text: str) -> Markup:
    x, y = LEFT + (place % 2) * 140, TOP + 6 + _LEGEND_ROW * (place // 2)
    dot = Markup('<circle class="s{}" cx="{}" cy="{}" r="3"/>').format(place + 1, x, y - 3)
    return dot + _text(x + 7, y, text if len(text) <= 24 else f"{text[:23]}…")


def forest_svg(
    title: str, points: Sequence[tuple[str, float, tuple[float, float] | None]], line: float | None = None
) -> Markup:
    """One value a row with its interval as a bar; ``line`` is what chance gives, dotted."""
    row, names = 19, 104
    bounds = [bound for _, value, interval in points for bound in (interval or (value, value))]
    bounds += [] if line is None else [line]
    across = Scale(*_spread(min(bounds), max(bounds), 0.04), names, WIDTH - 52)
    height = row * len(points) + 20
    parts = [
        Markup('<path class="rule" d="M{} 2V{}"/>').format(across(value), height - 16)
        + _text(across(value), height - 4, number(value, ".3g"), "middle")
        for value in ticks(across.low, across.high, 3)
    ]
    parts += [] if line is None else [Markup('<path class="mark" d="M{} 2V{}"/>').format(across(line), height - 16)]
    for place, (name, value, interval) in enumerate(points):
        y = row * place + 12
        if interval is not None:
            ends = across(interval[0]), across(interval[1])
            parts.append(Markup('<path class="band" d="M{} {}H{}"/>').format(ends[0], y, max(ends[1], ends[0] + 1)))
        parts.append(Markup('<circle class="s1" cx="{}" cy="{}" r="3.2"/>').format(across(value), y))
        parts.append(_text(names - 6, y + 3, name if len(name) <= 17 else f"{name[:16]}…", "end"))
        parts.append(_text(WIDTH - 2, y + 3, number(value), "end", "value"))
    return _svg(WIDTH, height, f"{title}, with intervals", parts)


def _text(x: float, y: float, text: str, anchor: str = "start", name: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(name, x, y, anchor, text)


def _svg(width: int, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg class="plot" role="img" viewBox="0 0 {} {}" aria-label="{}">').format(width, height, label)
    return head + Markup("").join(parts) + Markup("</svg>")
