"""Charts as inline SVG by matplotlib, in colours that the page's style sets for light and dark."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipelines.report_read import StageView

SKIPPED = re.compile(r"(skipped_|scored_|supervised_tokens$|best_|.*(_hash|epoch|_time|num_tokens|_tokens_seen)$)")
"""Values of a row that say nothing as a curve: counts that only grow, bookkeeping."""
FAMILIES = ("bpb", "rewards")
"""Names before a slash whose values share a unit, and so one chart."""
FIRST = ("loss", "bpb", "reward", "accuracy", "margin", "kl", "lr", "grad_norm", "tokens_per_s")
"""What a reader looks for first; other charts follow by name."""
SHOWN = 6
"""Charts of a stage that stand open."""

_SIZE = (3.55, 2.05)
_INK, _EDGE, _GRID = "#010101", "#020202", "#030303"
_SERIES = [f"#0400{number:02d}" for number in range(1, 8)]
_VARIABLES = {_INK: "--ink", _EDGE: "--muted", _GRID: "--line"} | {
    colour: f"--s{number}" for number, colour in enumerate(_SERIES, start=1)
}


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


def training_charts(stage: StageView) -> list[Chart]:
    """The curves of a stage's ``metrics.jsonl``, most wanted first."""
    groups = grouped(stage.rows)
    return [Chart(title, curves_svg(title, groups[title], stage.resumed_at, stage.name)) for title in groups]


def grouped(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Series]]:
    """Series of at least two finite points by the title of their chart: one name of all events, or one family."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    events: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("step", "time", "event") or SKIPPED.match(name) or not _finite(value):
                continue
            family = name.partition("/")[0]
            title = family if family in FAMILIES else name
            found.setdefault(title, {}).setdefault(f"{row['event']}: {name}", {})[int(row["step"])] = float(value)
            events.setdefault(title, set()).add(row["event"])
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


def curves_svg(title: str, lines: Sequence[Series], marks: Sequence[int], salt: str) -> Markup:
    """Lines over steps; ``marks`` are steps at which the run was resumed."""
    figure, axes = _figure()
    for number, line in enumerate(lines[: len(_SERIES)]):
        few = len(line.steps) <= 12
        axes.plot(
            line.steps, line.values, color=_SERIES[number], linewidth=1.4, label=_legend(line.label, title),
            marker="o" if few else None, markersize=2.5,
        )  # fmt: skip
    for step in marks:
        axes.axvline(step, color=_EDGE, linewidth=0.8, linestyle=":")
    axes.set_xlabel("step")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=7, ncols=2 if len(lines) > 3 else 1, handlelength=1.2, borderpad=0.1)
    return _svg(figure, f"{salt}/{title}", f"{title} over steps")


def _legend(label: str, title: str) -> str:
    event, _, name = label.partition(": ")
    # An underscore at the beginning would hide the line from the legend.
    if name == title:
        return "all" if title in FAMILIES else event
    return name.removeprefix(f"{title}/").lstrip("_") or name


def bands_svg(title: str, points: Sequence[tuple[str, float, tuple[float, float] | None]]) -> Markup:
    """A score by stage, each with its interval."""
    figure, axes = _figure(bottom=0.28)
    for number, (_, value, interval) in enumerate(points):
        if interval is not None:
            axes.plot([number, number], interval, color=_SERIES[0], linewidth=3.5, alpha=0.35, solid_capstyle="butt")
        axes.plot([number], [value], color=_SERIES[0], marker="o", markersize=4)
    axes.set_xticks(range(len(points)), [name for name, _, _ in points], rotation=20, ha="right")
    axes.set_xlim(-0.5, len(points) - 0.5)
    return _svg(figure, title, f"{title} by stage, with intervals")


def _figure(bottom: float = 0.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE)
    # Fixed margins: a layout engine would draw everything twice.
    axes = figure.add_axes((0.13, bottom, 0.86, 0.93 - bottom))
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_EDGE)
    axes.tick_params(colors=_INK, labelsize=7.5, length=2)
    axes.xaxis.label.set(color=_INK, fontsize=7.5)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set(color=_INK, fontsize=7)
    axes.margins(x=0.02)
    return figure, axes


def _svg(figure: Any, salt: str, label: str) -> Markup:
    """The figure as inline SVG; the same figure and salt give the same text."""
    import matplotlib

    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", text)
    # matplotlib has escaped the texts that it drew.
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(label)}" ', 1))
