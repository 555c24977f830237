"""Gates: whether an evaluation's scores let the chain go on from its model, decided on intervals (TRAPS M6, M8).

Each limit of each gate is judged by itself on every score that it names; nothing is averaged. ``passed``: the whole
interval lies within the limit. ``failed``: the whole interval lies beyond it. ``undecided``: the interval holds the
limit; the gate says whether that stops the chain. ``cannot be judged``: the score, its baseline or an interval is
missing, or the two were not measured alike; that always stops it. What is judged is read from artifacts each time.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.gates_graph import baseline, gated, gates_of
from pipelines.gates_record import FLAG, Override, overrides_of
from pipelines.graph import is_path
from pipelines.report_format import interval_text, number
from pipelines.scores import Evaluation, Score, evaluators, read_evaluation
from pipelines.staleness import standing
from pipelines.suggest import suggestion
from stages.base import ConfigError
from stages.runtime.artifact import ArtifactError, canonical_digest
from stages.runtime.gates import GateConfig

if TYPE_CHECKING:
    from pipelines.chain import Chain, Node

Limit = Literal["max", "min", "max_regression"]
State = Literal["passed", "failed", "undecided", "cannot be judged"]
Interval = tuple[float, float]

FEW = 3
"""Metrics that an option is shown for; of more, one option for all."""
LIMITS: tuple[Limit, ...] = ("max", "min", "max_regression")


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One limit of a gate on one score of the evaluation ``stage``.

    ``value`` and ``interval`` are what was held against ``limit``: the score's, or for ``max_regression`` how much
    worse it is than ``baseline``'s. ``digest`` tells this judgement from one on other scores or with another limit.
    """

    stage: str
    metric: str
    rule: Limit
    limit: float
    state: State
    why: str
    stops: bool
    """Whether the chain stops here, were nothing overridden."""
    value: float | None = None
    interval: Interval | None = None
    unit: str = ""
    n: int = 0
    n_unit: str = "items"
    families: int = 0
    """How many of the ``n`` are independent."""
    baseline: str | None = None
    digest: str = ""
    override: Override | None = None

    @property
    def closed(self) -> bool:
        """Whether the chain may not go on."""
        return self.stops and self.override is None

    @property
    def demand(self) -> str:
        """The limit in words."""
        limit = number(self.limit)
        if self.rule == "max_regression":
            than = f" than {self.baseline.rpartition('/')[2]}" if self.baseline else ""
            return f"at most {limit} worse{than}" if self.limit >= 0 else f"at least {number(-self.limit)} better{than}"
        return f"at {'most' if self.rule == 'max' else 'least'} {limit}"

    @property
    def found(self) -> str:
        """What was held against the limit in words, with its unit and what was counted; empty where nothing was."""
        if self.value is None:
            return ""
        value, interval, what = self.value, self.interval, ""
        if self.rule == "max_regression":
            what = "better by " if value < 0 else "worse by "
        if value < 0 and what:
            # How much worse, told from the other side: the bounds change places.
            value, interval = -value, None if interval is None else (-interval[1], -interval[0])
        bounds = " ".join(filter(None, [interval_text(interval), self.unit]))
        return f"{what}{number(value)} {bounds}, n = {counted(self)}"

    @property
    def name(self) -> str:
        """``metric rule``, as overrides know it."""
        return f"{self.metric} {self.rule}"


def judged(chain: Chain) -> tuple[list[Judgement], list[str]]:
    """The judgements of every finished gated evaluation of the chain, and a line for each that cannot be judged."""
    found: list[Judgement] = []
    lines: list[str] = []
    for name in gated(chain.recipe):
        if is_done(chain.nodes[name]):
            try:
                found += judge(chain, chain.nodes[name])
            except ArtifactError as error:
                lines.append(unjudged(name, error))
    return found, lines


def unjudged(name: str, error: ArtifactError) -> str:
    """What is said of an evaluation whose scores, or whose record of gates, cannot be read."""
    return f"{name}: its gates cannot be judged: {error}"


