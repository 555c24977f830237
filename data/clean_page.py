"""The funnel of cleaning as one page: what survives each step by source, what was dropped or altered, with samples.

The page holds all that it shows, loads nothing and needs no script; wide tables scroll by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STEPS = ("read", "form and rules", "content", "unique", "train and held out")
"""Steps of the funnel, each with what survives it."""
_BAR, _GAP, _LABEL, _WIDTH = 16, 6, 150, 560

_STYLE = """
:root{--ink:#1b1f24;--muted:#667;--line:#d8dce2;--bar:#2f6f9f;--bg:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--muted:#9aa3ad;--line:#353a41;--bar:#6aa9d8;--bg:#16181c}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--bg);max-width:62rem;margin:1.5rem auto;
padding:0 1rem}h2{margin-top:2rem}small,.q{color:var(--muted)}.w{overflow-x:auto}table{border-collapse:collapse}
td,th{padding:.2rem .7rem .2rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left}td.t{text-align:left;white-space:pre-wrap;min-width:18rem;
overflow-wrap:anywhere}svg{max-width:100%;height:auto}svg text{fill:var(--ink);font:12px system-ui,sans-serif}
svg .b{fill:var(--bar)}svg .m{fill:var(--muted)}
"""


def funnel_page(report: Mapping[str, Any]) -> str:
    """The page of ``report.json``; the same report gives the same bytes."""
    funnel = report["funnel"]
    parts = [
        "<h1>What cleaning kept</h1>",
        *(f"<h2>{escape(row['source'])}</h2>{funnel_svg(row)}" for row in funnel),
        "<h2>Dropped documents</h2>", _counts(funnel, "dropped", ("documents", "bytes")),
        "<h2>Altered documents</h2>", _counts(funnel, "altered", ("documents", "edits")),
        "<h2>Evaluation sets that no document may hold</h2>", _sets(report),
        *(["<h2>Quality classifier</h2>", _quality(report["quality"])] if report["quality"] else []),
        "<h2>Samples of what was dropped</h2>", _samples(report["samples"]),
        "<h2>Samples of what was altered</h2>", _samples(report["altered_samples"]),
    ]  # fmt: skip
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}<title>Cleaning</title><style>{_STYLE}</style></head>\n{body}\n'


def survivors(row: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Documents of one source left after each of ``STEPS``."""
    left = [row["read"]["documents"]]
    for step in STEPS[1:-1]:
        left.append(left[-1] - sum(x["documents"] for rule, x in row["dropped"].items() if _step(rule) == step))
    return list(zip(STEPS, [*left, row["train"]["documents"] + row["heldout"]["documents"]], strict=True))


def _step(rule: str) -> str:
    if rule.startswith("duplicate_"):
        return "unique"
    if rule == "heldout_overlap":
        return STEPS[-1]
    return "content" if rule == "low_quality" or rule.startswith("contaminated_") else "form and rules"


def funnel_svg(row: Mapping[str, Any]) -> str:
    """The funnel of one source as a drawing: a bar a step, by documents."""
    steps = survivors(row)
    height = len(steps) * (_BAR + _GAP)
    most = max(1, steps[0][1])
    bars = []
    for place, (step, count) in enumerate(steps):
        y = place * (_BAR + _GAP)
        width = round(_WIDTH * count / most, 1)
        share = f"{count:,} ({count / most:.1%})" if steps[0][1] else "0"
        bars.append(
            f'<text x="0" y="{y + 12}">{step}</text><rect class="b" x="{_LABEL}" y="{y}" width="{width}" '
            f'height="{_BAR}"/><text class="m" x="{_LABEL + width + 6:.1f}" y="{y + 12}">{share}</text>'
        )
    label = escape(f"documents of {row['source']} left after each step")
    box = f"0 0 {_LABEL + _WIDTH + 130} {height}"
    return f'<svg role="img" aria-label="{label}" viewBox="{box}" width="{_LABEL + _WIDTH + 130}">{"".join(bars)}</svg>'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, text: bool = False) -> str:
    """A table; with ``text`` the last column holds prose."""
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    for row in rows:
        cells = [f"{x:,}" if isinstance(x, int) else escape(str(x)) for x in row]
        last = len(cells) - 1
        kinds = (' class="t"' if text and place == last else "" for place in range(len(cells)))
        lines.append("<tr>" + "".join(f"<td{kind}>{x}</td>" for kind, x in zip(kinds, cells, strict=True)) + "</tr>")
    return f'<div class="w"><table>{"".join(lines)}</table></div>' if len(lines) > 1 else '<p class="q">none</p>'


def _counts(funnel: Sequence[Mapping[str, Any]], kind: str, units: tuple[str, str]) -> str:
    rows = [(row["source"], rule, *(one[unit] for unit in units)) for row in funnel for rule, one in row[kind].items()]
    return _table(("source", "rule", *units), rows)


def _sets(report: Mapping[str, Any]) -> str:
    facts = report["decontamination"]
    dropped = {
        one["name"]: sum(
            row["dropped"].get(f"contaminated_{one['name']}", {}).get("documents", 0) for row in report["funnel"]
        )
        for one in facts["sets"]
    }
    rows = [(x["name"], x["items"], x["unchecked_items"], dropped[x["name"]]) for x in facts["sets"]]
    table = _table(("set", "items", "too short to look for", "documents removed"), rows)
    rule = f"{facts['ngram']} words in a row; items from {facts['min_words']} words on as a whole"
    return f'{table}<p class="q">{rule}</p>'


def _quality(facts: Mapping[str, Any]) -> str:
    test = facts["test"]
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in test.items())
    columns = ("threshold", "kept_share", "precision", "recall")
    curve = _table(
        [name.replace("_", " ") for name in columns], [[p[name] for name in columns] for p in facts["curve"]]
    )
    warning = f"<p><strong>Warning: {escape(facts['missed'])}</strong></p>" if facts["missed"] else ""
    return f"{warning}<p>threshold {facts['threshold']}; on labels that chose nothing: {escape(words)}</p>{curve}"


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    rows = [
        (one["source"], one["rule"], one["origin"], one["text"] + (f"\n[{one['detail']}]" if one.get("detail") else ""))
        for one in samples
    ]
    return _table(("source", "rule", "origin", "text"), rows, text=True)
