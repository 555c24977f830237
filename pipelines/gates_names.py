"""Whether a gate's score will be there when it is judged, as far as the recipe can know: its own and its baseline's.

A misspelt metric is told at the plan, and not after the training that it was to judge.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.gates_graph import Kinds, baseline, evaluators_of, gated, gates_of
from pipelines.graph import is_path
from pipelines.recipe import Recipe
from pipelines.scores import read_evaluation
from stages.base import Fault, Section, without_operational
from stages.runtime.artifact import ArtifactError
from stages.runtime.gates import GateConfig
from stages.runtime.suites.names import may_fit, metric_faults

_OF_ONE_TASK = {"harness": {"max_new_tokens", "heldout_documents"}}
"""Fields that are read for some of a suite's scores alone; those are compared when both are known."""


def name_faults(recipe: Recipe, kinds: Kinds) -> list[Fault]:
    """Gates on scores that their evaluation will not give, or that the one they are compared with will not."""
    faults = []
    for name in gated(recipe):
        gates, names = gates_of(recipe.stages[name]), names_of(recipe, kinds, name)
        wrong = metric_faults(gates, names) if names else []
        faults += [recipe.fault(f"{name}.{fault.path}", fault.message) for fault in wrong]
        for number, gate in enumerate(gates):
            path = f"gates.{number}."
            if not any(fault.path.startswith(path) for fault in wrong):
                found = _baseline_faults(recipe, kinds, name, gate, names)
                faults += [recipe.fault(f"{name}.{path}{field}", message) for field, message in found]
    return faults


def names_of(recipe: Recipe, kinds: Kinds, name: str) -> list[str]:
    """The scores that the stage ``name`` will give."""
    stage, config = kinds[name], recipe.stages[name]
    within = {field: getattr(config, field) for field in stage.inputs}
    parents = {field: parent for field, parent in within.items() if parent in recipe.stages}
    sources = {field: list(_sources(recipe, kinds, parent)) for field, parent in parents.items()}
    return stage.score_names(config, {field: recipe.stages[parent] for field, parent in parents.items()}, sources)


def _sources(recipe: Recipe, kinds: Kinds, name: str) -> Iterator[str]:
    """Names of the sources that reach the output of the stage ``name``; none where a parent lies elsewhere."""
    own = kinds[name].source_names(recipe.stages[name])
    if own is not None:
        yield from own
        return
    for field, given in kinds[name].inputs.items():
        parent = getattr(recipe.stages[name], field)
        if parent in recipe.stages and given.produces in ("corpus", "tokens"):
            yield from _sources(recipe, kinds, parent)


def _baseline_faults(
    recipe: Recipe, kinds: Kinds, name: str, gate: GateConfig, names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Field and message of what keeps the two evaluations from being compared."""
    model = None if gate.baseline is None else baseline(recipe, name, gate)
    others = [] if model is None or is_path(model) else evaluators_of(recipe, kinds, model)
    theirs = {other: names_of(recipe, kinds, other) for other in others}
    if model is not None and is_path(model):
        theirs, others = {model: _measured(Path(model))}, [model]
    if not names or not others or not all(theirs.values()):
        return
    asked = [one for one in names if not one.endswith("*") and fnmatch.fnmatchcase(one, gate.metric)]
    missing = [one for one in asked if not any(may_fit(there, one) for those in theirs.values() for there in those)]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        message = f"must be measured by the same suites; {', '.join(others)} lacks {shown}; add the suite there"
        yield "against", message
        return
    suite = gate.metric.partition("/")[0]
    # Where several measure the model the later one counts.
    there = next(
        (
            other
            for other in reversed(others)
            if other in recipe.stages and any(_of_suite(one, suite) for one in theirs[other])
        ),
        None,
    )
    unlike = [] if there is None else list(_unlike(recipe.stages[name], recipe.stages[there], suite))
    if unlike:
        yield "against", f"must be measured alike; {'; '.join(unlike)} in {there}; set the same in both"


def _measured(directory: Path) -> list[str]:
    """The scores of a finished evaluation; none of one that cannot be read, which is told elsewhere."""
    try:
        return [score.name for score in read_evaluation(directory.name, directory).scores]
    except ArtifactError:
        return []


def _of_suite(name: str, suite: str) -> bool:
    return name.partition("/")[0] == suite


def _unlike(mine: Any, theirs: Any, suite: str) -> Iterator[str]:
    """Fields of two evaluations by which scores of ``suite`` are of other sets, or made otherwise.

    Lists choose scores (``top_k``) or are compared when both are known; a single value decides what is measured.
    """
    for field, one, other in _values(mine, theirs, suite):
        if one != other:
            yield f"{field} is {one} here, {other}"


def _values(mine: Any, theirs: Any, suite: str) -> Iterator[tuple[str, Any, Any]]:
    if hasattr(mine, "precision") and hasattr(theirs, "precision"):
        yield "precision", mine.precision, theirs.precision
    one, other = (getattr(getattr(config, "suites", None), suite, None) for config in (mine, theirs))
    if isinstance(one, Section) and isinstance(other, Section):
        first, second = _single(one), _single(other)
        for field in sorted((first.keys() & second.keys()) - _OF_ONE_TASK.get(suite, set())):
            yield f"suites.{suite}.{field}", first[field], second[field]


def _single(section: Section) -> Mapping[str, Any]:
    return {name: value for name, value in without_operational(section).items() if not isinstance(value, list | dict)}
