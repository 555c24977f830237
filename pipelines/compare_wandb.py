"""The comparison as a W&B run: a Table of differences, one of what the variants said, and online a Report.

Offline the Tables are recorded below ``runs/<pipeline>/compare`` and synced later by ``wandb sync``. A Report lives on
the server alone: it is made online where ``wandb-workspaces`` is installed; otherwise the lines returned say why not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipelines.comparison import Comparison, plain
from pipelines.table import table
from stages.base import ConfigError, Fault
from stages.runtime.artifact import canonical_digest, shown
from stages.runtime.mirror import discreet_settings, identity, keep_inside, resolve_mode
from stages.runtime.scrub import scrub

JOB = "compare"
COLUMNS: tuple[str | int, ...] = (
    *("score", "suite", "unit", "better", "set_hash", "n_unit", "families"),
    *("baseline", "baseline_n", "baseline_value", "variant", "variant_n", "value"),
    *("difference", "low", "high", "verdict"),
)


def log_comparison(found: Comparison, pipeline: str, tracking: Any, folder: Path) -> list[str]:
    """Log the comparison, secrets taken out, and return what was done in lines; ``tracking`` is the recipe's section.

    Raises:
        ConfigError: when the recipe's tracking is disabled, or W&B does not take it.
    """
    mode = resolve_mode(tracking.wandb)
    if mode == "disabled":
        message = "needs W&B; the recipe says tracking.wandb: disabled; give --set tracking.wandb=offline, or online"
        raise ConfigError(Fault("--wandb", message))
    content = scrub(plain(found))
    rows, spoken = difference_rows(content), sample_rows(content)
    try:
        run = _open(content, pipeline, tracking, mode, folder)
        import wandb

        run.log({
            "differences": wandb.Table(columns=list(COLUMNS), data=rows, allow_mixed_types=True),
            "samples": wandb.Table(columns=_spoken_columns(content), data=spoken, allow_mixed_types=True),
        })  # fmt: skip
        url = run.url
        run.finish()
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(Fault("--wandb", f"must be logged; W&B says {said}; nothing else is lost by that")) from error
    if mode == "offline":
        return [f"W&B: recorded offline in {shown(folder)}; a Report is made online alone"]
    return [f"W&B: {url}", _report(content, pipeline, tracking)]


def difference_rows(content: dict[str, Any]) -> list[list[Any]]:
    """One row a score and variant, as ``COLUMNS`` names them."""
    rows = []
    for score in content["scores"]:
        base = score["values"][content["baseline"]]
        for variant, apart in score["differences"].items():
            (low, high), other = apart["interval"] or (None, None), score["values"][variant]
            rows.append([
                score["name"], score["suite"], score["unit"], score["better"], score["set_hash"], base["n_unit"],
                apart["families"], content["baseline"], base["n"], base["value"], variant, other["n"], other["value"],
                apart["value"], low, high, apart["verdict"],
            ])  # fmt: skip
    return rows


def sample_rows(content: dict[str, Any]) -> list[list[Any]]:
    """One row a prompt and decoding: its name, the last turn, how it was decoded, and each variant's words."""
    return [
        [
            each["name"], (each["prompt"] or [{}])[-1].get("content", ""), str(dict(each["decoding"])),
            *(None if sample is None else str(sample.get("completion", "")) for sample in each["samples"]),
        ]
        for each in content["samples"]
    ]  # fmt: skip


def _spoken_columns(content: dict[str, Any]) -> list[str | int]:
    return ["sample", "prompt", "decoding", *(f"said by {name}" for name in content["variants"])]


def _open(
    content: dict[str, Any], pipeline: str, tracking: Any, mode: Literal["online", "offline"], folder: Path
) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    keep_inside(folder.resolve())
    import wandb

    variants = content["variants"]
    run = identity(pipeline, "-".join(variants), JOB, canonical_digest(content), tracking.project, tracking.entity)
    wandb.setup(wandb.Settings(silent=True, console="off"))
    return wandb.init(
        dir=folder, id=run.id, name=" / ".join(variants), group=run.group, job_type=JOB, project=run.project,
        entity=run.entity, mode=mode, resume="allow", reinit="finish_previous",
        config={name: content[name] for name in ("variants", "baseline", "method", "confidence")},
        settings=wandb.Settings(**discreet_settings()),
    )  # fmt: skip


def _report(content: dict[str, Any], pipeline: str, tracking: Any) -> str:
    """Make the Report; one line that says where it lies, or why there is none."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        return "W&B Report: not made, wandb-workspaces is not installed"
    try:
        report = build_report(content, pipeline, tracking.project, tracking.entity)
        report.save()
    except Exception as error:
        return " ".join(f"W&B Report: not made, {type(error).__name__}: {error}".split())
    return f"W&B Report: {report.url}"


def build_report(content: dict[str, Any], pipeline: str, project: str, entity: str | None) -> Any:
    """The Report as wandb-workspaces' object, not saved: a table of text for each suite, what was said below."""
    import wandb_workspaces.reports.v2 as reports

    blocks = [
        reports.MarkdownBlock(text=f"Baseline {content['baseline']}. {content['method']}, {content['confidence']:.0%}.")
    ]
    for suite in dict.fromkeys(score["suite"] for score in content["scores"]):
        blocks += [
            reports.H2(text=suite),
            reports.CodeBlock(code="\n".join(suite_lines(content, suite)), language=None),
        ]
    blocks.append(reports.H2(text="Samples"))
    for row in sample_rows(content):
        said = zip(content["variants"], row[3:], strict=True)
        text = "\n\n".join([f"{row[0]}: {row[1]}", *(f"{name}: {words}" for name, words in said)])
        blocks.append(reports.CodeBlock(code=text, language=None))
    title = f"{pipeline}: {' / '.join(content['variants'])}"
    whose = {} if entity is None else {"entity": entity}
    return reports.Report(project=project, title=title, blocks=blocks, **whose)


def suite_lines(content: dict[str, Any], suite: str) -> Sequence[str]:
    """The differences of one suite as a plain table."""
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in difference_rows(content)]
    cells = [
        [
            row["score"],
            row["unit"],
            _counts(row["baseline_n"], row["variant_n"]),
            row["variant"],
            _figure(row["difference"]),
            f"[{_figure(row['low'])}, {_figure(row['high'])}]",
            row["verdict"],
        ]
        for row in rows
        if row["suite"] == suite
    ]
    return table(["score", "unit", "n", "variant", "difference", "95% interval", "verdict"], cells)


def _counts(baseline: int, variant: int) -> str:
    """What either side counted: one number where they counted alike."""
    return str(baseline) if baseline == variant else f"{baseline} / {variant}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4g}"
