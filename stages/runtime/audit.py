"""What a training stage must prove of itself before it may say that it is done (TRAPS T4)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


class AuditError(RuntimeError):
    """A stage looked at what it has made and it is not what was asked for; exit code 1.

    The message says all that helps, so a traceback goes to the log alone.
    """


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """Facts of a finished run: steps whose update was applied, scored tokens, last loss, weights then and now."""

    steps_applied: int
    supervised_tokens: int
    loss: float
    weights_before: Sequence[float]
    weights_after: Sequence[float]
    evaluation: Mapping[str, Any]
    score: str = "bpb"
    """Name of the figure in ``evaluation`` without which there was none."""

    @property
    def unchanged_parameters(self) -> int:
        """Parameters whose fingerprint is what it was at the start."""
        pairs = zip(self.weights_before, self.weights_after, strict=True)
        return sum(before == after for before, after in pairs)


def audit(record: TrainingRecord, also: Sequence[str] = ()) -> None:
    """Raise ``AuditError`` with every reason why ``record`` is not one of a run that trained.

    ``also`` holds reasons that the stage itself found.
    """
    faults = []
    if record.steps_applied < 1:
        faults.append("no optimizer step was applied")
    if record.supervised_tokens < 1:
        faults.append("no token was scored in training")
    if not math.isfinite(record.loss):
        faults.append(f"the last loss is {record.loss}")
    if record.unchanged_parameters == len(record.weights_after):
        faults.append("no weight changed")
    if not all(math.isfinite(value) for value in record.weights_after):
        faults.append("some weights are not finite")
    score = record.evaluation.get(record.score)
    if not isinstance(score, float) or not math.isfinite(score):
        faults.append(f"the final evaluation is missing or not finite: {record.score} {score}")
    faults += also
    if faults:
        raise AuditError("the run must not be called done: " + "; ".join(faults))
