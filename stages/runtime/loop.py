"""The training loop that stages share: steps, guards, evaluation, checkpoints, requests to stop.

Everything that decides a step is a function of the step's number and the saved state, so that a run killed anywhere and
resumed is the uninterrupted run (TRAPS T6).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from stages.base import StopRequested
from stages.runtime import distributed
from stages.runtime.alarms import Alarm, Alarms, tell
from stages.runtime.checkpoint import CheckpointStore
from stages.runtime.engine import TrainingEngine
from stages.runtime.guards import GuardConfig, StepGuard
from stages.runtime.progress import Progress

FINAL_LOSS_STEPS = 50
"""Applied steps over which the final loss is the mean; fixed, so that no logging cadence shows in a sealed output."""

COURSE = ("tokens_per_s", "mfu", "data_wait_share")
"""Figures of progress that a train row has; they tell of the machine, not of the run."""


class LoopSettings(NamedTuple):
    """What the loop needs of a stage's config; 0 for a cadence means never."""

    max_steps: int
    global_batch_size: int
    micro_batch_size: int
    lr_at: Callable[[int], float]
    eval_every_steps: int
    checkpoint_every_steps: int
    pin_at_step: int | None
    log_every_steps: int
    checkpoint_bytes: int
    """Size of one checkpoint, all ranks together; a save is refused before it begins when the disk has less."""


