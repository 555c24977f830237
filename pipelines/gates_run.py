"""Gates while the chain runs: judged when an evaluation is finished and before a stage goes on from its model."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.gates import (
    Judgement,
    evaluations_before,
    is_done,
    judge,
    line,
    override_flags,
    page_path,
    plain,
    unjudged,
    verdict_of,
)
from pipelines.gates_graph import gated, gates_of
from pipelines.gates_record import FLAG, Override, write_gates
from pipelines.staleness import standing
from pipelines.suggest import suggestion
from stages.base import Fault
from stages.runtime.artifact import ArtifactError, now, shown

if TYPE_CHECKING:
    from pipelines.chain import Chain, Node


def override_faults(chain: Chain, words: Sequence[str]) -> list[Fault]:
    """What is wrong with the values of ``--override-gate``: stages that are none, or have no such gate."""
    faults, there = [], gated(chain.recipe)
    for word in words:
        stage, _, metric = word.partition(":")
        if stage not in there:
            near = suggestion(stage, there, "stage with gates")
            faults.append(Fault(FLAG, f"must name an evaluate stage with gates; got {stage!r}; {near}"))
            continue
        asked = [gate.metric for gate in gates_of(chain.nodes[stage].job.config)]
        if metric and not any(fnmatch.fnmatchcase(metric, one) or fnmatch.fnmatchcase(one, metric) for one in asked):
            near = suggestion(metric, asked, "metric")
            faults.append(Fault(FLAG, f"must name a metric of {stage}'s gates; got {metric!r}; {near}"))
    return faults


def settle(chain: Chain, node: Node, words: Sequence[str] = (), quiet: bool = False) -> bool:
    """Judge the finished evaluation ``node``, write it down, say it, and return whether the chain may go on.

    What ``words`` of ``--override-gate`` name is let pass and recorded; ``quiet`` says only what stops the chain. Any
    other stage has nothing to judge.
    """
    if not gates_of(node.job.config):
        return True
    try:
        before = judge(chain, node)
        added = [_override(one) for one in before if one.closed and _is_named(one, words)]
        found = _with(before, added)
        write_gates(node.job.directory, [plain(one) for one in found], added)
    except ArtifactError as error:
        print(unjudged(node.name, error), file=sys.stderr)
        return False
    _tell(node, found, {one.digest for one in added}, quiet)
    if not quiet:
        tell_idle([word for word in words if word.partition(":")[0] == node.name and _is_idle(found, word)])
    closed = [one for one in found if one.closed]
    if closed or added or not quiet:
        why = _page(chain, node, found)
    if closed:
        flags = " ".join(override_flags(closed))
        print(f"{node.name}: the chain stops at its gates; {why}; to go on all the same: {flags}", file=sys.stderr)
    return not closed


def is_open(chain: Chain, node: Node) -> bool:
    """Whether the gates of the finished ``node`` let the chain go on, by what is written; says nothing."""
    if not gates_of(node.job.config):
        return True
    try:
        return not any(one.closed for one in judge(chain, node))
    except ArtifactError:
        return False


def settle_before(chain: Chain, node: Node, words: Sequence[str] = ()) -> bool:
    """Whether all finished evaluations whose gates stand before ``node`` let it begin; those that do not say why."""
    return all([settle(chain, one, words, quiet=True) for one in evaluations_before(chain, node) if is_done(one)])


def unmeasured_faults(
    chain: Chain, node: Node, words: Sequence[str], command_for: Callable[[Node], str], also: Collection[str] = ()
) -> list[Fault]:
    """Gates before ``node`` that nobody has decided yet; ``also`` names evaluations that will be run in time.

    A gate that is passed by not measuring is none; the whole stage must be named to go on without it.
    """
    faults = []
    for one in evaluations_before(chain, node):
        if one.name not in also and one.name not in words and not is_done(one):
            message = (
                f"must wait for the gates of {one.name}, which is {_standing(one)}; run: {command_for(one)} "
                f"(or set {FLAG} {one.name})"
            )
            faults.append(chain.recipe.fault(f"{node.name}.from", message))
    return faults


def idle_words(chain: Chain, words: Sequence[str], names: Collection[str] = ()) -> list[str]:
    """The overrides of finished evaluations that let nothing pass; of those among ``names``, ``settle`` says so."""
    return [word for word in words if word.partition(":")[0] not in names and _is_open_to(chain, word)]


def _is_open_to(chain: Chain, word: str) -> bool:
    node = chain.nodes[word.partition(":")[0]]
    try:
        return is_done(node) and _is_idle(judge(chain, node), word)
    except ArtifactError:
        # Whoever must decide the gate says that it cannot be judged.
        return False


def handed_on(chain: Chain, nodes: Sequence[Node], words: Sequence[str]) -> list[str]:
    """The overrides that a child of ``--all`` needs for ``nodes``: without those that are known to idle."""
    idle = idle_words(chain, words, [node.name for node in nodes])
    return [word for word in words if word not in idle]


def tell_idle(words: Sequence[str]) -> None:
    """Say of overrides that they let nothing pass: what they name is open, and nothing is recorded for them."""
    for word in words:
        stage = word.partition(":")[0]
        print(f"{stage}: {FLAG} {word} overrides nothing: no gate that it names is closed", flush=True)


def passed_over(chain: Chain, node: Node, words: Sequence[str] = ()) -> tuple[dict[str, Any], ...]:
    """What ``node`` is allowed to begin in spite of: the overridden judgements before it, for its ``stage.json``."""
    found: list[dict[str, Any]] = []
    for one in evaluations_before(chain, node):
        facts = {"stage": one.name, "key": one.job.key}
        if not is_done(one):
            said = f"not measured: {_standing(one)}"
            found += [{**facts, "metric": None, "said": said, "at": now()}] if one.name in words else []
            continue
        overridden = [each.override for each in judge(chain, one) if each.stops and each.override is not None]
        found += [{**facts, "metric": each.metric, "said": each.said, "at": each.at} for each in overridden]
    return tuple(found)


def _standing(node: Node) -> str:
    found = standing(node)
    return f"{found.state} ({'; '.join(found.reasons)})"


def _override(one: Judgement) -> Override:
    return Override(one.metric, one.rule, line(one), one.digest, now())


def _is_named(one: Judgement, words: Sequence[str]) -> bool:
    named = (word.partition(":") for word in words)
    return any(stage == one.stage and fnmatch.fnmatchcase(one.metric, metric or "*") for stage, _, metric in named)


def _with(judgements: Sequence[Judgement], added: Sequence[Override]) -> list[Judgement]:
    by_digest = {one.digest: one for one in added}
    return [dataclasses.replace(one, override=by_digest.get(one.digest, one.override)) for one in judgements]


def _tell(node: Node, found: Sequence[Judgement], new: Collection[str], quiet: bool) -> None:
    if not quiet:
        print(f"{node.name}: gates: {verdict_of(found)}", flush=True)
    for one in found:
        if one.closed:
            print(line(one), file=sys.stderr)
        elif one.digest in new or (not quiet and one.state != "passed"):
            print(line(one), flush=True)


def _is_idle(found: Sequence[Judgement], word: str) -> bool:
    return not any(_is_named(one, [word]) and one.stops for one in found)


def _page(chain: Chain, node: Node, found: Sequence[Judgement]) -> str:
    """Write the page; where it lies, or why it could not be written, which changes no verdict."""
    from pipelines.gates_page import write_page

    try:
        write_page(chain, node, found)
    except ArtifactError as error:
        return str(error)
    return f"why: {shown(page_path(node))}"