def is_done(node: Node) -> bool:
    """Whether a stage is finished as the recipe stands."""
    try:
        return standing(node).done
    except ConfigError:
        return False


def judge(chain: Chain, node: Node) -> list[Judgement]:
    """Every limit of the finished evaluation ``node``, on every score that it names.

    Raises:
        ArtifactError: when its own scores cannot be read.
    """
    evaluation = read_evaluation(node.name, node.job.directory)
    overrides = overrides_of(node.job.directory)
    found = [one for gate in gates_of(node.job.config) for one in _judge_gate(chain, node, evaluation, gate)]
    sealed = [dataclasses.replace(one, digest=_digest(chain, node, one)) for one in found]
    return [dataclasses.replace(one, override=overrides.get(one.digest)) for one in sealed]


def _judge_gate(chain: Chain, node: Node, evaluation: Evaluation, gate: GateConfig) -> Iterator[Judgement]:
    by_name = {score.name: score for score in evaluation.scores}
    chosen = [name for name in by_name if fnmatch.fnmatchcase(name, gate.metric)]
    for rule in LIMITS:
        limit = getattr(gate, rule)
        if limit is None:
            continue
        bare = Judgement(node.name, gate.metric, rule, limit, "cannot be judged", "", stops=True)
        if not chosen:
            why = f"{node.name} has no such score; {suggestion(gate.metric, by_name, 'score')}"
            yield dataclasses.replace(bare, why=why)
        for name in chosen:
            score = by_name[name]
            facts = dataclasses.replace(
                bare, metric=name, value=score.value, interval=score.interval, unit=score.unit, n=score.n,
                n_unit=score.n_unit, families=score.n if score.items is None else score.items.independent,
            )  # fmt: skip
            if rule == "max_regression":
                yield _against(chain, node, gate, score, facts)
            elif score.interval is None:
                yield dataclasses.replace(facts, why=_why_none(score))
            else:
                yield _decided(facts, gate, _beyond(rule, score.interval, limit))


def _why_none(score: Score) -> str:
    from stages.runtime.suites.intervals import reason

    why = f"{reason(score.method)}; " if score.method else ""
    return f"{score.name} has no interval: {why}{score.counted}"


def _beyond(rule: Limit, interval: Interval, limit: float) -> Interval:
    """The interval of how far the score lies beyond the limit, above 0 where it does."""
    low, high = interval
    return (low - limit, high - limit) if rule == "max" else (limit - high, limit - low)


def _against(chain: Chain, node: Node, gate: GateConfig, score: Score, facts: Judgement) -> Judgement:
    """``score`` held against the baseline's of the same name."""
    from pipelines.comparison import mismatches
    from pipelines.paired import difference

    model = baseline(chain.recipe, node.name, gate)
    assert model is not None, "placement_faults refuses gates against nothing"
    facts = dataclasses.replace(facts, value=None, interval=None, baseline=model)
    other, why = _baseline_score(chain, model, score.name)
    if other is not None and (unlike := mismatches((model, node.name), (other, score))):
        why = unlike[0].message
    if other is not None and score.better == "none":
        why = f"{score.name} has no better direction; set max or min instead"
    if other is None or why:
        return dataclasses.replace(facts, why=why)
    try:
        found = difference(other, score)
    except ConfigError as error:
        return dataclasses.replace(facts, why=error.faults[0].message)
    if found.interval is None or found.value is None:
        return dataclasses.replace(
            facts, why=f"the difference has no interval: {found.verdict} ({found.families} independent)"
        )
    low, high = found.interval
    worse = (-found.value, (-high, -low)) if score.better == "higher" else (found.value, (low, high))
    facts = dataclasses.replace(facts, value=worse[0], interval=worse[1])
    return _decided(facts, gate, (worse[1][0] - facts.limit, worse[1][1] - facts.limit))


