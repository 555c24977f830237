"""What an operator should be told while a run trains: loss spikes, plateaus, and held-out scores that get worse.

An alarm needs consecutive evidence: one bad step, window or evaluation raises none. It is raised once, says what it
saw, and is cleared when the evidence is gone. Alarms look at numbers that are there anyway and change nothing: no
weight, no random number, no datum. Their state goes into checkpoints, so that a resumed run tells what the
uninterrupted one would (TRAPS T6).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from stages.base import Section

Better = Literal["lower", "higher"]
SIGMAS_PER_MAD = 1.4826
"""Standard deviations of a normal distribution over its median absolute deviation."""
Z95 = 1.96


class AlarmConfig(Section):
    """When a run tells its operator that something goes wrong; none of it changes what is learnt."""

    spike_deviations: float | None = Field(6.0, gt=0, le=1e6)
    """A step's loss is out of line this many robust standard deviations above the recent median; none never looks."""
    spike_steps: int = Field(3, ge=1, le=1_000_000_000)
    """Steps out of line one after another that are called a spike."""
    spike_window_steps: int = Field(64, ge=8, le=1_000_000)
    """Steps that the median and its deviation are taken from; a loss that stays out of line as long is the new line."""
    plateau_window_steps: int = Field(200, ge=4, le=1_000_000)
    """Steps whose mean loss is one piece of evidence about a plateau."""
    plateau_windows: int | None = Field(5, ge=1, le=1_000_000)
    """Windows one after another without improvement that are called a plateau; none never looks."""
    plateau_min_improvement: float = Field(0.001, ge=0, lt=1)
    """Share of the best window's mean loss by which a later one must lie below it, and beyond the noise of both."""
    regression_evaluations: int | None = Field(3, ge=1, le=1_000_000)
    """Held-out evaluations one after another that must be worse than the best one before; none never looks."""
    regression_tolerance: float = Field(0.01, ge=0, le=1e6)
    """Share of the best value by which an evaluation, at its interval's better end, must be worse to count."""


class Alarm(NamedTuple):
    """One thing to say: ``kind`` is ``spike``, ``plateau`` or ``regression``; ``raised`` is false when it is over."""

    kind: str
    metric: str
    raised: bool
    text: str


@dataclasses.dataclass
class LossState:
    """What the alarms of the training loss remember; plain data."""

    line: list[float] = dataclasses.field(default_factory=list)
    """Recent losses that were in line, oldest first."""
    above: list[float] = dataclasses.field(default_factory=list)
    """Losses out of line one after another, up to now."""
    spiking: bool = False
    window: list[float] = dataclasses.field(default_factory=list)
    """Losses of the present plateau window."""
    best_mean: float | None = None
    best_error: float = 0.0
    """Standard error of ``best_mean``."""
    stale_windows: int = 0
    flat: bool = False


@dataclasses.dataclass
class ScoreState:
    """What the regression alarm of one held-out score remembers; plain data."""

    best: float
    best_step: int
    worse: list[int] = dataclasses.field(default_factory=list)
    """Steps of the evaluations that were worse one after another, up to now."""
    raised: bool = False


