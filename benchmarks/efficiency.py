"""What rows of several ranks amount to beside those of one, and what they foretell of more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def with_efficiency(rows: list[dict[str, Any]]) -> None:
    """Add to each row its efficiency and what it was compared with, where one rank was measured."""
    for row in rows:
        alone = [one for one in rows if one["mode"] == row["mode"] and one["ranks"] == 1 and "tokens_per_s" in one]
        same = [one for one in alone if one["engine"] == row["engine"]]
        reference = next(iter(same or [one for one in alone if one["engine"] == "zero1"]), None)
        if reference is not None and "tokens_per_s" in row:
            row["efficiency"] = round(row["tokens_per_s"] / row["ranks"] / reference["tokens_per_s"], 4)
            row["compared_with"] = f"{reference['engine']} on 1"


def projections(rows: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """Step time and efficiency on ``ranks``, foretold from each weak row of several ranks; nothing of it is measured.

    What a rank sends grows by (N-1)/N, over links that give each GPU the same bandwidth whatever their number: exposed
    communication is stretched by it, the rest of the step stays, though each rank's share of the optimizer shrinks.
    """
    found = []
    for row in rows:
        if row["mode"] == "strong" or not 1 < row["ranks"] < ranks or "efficiency" not in row:
            continue
        grown = row["exposed_ms"] * ((ranks - 1) / ranks) / ((row["ranks"] - 1) / row["ranks"])
        step_ms = row["step_ms"] - row["exposed_ms"] + grown
        said = {name: row[name] for name in ("mode", "engine", "changes")}
        efficiency = row["efficiency"] * row["step_ms"] / step_ms
        said |= {"measured_on": row["ranks"], "projected_to": ranks, "step_ms": round(step_ms, 1)}
        found.append(said | {"exposed_ms": round(grown, 2), "efficiency": round(efficiency, 4)})
    return found