@dataclasses.dataclass
class TrainState:
    """What a checkpoint keeps beside the engine's own files; plain JSON data."""

    step: int = 0
    supervised_tokens: int = 0
    loss: float = math.nan
    """Mean loss a token of the last steps that were logged together, nats."""
    loss_sum: float = 0.0
    loss_count: int = 0
    recent_losses: list[float] = dataclasses.field(default_factory=list)
    """Losses a token of the last ``FINAL_LOSS_STEPS`` applied steps, oldest first, nats."""
    best_bpb: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    weights_before: list[float] = dataclasses.field(default_factory=list)
    evaluation_due: bool = False
    """Whether this step's evaluation was broken off by a request to stop, and comes first when the run goes on."""
    alarms: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the alarms remember, as ``Alarms.state`` gives it; empty in checkpoints from before there were any."""

    @property
    def final_loss(self) -> float:
        """Mean of ``recent_losses``; NaN before any step was applied."""
        losses = self.recent_losses
        return math.fsum(losses) / len(losses) if losses else math.nan

    def apply(self, loss: float, n_tokens: int) -> None:
        """Count a step whose update was applied."""
        self.supervised_tokens += n_tokens
        self.loss_sum += loss
        self.loss_count += 1
        self.recent_losses = [*self.recent_losses, loss][-FINAL_LOSS_STEPS:]


class TrainLoop:
    """Runs ``settings.max_steps`` optimizer steps from wherever ``state`` stands.

    Args:
        engine: takes micro-batches and steps.
        batch: ``(step, rows)`` to a NamedTuple of tensors with ``labels``; a pure function.
        alarms: told every applied step's loss and every evaluation.
        evaluate: measures the model as it is; its dictionary holds ``bpb``. It raises ``StopRequested`` on all ranks
            when it was broken off by a request to stop.
        store: where checkpoints go; ``facts`` (plain JSON) are kept with each.
        tracker: ``log(event, step, values)``.
        watch: knows whether the run was asked to stop.
        progress: prints.
        first_step: what the first step of this process runs in.
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        engine: TrainingEngine,
        batch: Callable[[int, slice], Any],
        evaluate: Callable[[], dict[str, Any]],
        guard: StepGuard,
        alarms: Alarms,
        store: CheckpointStore,
        tracker: Any,
        watch: Any,
        progress: Progress,
        facts: Mapping[str, Any],
        first_step: AbstractContextManager[None] | None = None,
    ) -> None:
        self._first_step = first_step or nullcontext()
        self.settings, self.engine, self.batch, self.evaluate = settings, engine, batch, evaluate
        self.guard, self.store, self.tracker, self.watch = guard, store, tracker, watch
        self.progress, self.facts, self.alarms = progress, facts, alarms
        self.state = TrainState()
        self._saved_step: int | None = None

    def restore(self, saved: Mapping[str, Any], guard_config: GuardConfig) -> None:
        """Take up state and guard counters from a checkpoint's ``state``; the engine loads its own files."""
        self.state = TrainState(**saved["train"])
        self.guard = StepGuard.restored(guard_config, saved["guard"])
        self.alarms.restore(self.state.alarms)
        self._saved_step = self.state.step

    def run(self) -> None:
        """Train to the end and save there.

        Raises:
            StopRequested: on all ranks, after a save at a step boundary, or before the first step.
            TooManySkippedSteps: when the guard gives up.
        """
        if self.watch.agreed():
            # Nothing to save: what stands here is a checkpoint's content, or what the recipe makes anew.
            raise StopRequested(f"at step {self.state.step}, asked to stop by {self.watch.reason}")
        if self.state.evaluation_due:
            self._evaluate_at_boundary()
        self.progress.resume_clock()
        self.watch.then = "saving after this step"
        while self.state.step < self.settings.max_steps:
            with self._first_step:
                self._train_step()
            self._first_step = nullcontext()
            self._at_boundary()
        self.save()

    def save(self) -> None:
        """Save a checkpoint of the present step, unless there is one; collective."""
        step = self.state.step
        if self._saved_step == step:
            return
        self.state.alarms = self.alarms.state()
        content = {"train": dataclasses.asdict(self.state), "guard": self.guard.state(), **self.facts}
        # What a checkpoint says happened must be on disk before it: a resume goes by both.
        self.tracker.flush()
        pin, size = step == self.settings.pin_at_step, self.settings.checkpoint_bytes
        path = self.store.save(step, self.engine.save, content, pin=pin, expected_bytes=size)
        self.tracker.log_checkpoint(step, path)
        self._saved_step = step
        self.progress.saved()

    def log_evaluation(self) -> dict[str, Any]:
        """Evaluate, log and print; remembers the best."""
        values = self.evaluate()
        step = self.state.step
        if self.state.best_bpb is None or values["bpb"] < self.state.best_bpb:
            self.state.best_bpb, self.state.best_step = values["bpb"], step
        self.tracker.log("eval", step, values)
        by_language = "  ".join(f"{k.removeprefix('bpb/')} {v:.4f}" for k, v in values.items() if k.startswith("bpb/"))
        self.progress.say(f"step {step}  held-out {values['bpb']:.4f} bits/byte  {by_language}")
        self._tell("alarm_heldout", self.alarms.after_evaluation(step, values))
        return values

    def _train_step(self) -> None:
        started = time.monotonic()
        step = self.state.step
        lr = self.settings.lr_at(step)
        loss, n_tokens = self._accumulate(step)
        grad_norm, reason = self.engine.step(lr, lambda norm: self.guard.judge(loss, norm))
        self.state.step += 1
        if reason is None:
            self.state.apply(loss, n_tokens)
            self._tell("alarm_loss", self.alarms.after_step(self.state.step, loss))
        seconds = time.monotonic() - started
        self.state.seconds += seconds
        self.progress.count(seconds)
        if reason is not None:
            self._report_skip(reason, loss, grad_norm)
        if self.state.step % self.settings.log_every_steps == 0 or self.state.step == self.settings.max_steps:
            self._log(lr, grad_norm)

    def _accumulate(self, step: int) -> tuple[float, int]:
        """Loss a token of the whole step over all ranks, and its scored tokens; gradients are left in the engine."""
        started = time.monotonic()
        batches = [self.batch(step, rows) for rows in self._rows()]
        self.progress.waited(time.monotonic() - started)
        # The model shifts labels, so what stands at t = 0 is never predicted.
        scored = sum(int((batch.labels[:, 1:] != -100).sum()) for batch in batches)
        n_tokens = int(distributed.all_reduce_sum(scored))
        losses = [self.engine.accumulate(batch._asdict(), max(n_tokens, 1)) for batch in batches]
        return distributed.all_reduce_sum(float(torch.stack(losses).double().sum())), n_tokens

    def _rows(self) -> list[slice]:
        """This rank's rows of a step, a micro-batch at a time."""
        micro = self.settings.micro_batch_size
        count = self.settings.global_batch_size // distributed.world_size()
        first = distributed.rank() * count
        return [slice(start, start + micro) for start in range(first, first + count, micro)]

    def _at_boundary(self) -> None:
        """What happens between steps. A stop is honoured last, when the boundary's evaluation and save are done."""
        step, settings = self.state.step, self.settings
        self.guard.stop_if_hopeless(step)
        is_last = step == settings.max_steps
        paused = False
        if _due(step, settings.eval_every_steps) and not is_last:
            self._evaluate_at_boundary()
            paused = True
        if _due(step, settings.checkpoint_every_steps) or step == settings.pin_at_step:
            self.save()
            paused = True
        if self.watch.agreed():
            self.save()
            raise StopRequested(f"saved at step {step}, asked to stop by {self.watch.reason}")
        if paused:
            self.progress.resume_clock()

    def _evaluate_at_boundary(self) -> None:
        """Evaluate between two steps; when asked to stop meanwhile, save first, and evaluate when the run goes on."""
        self.state.evaluation_due = True
        try:
            self.log_evaluation()
        except StopRequested:
            self.save()
            raise StopRequested(f"saved at step {self.state.step}, asked to stop by {self.watch.reason}") from None
        self.state.evaluation_due = False

    def _log(self, lr: float, grad_norm: float) -> None:
        state, step = self.state, self.state.step
        if state.loss_count:
            state.loss = state.loss_sum / state.loss_count
        state.loss_sum, state.loss_count = 0.0, 0
        figures = self.progress.figures(step)
        values = {
            "loss_nats_per_token": state.loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "supervised_tokens": state.supervised_tokens,
            "skipped_nonfinite": self.guard.skipped_nonfinite,
            "skipped_spike": self.guard.skipped_spike,
            **{name: value for name, value in figures.items() if name in COURSE},
        }
        self.tracker.log("train", step, values)
        self.progress.say(self.progress.line(step, state.loss, lr, figures, self.guard.skipped))

    def _tell(self, event: str, said: list[Alarm]) -> None:
        tell(said, self.alarms, event=event, step=self.state.step, tracker=self.tracker, progress=self.progress)

    def _report_skip(self, reason: str, loss: float, grad_norm: float) -> None:
        step = self.state.step
        values = {"reason": reason, "loss_nats_per_token": loss, "grad_norm": grad_norm, "skipped": self.guard.skipped}
        self.tracker.log("skip", step, values)
        self.progress.say(
            f"step {step} skipped ({reason}): loss {loss:.4g}, gradient norm {grad_norm:.4g}, "
            f"{self.guard.skipped_in_a_row} in a row, {self.guard.skipped} in all"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
