"""``--plan``: the graph, every key, what is stale and why, and what each stage will cost; nothing runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipelines.budget import budget, budget_lines
from pipelines.chain import Chain, Node
from pipelines.contamination import contamination_notes
from pipelines.gates_graph import gates_of
from pipelines.graph import input_name
from pipelines.preflight import device_notes
from pipelines.staleness import Standing, extension_notes, standings
from pipelines.table import figure, size, table
from stages.runtime.artifact import has_gpu, shown
from stages.runtime.lifecycle import fitted_note


def plan(chain: Chain, world_size: int, price_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """The plan as plain data."""
    found = standings(chain)
    return {
        "pipeline": chain.recipe.name,
        "runs": str(chain.runs),
        "devices": world_size,
        "free_bytes": shutil.disk_usage(_existing(chain.runs)).free,
        "stages": [_stage(node, found[node.name], world_size, price_per_gpu_hour) for node in chain],
        "notes": [
            *device_notes(chain, has_gpu()),
            *_fitted_notes(chain, world_size),
            *contamination_notes(chain),
            *(note for node in chain for note in extension_notes(node)),
            *gate_notes(chain),
        ],
    }


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan for a person."""
    stages = plan["stages"]
    rows = [
        [
            stage["stage"],
            stage["kind"],
            ", ".join(f"{field}={name}" for field, name in stage["parents"].items()) or "-",
            stage["key"][:8],
            stage["state"],
            "; ".join(stage["reasons"]),
        ]
        for stage in stages
    ]
    lines = [f"{plan['pipeline']}: {shown(Path(plan['runs']))}/{plan['pipeline']}, {plan['devices']} device(s)", ""]
    lines += table(["stage", "kind", "from", "key", "state", "why"], rows)
    for stage in stages:
        if stage["figures"]:
            lines += ["", f"{stage['stage']} will take"]
            lines += [f"  {line}" for line in _figures(stage["figures"])]
        if stage["budget"]:
            lines += [f"  {line}" for line in budget_lines(stage["budget"])]
    lines += ["", *(f"note: {note}" for note in plan["notes"])] if plan["notes"] else []
    left = [stage["stage"] for stage in stages if stage["state"] not in ("done", "longer", "damaged")]
    refused = [stage["stage"] for stage in stages if stage["state"] in ("longer", "damaged")]
    lines += ["", f"as the recipe stands, a run of {', '.join(refused)} would be refused: see why"] if refused else []
    lines += ["", _disk_line([stage for stage in stages if stage["stage"] in left], plan["free_bytes"])]
    if left:
        lines.append(f"left to do: {', '.join(left)}")
    return lines if left or refused else [*lines, "all done"]


def _disk_line(left: list[dict[str, Any]], free_bytes: int) -> str:
    """What the stages that are left want of the disk, and which of them nobody can say it of beforehand.

    A finished stage has its bytes on the disk already.
    """
    known = [stage["figures"]["disk_bytes"] for stage in left if "disk_bytes" in stage["figures"]]
    unknown = ", ".join(stage["stage"] for stage in left if "disk_bytes" not in stage["figures"])
    said = [f"at least {size(sum(known))} wanted by what is left"] if known else []
    said += [f"not known beforehand of {unknown}"] if unknown else []
    return f"disk: {', '.join([*said, f'{size(free_bytes)} free'])}"


def gate_notes(chain: Chain) -> list[str]:
    """The gates of the recipe: where each stands, and what those of finished evaluations say."""
    from pipelines.gates import judged, line

    before: dict[str, list[str]] = {}
    for stage, names in chain.gates.items():
        for name in names:
            before.setdefault(name, []).append(stage)
    notes = [
        f"gates of {node.name} ({', '.join(gate.metric for gate in gates_of(node.job.config))}) stand before "
        f"{', '.join(before.get(node.name, [])) or 'no stage'}"
        for node in chain
        if gates_of(node.job.config)
    ]
    found, why_none = judged(chain)
    return [*notes, *(line(one) for one in found if one.closed), *why_none]


def _fitted(node: Node, world_size: int) -> Any:
    return node.stage.fitted(node.job.config, world_size if node.stage.launched else 1)


def _fitted_notes(chain: Chain, world_size: int) -> list[str]:
    """What stages will set otherwise on that many ranks."""
    notes = (fitted_note(node.name, node.job.config, _fitted(node, world_size), world_size) for node in chain)
    return [note for note in notes if note]


def _stage(node: Node, found: Standing, world_size: int, price_per_gpu_hour: float | None) -> dict[str, Any]:
    job = node.job
    return {
        "stage": node.name,
        "kind": job.kind,
        "key": job.key,
        "directory": str(job.directory),
        "parents": {
            input_name(node.stage, field): node.parents.get(field, shown(link.path))
            for field, link in job.parents.items()
        },
        "state": found.state,
        "reasons": found.reasons,
        "figures": dict(node.stage.plan(_fitted(node, world_size), job.model, world_size)),
        "budget": budget(node, world_size, price_per_gpu_hour),
    }


def _figures(figures: dict[str, Any]) -> list[str]:
    width = max(len(name) for name in figures)
    return [f"{name.ljust(width)}  {figure(name, value)}" for name, value in figures.items()]


def _existing(path: Path) -> Path:
    """``path`` or the nearest directory above it that is there."""
    return path if path.exists() else _existing(path.parent)