def _baseline_score(chain: Chain, model: str, name: str) -> tuple[Score | None, str]:
    """The score of that name of ``model``, or why there is none; of several evaluations the later stage counts."""
    left = [] if is_path(model) else [node.name for node in evaluators(chain, model) if not is_done(node)]
    if left:
        return None, f"{model} is not measured: {', '.join(left)} is not done; run it first"
    try:
        scores = {score.name: score for each in baseline_evaluations(chain, model) for score in each.scores}
    except ArtifactError as error:
        return None, str(error)
    if name not in scores:
        return None, f"{model} has no score {name}; measure it by the same suites"
    return scores[name], ""


def baseline_evaluations(chain: Chain, model: str) -> list[Evaluation]:
    """What is finished of the evaluations of a model stage, or the one in the artifact of that path.

    Raises:
        ArtifactError: when scores cannot be read.
    """
    if is_path(model):
        return [read_evaluation(Path(model).name, Path(model))]
    nodes = [node for node in evaluators(chain, model) if is_done(node)]
    return [read_evaluation(node.name, node.job.directory) for node in nodes]


def _decided(facts: Judgement, gate: GateConfig, beyond: Interval) -> Judgement:
    """``facts`` with its state; ``beyond`` is the interval of how far the limit is overstepped."""
    if facts.value is None or not all(map(math.isfinite, beyond)):
        return dataclasses.replace(facts, why=f"{facts.metric} has no interval: {counted(facts)}")
    low, high = beyond
    state: State = "passed" if high <= 0 else "failed" if low > 0 else "undecided"
    words = {
        "passed": "the whole interval keeps it",
        "failed": "the whole interval lies beyond it",
        "undecided": f"the interval of {counted(facts)} holds the limit",
    }
    stops = state == "failed" or (state == "undecided" and gate.undecided == "stop")
    return dataclasses.replace(facts, state=state, why=words[state], stops=stops)


def _digest(chain: Chain, node: Node, one: Judgement) -> str:
    """What an override is bound to: the evaluation, the baseline's evaluations, the limit and what was found."""
    compared = [] if one.baseline is None else [other.job.key for other in evaluators(chain, one.baseline)]
    compared += [one.baseline] if one.baseline is not None and is_path(one.baseline) else []
    facts = [one.metric, one.rule, one.limit, one.state, repr(one.value), repr(one.interval), one.why]
    return canonical_digest([node.job.key, compared, facts])


def line(one: Judgement) -> str:
    """One judgement on one line: what was asked, what was found, and what becomes of it."""
    measured = f": {one.found}" if one.found else ""
    state = f"{one.state}, overridden {one.override.at}" if one.override is not None and one.stops else one.state
    return f"gate {one.stage}:{one.metric} {state} ({one.demand}){measured}; {one.why}"


def override_flags(closed: Sequence[Judgement]) -> list[str]:
    """The options that let these judgements of one evaluation pass: each metric's, of many the evaluation's."""
    names = list(dict.fromkeys(f"{FLAG} {one.stage}:{one.metric}" for one in closed))
    return names if len(names) <= FEW else [f"{FLAG} {closed[0].stage}"]


def counted(one: Judgement) -> str:
    """What was counted, and into how many families it falls where not all is independent."""
    families = f" in {one.families:,} families" if one.families < one.n else ""
    return f"{one.n:,} {one.n_unit}{families}"


def plain(one: Judgement) -> dict[str, Any]:
    """A judgement as JSON data."""
    return {**dataclasses.asdict(one), "closed": one.closed}


def verdict_of(judgements: Sequence[Judgement]) -> str:
    """All judgements of an evaluation in a few words: how many passed, failed, were undecided or overridden."""
    counts: dict[str, int] = {}
    for one in judgements:
        word = "overridden" if one.stops and one.override is not None else one.state
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def evaluations_before(chain: Chain, node: Node) -> list[Node]:
    """The gated evaluations of the models that ``node`` was made from, near or far, in the chain's order."""
    names = {name for stage in (node.name, *chain.ancestors(node.name)) for name in chain.gates.get(stage, ())}
    return [chain.nodes[name] for name in chain.nodes if name in names]


def page_path(node: Node) -> Path:
    """Where the page of an evaluation's gates lies."""
    return node.job.directory / "gates.html"
