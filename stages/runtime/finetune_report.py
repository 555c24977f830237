"""What a fine-tuning run says of itself on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OF_THE_COURSE = frozenset({"tokens_per_s", "alarms"})
"""Metrics that depend on how the run went along; ``stage.json`` has them, the sealed output does not."""


def summary_lines(metrics: Mapping[str, Any], before: Mapping[str, Any], start_line: str, loss_name: str) -> list[str]:
    """Parameters, steps and rates, and what was measured of the parent and of the model, side by side."""
    lines = [
        f"{metrics['parameters']:,} parameters, {metrics['steps']:,} steps, {metrics['tokens']:,} tokens "
        f"({metrics['supervised_tokens']:,} scored) at {metrics['tokens_per_s']:,.0f} tok/s, "
        f"{metrics['skipped_steps']} steps skipped; {start_line}",
        f"final {loss_name} {metrics[f'final_{loss_name}']:.4f}, final lr {metrics['final_lr']:.3g}",
        f"{'held-out':<34}{'model':>10}{'parent':>10}",
    ]
    for name, value in metrics.items():
        if isinstance(before.get(name), float) and isinstance(value, float):
            lines.append(f"  {name:<32}{value:>10.4f}{before[name]:>10.4f}")
    return lines
