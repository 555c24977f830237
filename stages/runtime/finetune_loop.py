"""What happens around the steps of a trainer that is not ours: guards, rows, measurements, checkpoints, stops, resume.

The library runs forward and backward; this decides about the step, as ``loop.TrainLoop`` does for pretraining. What
decides a step is a function of its number and the saved state, so that a run killed anywhere and resumed is the
uninterrupted run (TRAPS T6).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from stages.base import ConfigError, Fault, StopRequested
from stages.runtime import distributed, settings
from stages.runtime.alarms import Alarm, Alarms, Better, tell
from stages.runtime.checkpoint import CheckpointStore
from stages.runtime.finetune_engine import AdoptedEngine
from stages.runtime.guards import StepGuard
from stages.runtime.loop import TrainState
from stages.runtime.manifest import MANIFEST
from stages.runtime.progress import Progress
from stages.runtime.schedule import lr_at, same_path

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass
class FinetuneState(TrainState):
    """What a checkpoint keeps beside the engine's own files; plain JSON data."""

    tokens: int = 0
    """Tokens of all steps, applied or not, that went through the model."""
    before: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What was measured before the first step: the parent, on this stage's held-out set."""


class Host(Protocol):
    """What the loop asks of the stage; ``finetune.Finetuning`` is one."""

    headline: str
    better: Better
    loss_name: str
    loss_falls: bool

    def measured(self) -> dict[str, Any]:
        """Metrics of the model as it is."""

    def may_save(self, step: int) -> bool:
        """Whether the state after ``step`` can be resumed from."""

    def drain_metrics(self) -> dict[str, float]:
        """What the library measured in training since the last call."""

    def checkpoint_state(self) -> dict[str, Any]:
        """The stage's own plain JSON content of a checkpoint."""

    def restore_state(self, state: dict[str, Any], folder: Path) -> None:
        """Take up what ``checkpoint_state`` and ``write_extra`` saved."""

    def write_extra(self, folder: Path) -> None:
        """The stage's own files of a checkpoint; every rank is asked."""


