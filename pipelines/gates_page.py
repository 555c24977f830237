"""The page that shows why the chain goes on from a model, or stops: ``gates.html`` beside ``stage.json``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from pipelines import page
from pipelines.comparison import Beside, beside
from pipelines.gates import Judgement, baseline_evaluations, override_flags, page_path, verdict_of
from pipelines.report_format import number
from pipelines.scores import SUBJECT, Evaluation, Items, Score, read_evaluation
from stages.base import ConfigError

if TYPE_CHECKING:
    from pipelines.chain import Chain, Node

WORST = 8
"""Items of a broken limit that are shown."""
_STYLES = {"passed": "passed", "failed": "failed", "undecided": "warning", "cannot be judged": "failed"}
_WIDTH, _HEIGHT, _EDGE = 340, 60, 16


def write_page(chain: Chain, node: Node, judgements: Sequence[Judgement]) -> None:
    """Write the page of the evaluation ``node``; the worst limits first.

    Raises:
        ArtifactError: where it cannot be written, or scores cannot be read.
    """
    measured = read_evaluation(node.name, node.job.directory)
    named = dict.fromkeys(one.baseline for one in judgements if one.baseline is not None)
    baselines = {name: baseline_evaluations(chain, name) for name in named}
    order = sorted(judgements, key=lambda one: (not one.closed, one.state == "passed"))
    subject = node.job.parents[SUBJECT].stage
    spoken = {subject: [measured], **{name.rpartition("/")[2]: found for name, found in baselines.items()}}
    closed = [one for one in judgements if one.closed]
    text = page.render(
        "gates_page.html",
        name=node.name,
        subject=subject,
        artifact=node.job.directory.name,
        closed=bool(closed),
        verdict=verdict_of(judgements),
        judged=[_shown(one, measured, baselines.get(one.baseline or "", [])) for one in order],
        command=" ".join(["python pipelines/run.py --all", *override_flags(closed)]) if closed else "",
        names=list(spoken),
        samples=_samples(spoken.values()),
    )
    page.write(page_path(node), text)


def _samples(spoken: Iterable[Sequence[Evaluation]]) -> list[Beside]:
    return beside([[sample for each in found for sample in each.samples] for found in spoken])


def _shown(one: Judgement, measured: Evaluation, baselines: Sequence[Evaluation]) -> dict[str, Any]:
    """What the template needs of one judgement."""
    passed_over = one.override is not None and one.stops
    return {
        "metric": one.metric,
        "word": f"{one.state}, overridden" if passed_over else one.state,
        "style": _STYLES[one.state],
        "demand": one.demand,
        "found": one.found,
        "unit": one.unit,
        "why": one.why,
        "svg": interval_svg(one),
        "at": one.override.at if one.override else "",
        "said": one.override.said if passed_over and one.override else "",
        "baseline": (one.baseline or "").rpartition("/")[2],
        "worst": worst_items(one, measured, baselines) if one.state != "passed" else [],
    }


def worst_items(
    one: Judgement, measured: Evaluation, baselines: Sequence[Evaluation], most: int = WORST
) -> list[dict[str, Any]]:
    """The items that make the model worse than its baseline by most, each by what it adds to the whole difference."""
    from pipelines.paired import in_order

    after = _named(measured.scores, one.metric)
    before = _named([score for each in baselines for score in each.scores], one.metric)
    if after is None or before is None or after.items is None or before.items is None:
        return []
    try:
        items = in_order(after.items, before.items, one.metric)
    except ConfigError:
        return []
    sign = -1 if after.better == "higher" else 1
    whole = sum(items.denominator) or 1.0
    parts = [sign * (new - old) / whole for old, new in zip(before.items.numerator, items.numerator, strict=True)]
    order = sorted(range(len(parts)), key=lambda place: -parts[place])[:most]
    return [
        {
            "id": items.ids[place], "family": "" if items.families is None else items.families[place],
            "before": _ratio(before.items, place), "after": _ratio(items, place), "share": parts[place],
        }
        for place in order
        if parts[place] > 0
    ]  # fmt: skip


def _named(scores: Iterable[Score], name: str) -> Score | None:
    return next((score for score in reversed(list(scores)) if score.name == name), None)


def _ratio(items: Items, place: int) -> float:
    return items.numerator[place] / (items.denominator[place] or 1.0)


def interval_svg(one: Judgement) -> Markup:
    """The interval as a bar with its value, the limit as a line, what lies beyond it shaded; empty without one."""
    if one.interval is None or one.value is None:
        return Markup("")
    points = [*one.interval, one.value, one.limit]
    low, high = min(points), max(points)
    room = (high - low) or abs(high) or 1.0
    low, high = low - 0.12 * room, high + 0.12 * room

    def x(value: float) -> float:
        return _EDGE + (value - low) / (high - low) * (_WIDTH - 2 * _EDGE)

    left, right, at, limit = (x(value) for value in (*one.interval, one.value, one.limit))
    shade = (_EDGE, limit - _EDGE) if one.rule == "min" else (limit, _WIDTH - _EDGE - limit)
    title = escape(f"{one.metric}: {one.found}; limit: {one.demand}")
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" style="max-width:{2 * _WIDTH}px" role="img" aria-label="{title}">'
        f"<title>{title}</title>"
        f'<rect x="{shade[0]:.1f}" y="8" width="{max(shade[1], 0):.1f}" height="32" fill="var(--bad)" opacity=".14"/>'
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="24" y2="24" stroke="var(--s1)" stroke-width="6"/>'
        f'<circle cx="{at:.1f}" cy="24" r="6" fill="var(--s1)"/>'
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="6" y2="42" stroke="var(--bad)" stroke-width="2"/>'
        f'<text x="{limit:.1f}" y="58" text-anchor="middle" font-size="12" fill="var(--muted)">'
        f"limit {escape(number(one.limit))}</text></svg>"
    )
