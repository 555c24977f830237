"""How a reinforcement run is put together: questions, the probe of the parent, rollouts, held-out accuracy."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.rewards import mean_pass_at_k
from stages.base import ConfigError, Fault, StageContext
from stages.runtime import distributed
from stages.runtime.faults import faults_of
from stages.runtime.finetune import Finetuning
from stages.runtime.finetune_trainer import RowOrder
from stages.runtime.grpo_report import decode_outcomes, encode_outcomes, paired_gain, summary_of
from stages.runtime.rollouts import Roller, Rollout, gathered, generator_of, groups_of, is_informative
from stages.runtime.suites.intervals import wilson

Group = tuple[Mapping[str, Any], Sequence[Rollout]]
"""A question's row and its completions."""


class Probe(NamedTuple):
    """What the parent's completions of training questions were like: pass@k by k, and three shares."""

    passed: Mapping[int, float]
    informative: float
    stop_rate: float
    questions: int
    samples: int

    def figures(self) -> dict[str, float]:
        """As rows and metrics have them."""
        found = {f"probe/pass@{k}": value for k, value in self.passed.items()}
        return found | {"probe/informative": self.informative, "probe/stop_rate": self.stop_rate}


COUNTED = ("groups", "groups_all_zero", "groups_all_one", "groups_filtered", "groups_trained")


