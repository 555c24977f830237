"""What a recipe asks of an evaluation before the chain may go on from the model that it measured. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from pydantic import Field

from stages.base import Fault, Section

PARENT = "parent"
"""The model that the measured one was trained from."""


class GateConfig(Section):
    """One demand on one score (TRAPS M8), decided on 95% intervals and never on the value alone (M6).

    Of ``max``, ``min`` and ``max_regression`` each that is set is a limit of its own. A limit is kept where the whole
    interval lies within it, and broken where the whole interval lies beyond it.
    """

    metric: str = Field(min_length=1)
    """Score, such as ``bpb/de``, or a pattern: ``safety/over_refusal*`` asks the same of every score that fits."""
    max: float | None = Field(None, allow_inf_nan=False)
    """Highest value allowed, in the score's unit; decided on the score's own interval."""
    min: float | None = Field(None, allow_inf_nan=False)
    """Lowest value allowed, in the score's unit; decided on the score's own interval."""
    max_regression: float | None = Field(None, allow_inf_nan=False)
    """How much worse than ``against`` it may be, in the score's unit; below 0 it must be better by so much. Decided on
    the paired interval of the difference on the same items."""
    against: str | None = Field(None, min_length=1)
    """What to be compared with: ``parent`` (so where none is named) or a model stage of the recipe, which an evaluate
    stage of the recipe must measure by the same suites; or the path of a finished evaluation's artifact elsewhere."""
    undecided: Literal["pass", "stop"] = "pass"
    """What becomes of the chain where the interval holds the limit: ``pass`` goes on and says so, ``stop`` asks for
    proof. A score that is missing, or cannot be compared, stops it in any case."""

    @property
    def baseline(self) -> str | None:
        """The model to be compared with; none where nothing is compared."""
        return None if self.max_regression is None else self.against or PARENT


def gate_faults(gates: Sequence[GateConfig], suites: Collection[str]) -> list[Fault]:
    """Gates without a limit, with two that exclude each other, or on a score that none of the ``suites`` makes."""
    faults = []
    for number, gate in enumerate(gates):
        place = f"gates.{number}"
        limits = [gate.max, gate.min, gate.max_regression]
        if all(limit is None for limit in limits):
            faults.append(Fault(place, "must have a limit; got none; set max, min or max_regression"))
        if gate.max is not None and gate.min is not None and gate.min > gate.max:
            faults.append(Fault(f"{place}.min", f"must be at most max {gate.max}; got {gate.min}; set less"))
        if gate.against is not None and gate.max_regression is None:
            message = f"is read with max_regression alone; got {gate.against!r}; set max_regression, or leave it out"
            faults.append(Fault(f"{place}.against", message))
        suite = gate.metric.partition("/")[0]
        if suite not in suites:
            there = ", ".join(suites) or "none"
            message = f"must begin with one of the chosen suites ({there}); got {gate.metric!r}; name such a score"
            faults.append(Fault(f"{place}.metric", message))
    return faults