class FinetuneLoop:
    """Steps, boundaries and checkpoints of one run.

    Args:
        config: a ``FinetuneConfig``.
        engine: the adopted engine.
        host: the stage.
        directory: the artifact's.
        tracker: ``log(event, step, values)``.
        watch: knows whether the run was asked to stop.
        progress: prints.
        checkpoint_bytes: size of one checkpoint, all ranks together; None where it is not known.
    """

    def __init__(
        self,
        config: Any,
        *,
        engine: AdoptedEngine,
        host: Host,
        directory: Path,
        tracker: Any,
        watch: Any,
        progress: Progress,
        checkpoint_bytes: int | None,
    ) -> None:
        self.config, self.engine, self.host = config, engine, host
        self.tracker, self.watch, self.progress = tracker, watch, progress
        self.store = CheckpointStore(directory / CHECKPOINTS, keep=config.keep_checkpoints)
        self.guard = StepGuard(config.guards)
        self.alarms = Alarms(config.alarms, score=host.headline, better=host.better, loss_falls=host.loss_falls)
        self.state = FinetuneState()
        self.checkpoint_bytes = checkpoint_bytes
        self._saved_step: int | None = None
        self._save_is_due = False
        self._resumed_from: Path | None = None
        self._losses: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._started = 0.0
        self.grad_norm = math.nan

    def lr(self, step: int) -> float:
        """Learning rate of the optimizer step with index ``step``."""
        config = self.config
        return lr_at(step, config.schedule, lr=config.lr, max_steps=config.max_steps, min_lr_ratio=config.min_lr_ratio)

    def resume(self) -> bool:
        """Take up the newest checkpoint on this course; collective. False where the run starts from step 0.

        Raises:
            ConfigError: when it was saved by another number of ranks or under another ZeRO stage.
        """
        found = self.store.newest(self._is_on_course)
        if found is None:
            self.store.set_aside_after(-1)
            # A run killed before its first save leaves rows of a future that never came.
            self.tracker.resume(0)
            self.state.weights_before = self.engine.fingerprint()
            return False
        step, folder, saved = found
        self._check_shape(step, saved)
        self.store.set_aside_after(step)
        self.engine.load(folder)
        self.state = FinetuneState(**saved["train"])
        self.guard = StepGuard.restored(self.config.guards, saved["guard"])
        self.alarms.restore(self.state.alarms)
        self.host.restore_state(saved["host"], folder)
        self._saved_step, self._resumed_from = step, folder
        self.progress.saved(max(0.0, time.time() - (folder / MANIFEST).stat().st_mtime))
        self.tracker.resume(step)
        self.progress.say(f"resumed from step {step}")
        return True

    def stop_if_asked(self) -> None:
        """Raise ``StopRequested`` on all ranks before the next step; what stands is on disk, or the recipe makes it."""
        if self.watch.agreed():
            raise StopRequested(f"at step {self.state.step}, asked to stop by {self.watch.reason}")

    def begin_step(self) -> None:
        """Before the first micro-batch of a step. Only here random states are put back: loaders draw on starting."""
        if self._resumed_from is not None:
            self.engine.restore_random(self._resumed_from)
            self._resumed_from = None
        self._started = time.monotonic()

    def count(self, tokens: Any, supervised: Any) -> None:
        """Note one micro-batch's tokens and scored tokens, numbers or tensors, of this rank."""
        self._counts.append(torch.stack([torch.as_tensor(n, device=self.engine.device) for n in (tokens, supervised)]))

    def backward(self, loss: torch.Tensor, *, is_last: bool, **kwargs: Any) -> None:
        """Backward of one micro-batch, and with the last one the step."""
        self.engine.backward(loss, is_last=is_last, **kwargs)
        self._losses.append(loss.detach())
        if is_last:
            self._take_step()

    def _take_step(self) -> None:
        loss, tokens, supervised = self._sums()
        norm, reason = self.engine.step(self.lr(self.state.step), lambda norm: self.guard.judge(loss, norm))
        self.grad_norm = norm
        self.state.step += 1
        self.state.tokens += tokens
        if reason is None:
            self.state.apply(loss, supervised)
            self._tell("alarm_loss", self.alarms.after_step(self.state.step, loss))
        else:
            self._report_skip(reason, loss)
        self.progress.tokens_per_step = tokens

    def _sums(self) -> tuple[float, int, int]:
        """The step's loss, tokens and scored tokens over all ranks.

        The engine averages gradients over ranks, so the loss that is descended is the mean of the ranks' sums.
        """
        loss = float(torch.stack(self._losses).double().sum())
        counts = torch.stack(self._counts).sum(0).tolist() if self._counts else [0, 0]
        self._losses, self._counts = [], []
        total = distributed.all_reduce_sum(loss) / distributed.world_size()
        return total, int(distributed.all_reduce_sum(counts[0])), int(distributed.all_reduce_sum(counts[1]))

    def end_step(self) -> None:
        """What happens between steps. A stop is honoured last, when the boundary's measurement and save are done."""
        step, config = self.state.step, self.config
        seconds = time.monotonic() - self._started
        self.state.seconds += seconds
        self.progress.count(seconds)
        if step % config.log_every_steps == 0 or step == config.max_steps:
            self._log()
        self.guard.stop_if_hopeless(step)
        paused = False
        if _due(step, config.eval_every_steps) and step != config.max_steps:
            self._measure_at_boundary()
            paused = True
        at_pin = step == settings.pin_step(config)
        self._save_is_due |= _due(step, config.checkpoint_every_steps) or at_pin
        if self.host.may_save(step):
            paused |= self._save_if_due()
            if self.watch.agreed():
                self.save()
                raise StopRequested(f"saved at step {step}, asked to stop by {self.watch.reason}")
        if paused:
            self.progress.resume_clock()

    def _save_if_due(self) -> bool:
        if not self._save_is_due:
            return False
        self.save()
        return True

    def save(self) -> None:
        """Save a checkpoint of the present step, unless there is one; collective."""
        self._save_is_due = False
        step = self.state.step
        if self._saved_step == step:
            return
        self.state.alarms = self.alarms.state()
        content = {
            "train": dataclasses.asdict(self.state),
            "guard": self.guard.state(),
            "host": self.host.checkpoint_state(),
            "max_steps": self.config.max_steps,
            "world_size": distributed.world_size(),
            "zero_stage": self.engine.zero_stage,
        }
        # What a checkpoint says happened must be on disk before it: a resume goes by both.
        self.tracker.flush()
        pin = step == settings.pin_step(self.config)
        path = self.store.save(step, self._write, content, pin=pin, expected_bytes=self.checkpoint_bytes)
        self.tracker.log_checkpoint(step, path)
        self._saved_step = step
        self.progress.saved()

    def _write(self, folder: Path) -> None:
        self.engine.save(folder)
        self.host.write_extra(folder)

    def measure(self) -> dict[str, Any]:
        """Measure, log and print."""
        values = self.host.measured()
        step = self.state.step
        self.tracker.log("eval", step, values)
        self.progress.say(f"step {step}  held-out {shown(values)}")
        self._tell("alarm_heldout", self.alarms.after_evaluation(step, values))
        return values

    def catch_up(self) -> None:
        """Measure now what a request to stop broke off before the checkpoint that the run goes on from."""
        if self.state.evaluation_due:
            self._measure_at_boundary()

    def _measure_at_boundary(self) -> None:
        """Measure between two steps; when asked to stop meanwhile, save first, and measure when the run goes on."""
        self.state.evaluation_due = True
        try:
            self.measure()
        except StopRequested:
            self.save()
            raise StopRequested(f"saved at step {self.state.step}, asked to stop by {self.watch.reason}") from None
        self.state.evaluation_due = False

    def _log(self) -> None:
        state, step = self.state, self.state.step
        if state.loss_count:
            state.loss = state.loss_sum / state.loss_count
        state.loss_sum, state.loss_count = 0.0, 0
        figures = self.progress.figures(step)
        lr = self.lr(step - 1)
        values = {
            **self.host.drain_metrics(),
            self.host.loss_name: state.loss,
            "lr": lr,
            "grad_norm": self.grad_norm,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
            "skipped_nonfinite": self.guard.skipped_nonfinite,
            "skipped_spike": self.guard.skipped_spike,
            **{name: value for name, value in figures.items() if name in ("tokens_per_s", "mfu")},
        }
        self.tracker.log("train", step, values)
        self.progress.say(self.progress.line(step, state.loss, lr, figures, self.guard.skipped))

    def _tell(self, event: str, said: list[Alarm]) -> None:
        tell(said, self.alarms, event=event, step=self.state.step, tracker=self.tracker, progress=self.progress)

    def _report_skip(self, reason: str, loss: float) -> None:
        step, guard = self.state.step, self.guard
        values = {
            "reason": reason,
            self.host.loss_name: loss,
            "grad_norm": self.grad_norm,
            "skipped": guard.skipped,
        }
        self.tracker.log("skip", step, values)
        self.progress.say(
            f"step {step} skipped ({reason}): loss {loss:.4g}, gradient norm {self.grad_norm:.4g}, "
            f"{guard.skipped_in_a_row} in a row, {guard.skipped} in all"
        )

    def _is_on_course(self, step: int, saved: Mapping[str, Any]) -> bool:
        """Whether the steps up to ``step`` had the learning rates that this config gives them."""
        config = self.config
        return same_path(step, config.schedule, max_steps=config.max_steps, other_max_steps=saved["max_steps"])

    def _check_shape(self, step: int, saved: Mapping[str, Any]) -> None:
        faults = []
        if saved["world_size"] != distributed.world_size():
            ranks = f"was saved by {saved['world_size']} ranks and loads on as many; got {distributed.world_size()}"
            faults.append(Fault("", f"the checkpoint of step {step} {ranks}; start {saved['world_size']} ranks"))
        if saved["zero_stage"] != self.engine.zero_stage:
            stage = f"was saved under ZeRO-{saved['zero_stage']}; got {self.config.deepspeed}"
            message = f"the checkpoint of step {step} {stage}; go on with zero{saved['zero_stage']}"
            faults.append(Fault("deepspeed", message))
        if faults:
            raise ConfigError(faults)


def shown(values: Mapping[str, Any]) -> str:
    """The fractional figures among ``values`` in one line."""
    figures = {name: value for name, value in values.items() if isinstance(value, float)}
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items())


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