class Alarms:
    """Watches one run.

    Args:
        config: when to speak.
        score: name of the main held-out figure; its groups (``bpb/de``) are watched each by itself, since a mean hides
            the one that falls (TRAPS M8).
        better: which direction of it is good.
        loss_falls: whether the training loss should fall; that of a policy gradient says nothing by its level.
    """

    def __init__(self, config: AlarmConfig, *, score: str, better: Better = "lower", loss_falls: bool = True) -> None:
        self.config, self.score, self.better, self.loss_falls = config, score, better, loss_falls
        self.losses = LossState()
        self.scores: dict[str, ScoreState] = {}
        self.raised = 0
        """Alarms raised so far."""

    def state(self) -> dict[str, Any]:
        """Everything that is remembered, as plain data."""
        scores = {name: dataclasses.asdict(score) for name, score in self.scores.items()}
        return {"losses": dataclasses.asdict(self.losses), "scores": scores, "raised": self.raised}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave; an empty one, of a checkpoint from before there were alarms, starts anew."""
        if state:
            self.losses, self.raised = LossState(**state["losses"]), state["raised"]
            self.scores = {name: ScoreState(**score) for name, score in state["scores"].items()}

    @property
    def standing(self) -> list[str]:
        """What is wrong at this moment: ``spike loss``, ``regression bpb/de``."""
        losses = {"spike loss": self.losses.spiking, "plateau loss": self.losses.flat}
        scores = {f"regression {name}": score.raised for name, score in sorted(self.scores.items())}
        return [name for name, is_up in {**losses, **scores}.items() if is_up]

    def after_step(self, step: int, loss: float) -> list[Alarm]:
        """What the loss of one applied step gives reason to say; ``step`` counts from 1."""
        return self._counted([*self._spike(step, loss), *self._plateau(step, loss)]) if self.loss_falls else []

    def after_evaluation(self, step: int, values: Mapping[str, Any]) -> list[Alarm]:
        """What one evaluation gives reason to say; the first is what later ones are held against."""
        if self.config.regression_evaluations is None:
            return []
        # Where the whole has an interval, a group without one has noise that nobody knows.
        has_interval = self._end_of(self.score) in values
        named = [name for name in values if name.split("/")[0] == self.score]
        if has_interval:
            named = [name for name in named if self._end_of(name) in values]
        found = [alarm for name in sorted(named) for alarm in self._regression(step, name, values)]
        return self._counted(found)

    def _counted(self, alarms: list[Alarm]) -> list[Alarm]:
        self.raised += sum(alarm.raised for alarm in alarms)
        return alarms

    def _spike(self, step: int, loss: float) -> list[Alarm]:
        config, losses = self.config, self.losses
        if config.spike_deviations is None:
            return []
        limit = spike_limit(losses.line, config.spike_deviations) if self._line_is_known() else math.inf
        if loss <= limit:
            was, losses.spiking, losses.above = losses.spiking, False, []
            losses.line = [*losses.line, loss][-config.spike_window_steps :]
            return [_over("spike", f"step {step}: the loss is back in line at {loss:.4g}")] if was else []
        losses.above = [*losses.above, loss]
        if len(losses.above) >= config.spike_window_steps:
            return self._new_line(step)
        if losses.spiking or len(losses.above) < config.spike_steps:
            return []
        losses.spiking = True
        text = (
            f"step {step}: loss spike, {len(losses.above)} steps in a row above {limit:.4g}, the last at {loss:.4g} "
            f"(median of the {len(losses.line)} in line before {statistics.median(losses.line):.4g})"
        )
        return [Alarm("spike", "loss", True, text)]

    def _line_is_known(self) -> bool:
        """Whether enough steps were in line for a deviation that means something."""
        return len(self.losses.line) >= self.config.spike_window_steps // 2

    def _new_line(self, step: int) -> list[Alarm]:
        losses = self.losses
        was, count = losses.spiking, len(losses.above)
        losses.line, losses.above, losses.spiking = losses.above, [], False
        median = statistics.median(losses.line)
        text = f"step {step}: the loss has stayed high for {count} steps; later ones are held against {median:.4g}"
        return [_over("spike", text)] if was else []

    def _plateau(self, step: int, loss: float) -> list[Alarm]:
        config, losses = self.config, self.losses
        if config.plateau_windows is None:
            return []
        losses.window = [*losses.window, loss]
        if len(losses.window) < config.plateau_window_steps:
            return []
        mean, error = statistics.fmean(losses.window), standard_error(losses.window)
        losses.window = []
        if losses.best_mean is None or self._improves(mean, error, losses.best_mean, losses.best_error):
            losses.best_mean, losses.best_error = mean, error
            was, losses.flat, losses.stale_windows = losses.flat, False, 0
            return [_over("plateau", f"step {step}: the loss falls again, mean {mean:.4g}")] if was else []
        losses.stale_windows += 1
        if losses.flat or losses.stale_windows < config.plateau_windows:
            return []
        losses.flat = True
        text = (
            f"step {step}: plateau, {losses.stale_windows} windows of {config.plateau_window_steps} steps without "
            f"improvement; the last mean {mean:.4g}, the best {losses.best_mean:.4g}"
        )
        return [Alarm("plateau", "loss", True, text)]

    def _improves(self, mean: float, error: float, best: float, best_error: float) -> bool:
        noise = Z95 * math.hypot(error, best_error)
        return best - mean > max(noise, self.config.plateau_min_improvement * abs(best))

    def _regression(self, step: int, name: str, values: Mapping[str, Any]) -> list[Alarm]:
        value, score = values[name], self.scores.get(name)
        if score is None:
            if math.isfinite(value):
                self.scores[name] = ScoreState(value, step)
            return []
        # What is not finite is worse than anything.
        behind = self._behind(self._better_end(name, values), score.best) if math.isfinite(value) else math.inf
        allowed = self.config.regression_tolerance * abs(score.best)
        if math.isfinite(value) and self._behind(value, score.best) <= 0:
            score.best, score.best_step = value, step
        if behind <= allowed:
            was, score.raised, score.worse = score.raised, False, []
            text = f"step {step}: {name} is back at {value:.4g} (best {score.best:.4g} at step {score.best_step})"
            return [Alarm("regression", name, False, text)] if was else []
        score.worse = [*score.worse, step]
        if score.raised or len(score.worse) < (self.config.regression_evaluations or 0):
            return []
        score.raised = True
        return [Alarm("regression", name, True, self._falling(step, name, value, score))]

    def _falling(self, step: int, name: str, value: float, score: ScoreState) -> str:
        return (
            f"step {step}: {name} worse than its best {score.best:.4g} (step {score.best_step}) in {len(score.worse)} "
            f"evaluations in a row (steps {', '.join(map(str, score.worse))}), now {value:.4g}"
        )

    def _behind(self, value: float, best: float) -> float:
        """How much worse ``value`` is than ``best``; negative when it is better."""
        return value - best if self.better == "lower" else best - value

    def _better_end(self, name: str, values: Mapping[str, Any]) -> float:
        """The end of the score's 95% interval that speaks for it; the score itself where it has no interval."""
        found = values.get(self._end_of(name))
        return found if isinstance(found, float) and math.isfinite(found) else values[name]

    def _end_of(self, name: str) -> str:
        head, slash, group = name.partition("/")
        return f"{head}_{'low' if self.better == 'lower' else 'high'}{slash}{group}"