class GRPOFinetuning(Finetuning):
    """One run; ``questions`` and the generators of rollouts are functions of the generation's number and the seed."""

    headline = "accuracy"
    better = "higher"
    loss_falls = False
    loss_name = "loss"

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        self.probe: dict[str, float] = {}
        self.outcomes_before: list[bool] = []
        self.outcomes: list[bool] = []
        self.totals = dict.fromkeys(COUNTED, 0)

    def prepare(self) -> None:
        """Read the questions of both sides and check that they fit."""
        folder, config = self.context.parent_output("data"), self.config
        self.train_rows, self.heldout_rows = (_read_rows(folder / f"{side}.jsonl") for side in ("train", "heldout"))
        self.heldout_hash = json.loads((folder / "tasks.json").read_bytes())["heldout_hash"]
        self.roller = Roller(
            self.tokenizer,
            rewards=config.rewards,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            autocast=self.autocast,
        )
        faults = self._length_faults()
        if len(self.train_rows) < self._questions_per_generation():
            message = f"must hold {self._questions_per_generation()} training questions for one generation"
            faults.append(Fault("data", f"{message}; got {len(self.train_rows)}; set more in the tasks stage"))
        if faults:
            raise ConfigError(faults)
        self.order = RowOrder(len(self.train_rows), rows=0, seed=self.context.seed)

    def _length_faults(self) -> list[Fault]:
        """Prompts that do not fit, and answers that could never be given whole and so never earn anything."""
        config, rows = self.config, [*self.train_rows, *self.heldout_rows]
        faults = []
        needed = self.roller.longest_answer(rows)
        if needed > config.max_completion_length:
            message = f"must hold the longest worked answer; got {config.max_completion_length}; set {needed} or more"
            faults.append(Fault("max_completion_length", message))
        longest = max(len(self.roller.encode(row)) for row in rows)
        if longest + config.max_completion_length > config.max_length:
            needed = longest + config.max_completion_length
            message = f"must hold the longest prompt ({longest} tokens) and max_completion_length"
            faults.append(Fault("max_length", f"{message}; got {config.max_length}; set {needed} or more"))
        return faults

    def make_trainer(self, model: Any, arguments: dict[str, Any], callbacks: list[Any]) -> Any:
        """TRL's trainer under our rollouts."""
        from stages.runtime.grpo_trainer import build_trainer

        return build_trainer(self, model, arguments, callbacks)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The arithmetic of the engine's forward passes, for passes beside it (T10)."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            yield

    def begin(self) -> None:
        """Take the engine over, measure, and probe the parent before the first step."""
        super().begin()
        if not self.probe:
            with faults_of(self.context.name):
                self._probe()

    def may_save(self, step: int) -> bool:
        """Between generations: TRL keeps rollouts in memory alone and would draw them anew from a later policy."""
        return step % self.config.steps_per_generation == 0

    def roll_out(self) -> tuple[list[Group], list[Group]]:
        """This rank's groups of the next generation: all that were sampled, and those that are trained on."""
        generation = self.state.step // self.config.steps_per_generation
        rows = self.questions(generation)
        generator = generator_of(self.engine.device, self.context.seed, "rollout", generation, distributed.rank())
        size = self.config.num_generations
        rollouts = self.roller.sample(self.model, rows, group=size, generator=generator)
        candidates = list(zip(rows, groups_of(rollouts, size), strict=True))
        wanted = len(rows) // self.config.oversampling
        ordered = sorted(range(len(rows)), key=lambda place: (not is_informative(candidates[place][1]), place))
        return candidates, [candidates[place] for place in sorted(ordered[:wanted])]

    def questions(self, generation: int) -> list[Mapping[str, Any]]:
        """This rank's questions of a generation, all candidates: consecutive pieces of permutations of the data."""
        count = self._questions_per_generation()
        share = count // distributed.world_size()
        first = generation * count + distributed.rank() * share
        return [self.train_rows[self._place(number)] for number in range(first, first + share)]

    def _place(self, number: int) -> int:
        epoch, place = divmod(number, len(self.train_rows))
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._permutation = epoch, self.order.permutation(epoch)
        return self._permutation[place]

    def _questions_per_generation(self) -> int:
        config = self.config
        return config.completions_per_generation // config.num_generations * config.oversampling

    def count_groups(self, figures: Mapping[str, float]) -> None:
        """Add one generation's groups to the run's."""
        for name in COUNTED:
            self.totals[name] += int(figures[name])

    def measure(self) -> dict[str, Any]:
        """Greedy accuracy, stop rate and length on all held-out questions, by task too."""
        rank, world = distributed.rank(), distributed.world_size()
        mine = list(range(rank, len(self.heldout_rows), world))
        rollouts: list[Rollout] = []
        # As often on every rank: the first has as many questions as any.
        for start in range(0, math.ceil(len(self.heldout_rows) / world), self.config.eval_batch_size):
            batch = mine[start : start + self.config.eval_batch_size]
            rollouts += self.roller.greedy(self.model, [self.heldout_rows[i] for i in batch], len(batch) or 1)
            self.between_batches()
        facts = gathered(
            [(i, r.correct, r.finished, len(r.completion_ids)) for i, r in zip(mine, rollouts, strict=True)]
        )
        facts.sort()
        self.outcomes = [correct for _, correct, _, _ in facts]
        if not self.outcomes_before:
            self.outcomes_before = self.outcomes
        count, right = len(facts), sum(self.outcomes)
        low, high = wilson(right, count)
        return {
            "accuracy": right / count,
            "accuracy_low": low,
            "accuracy_high": high,
            **self._accuracy_by_task(),
            "stop_rate": sum(finished for _, _, finished, _ in facts) / count,
            "completion_length_tokens": sum(length for _, _, _, length in facts) / count,
            "n": count,
            "heldout_hash": self.heldout_hash,
        }

    def _accuracy_by_task(self) -> dict[str, float]:
        found: dict[str, list[bool]] = {}
        for row, correct in zip(self.heldout_rows, self.outcomes, strict=True):
            found.setdefault(row["task"], []).append(correct)
        return {f"accuracy/{task}": sum(outcomes) / len(outcomes) for task, outcomes in sorted(found.items())}

    def _probe(self) -> None:
        """pass@k of the parent on training questions, and the refusal of a dead start (T9)."""
        config, size = self.config.probe, self.config.probe.samples
        rows = [self.train_rows[place] for place in self.order.permutation(-1)[: config.questions]]
        generator = generator_of(self.engine.device, self.context.seed, "probe", distributed.rank())
        mine = rows[distributed.rank() :: distributed.world_size()]
        rollouts = self.roller.sample(self.model, mine, group=size, generator=generator) if mine else []
        groups = gathered(
            [
                (sum(r.correct for r in group), is_informative(group), sum(r.finished for r in group))
                for group in groups_of(rollouts, size)
            ]
        )
        measured = Probe(
            passed=mean_pass_at_k([right for right, _, _ in groups], size),
            informative=sum(differs for _, differs, _ in groups) / len(groups),
            stop_rate=sum(finished for _, _, finished in groups) / (len(groups) * size),
            questions=len(groups),
            samples=size,
        )
        self.probe = measured.figures()
        self.context.tracker.log("probe", self.state.step, self.probe)
        self.progress.say("probe  " + "  ".join(f"{name} {value:.3f}" for name, value in self.probe.items()))
        fault = dead_start(measured, config.min_informative)
        if fault is not None:
            raise ConfigError(fault)

    def extra_state(self) -> dict[str, Any]:
        """The probe, the parent's outcomes question by question, and the groups counted."""
        return {"probe": self.probe, "outcomes_before": encode_outcomes(self.outcomes_before), "totals": self.totals}

    def load_extra(self, state: dict[str, Any], folder: Path) -> None:
        """Take up what ``extra_state`` saved."""
        self.probe, self.totals = state["probe"], state["totals"]
        self.outcomes_before = decode_outcomes(state["outcomes_before"])

    def extra_metrics(self) -> dict[str, Any]:
        """The gain on held-out questions with its paired interval, the probe, and the groups."""
        gain, low, high = paired_gain(self.outcomes_before, self.outcomes)
        gains = {"accuracy_gain": gain, "accuracy_gain_low": low, "accuracy_gain_high": high}
        # In one order: a checkpoint gives its keys back sorted, and a resumed run must write the same bytes.
        return gains | dict(sorted((self.probe | self.totals).items()))

    def audit_faults(self, metrics: dict[str, Any]) -> list[str]:
        """A run in which no group was ever trained on."""
        return [] if self.totals["groups_trained"] else ["in no group did completions earn different rewards"]

    def summary(self, metrics: dict[str, Any]) -> list[str]:
        """The runtime's screen, then what was learnt."""
        return [*super().summary(metrics), *summary_of(metrics)]


def dead_start(probe: Probe, least: float) -> Fault | None:
    """The fault of a start without anything to learn from: too few groups whose completions differ in reward (T9)."""
    if probe.informative >= least:
        return None
    measured = (
        f"of {probe.questions} training questions with {probe.samples} completions each, {probe.informative:.1%} had "
        f"completions that earn different rewards, pass@1 {probe.passed[1]:.3f}, pass@{probe.samples} "
        f"{probe.passed[probe.samples]:.3f}, {probe.stop_rate:.1%} of completions stopped"
    )
    if probe.passed[1] > 0.5:
        way_out = "the parent knows them already: set harder tasks (size)"
    elif probe.stop_rate < 0.5:
        way_out = "most are cut off and earn nothing: set more max_completion_length, or teach the form in sft"
    else:
        way_out = "set easier tasks (size), more demonstrations in the sft stage, or a graded reward (in_place)"
    return Fault("from", f"must leave a share of {least:g} of questions to learn from; got {measured}; {way_out}")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
