"""Guards of a training step: non-finite and spiking steps are skipped, counted, and stop the run when they persist."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from stages.base import Section, operational
from stages.runtime.audit import AuditError


class GuardConfig(Section):
    """When a step is skipped, and when skipping ends the run (TRAPS T3)."""

    max_skipped_in_a_row: int = operational(10, ge=1, le=1_000_000_000)
    """Skipped steps one after another that stop the run with exit code 1: when to give up, never what is learnt."""
    spike_factor: float | None = Field(None, gt=1, le=1e6)
    """Skip a step whose gradient norm exceeds this many times its running mean; none never skips a finite step."""
    spike_window_steps: int = Field(64, ge=1, le=1_000_000)
    """Length of that running mean (exponential), and the number of taken steps before the first spike can be called."""


class TooManySkippedSteps(AuditError):  # noqa: N818 - names what happened
    """Steps were skipped one after another up to the limit; the run ends with exit code 1."""


@dataclasses.dataclass
class StepGuard:
    """Judges steps by loss and gradient norm; its counters are part of the checkpoint (TRAPS T6)."""

    config: GuardConfig
    skipped_nonfinite: int = 0
    skipped_spike: int = 0
    skipped_in_a_row: int = 0
    taken: int = 0
    mean_grad_norm: float = 0.0

    @property
    def skipped(self) -> int:
        """Steps skipped so far, for whatever reason."""
        return self.skipped_nonfinite + self.skipped_spike

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must be skipped (``"nonfinite"``, ``"spike"``), or None; counts it either way."""
        reason = self._reason(loss, grad_norm)
        if reason is None:
            self._take(grad_norm)
        elif reason == "nonfinite":
            self.skipped_nonfinite += 1
        else:
            self.skipped_spike += 1
        self.skipped_in_a_row = 0 if reason is None else self.skipped_in_a_row + 1
        return reason

    def stop_if_hopeless(self, step: int) -> None:
        """Raise ``TooManySkippedSteps`` when the limit of skipped steps in a row is reached."""
        if self.skipped_in_a_row >= self.config.max_skipped_in_a_row:
            raise TooManySkippedSteps(
                f"step {step}: {self.skipped_in_a_row} steps in a row were skipped "
                f"({self.skipped_nonfinite} non-finite, {self.skipped_spike} spikes in all); "
                "lower lr, or look at the data of these steps"
            )

    def state(self) -> dict[str, Any]:
        """The counters as plain data."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "config"}

    @classmethod
    def restored(cls, config: GuardConfig, state: Mapping[str, Any]) -> StepGuard:
        """The guard as ``state`` left it."""
        return cls(config, **state)

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "nonfinite"
        factor = self.config.spike_factor
        ready = self.taken >= self.config.spike_window_steps
        return "spike" if factor and ready and grad_norm > factor * self.mean_grad_norm else None

    def _take(self, grad_norm: float) -> None:
        self.taken += 1
        weight = 1 / min(self.taken, self.config.spike_window_steps)
        self.mean_grad_norm += weight * (grad_norm - self.mean_grad_norm)