def _over(kind: str, text: str) -> Alarm:
    return Alarm(kind, "loss", False, text)


def spike_limit(line: Sequence[float], deviations: float) -> float:
    """Median of ``line`` plus that many robust standard deviations (Hampel 1974: the median absolute deviation).

    A line without any spread has a limit of a thousandth of its median above it, so that rounding is no spike.
    """
    median = statistics.median(line)
    spread = SIGMAS_PER_MAD * statistics.median(abs(loss - median) for loss in line)
    return median + max(deviations * spread, 1e-3 * abs(median))


def standard_error(sample: Sequence[float]) -> float:
    """Standard error of the mean of independent values."""
    return statistics.stdev(sample) / math.sqrt(len(sample))


def tell(said: Sequence[Alarm], alarms: Alarms, *, event: str, step: int, tracker: Any, progress: Any) -> None:
    """One row, one line each on the console, and a notification where the tracker has somewhere to send it.

    The row has what was ``raised`` and ``cleared``, the ``text``, and all alarms ``standing`` at this moment.
    """
    if not said:
        return
    text = "; ".join(alarm.text for alarm in said)
    raised = [f"{alarm.kind} {alarm.metric}" for alarm in said if alarm.raised]
    cleared = [f"{alarm.kind} {alarm.metric}" for alarm in said if not alarm.raised]
    names = {"raised": raised, "cleared": cleared, "standing": alarms.standing}
    tracker.log(event, step, {"text": text, **{name: ", ".join(found) for name, found in names.items()}})
    for alarm in said:
        progress.say(f"{'ALARM' if alarm.raised else 'alarm over'}  {alarm.text}")
    if raised:
        tracker.notify(text)
