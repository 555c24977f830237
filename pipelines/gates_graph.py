"""Where gates stand in the chain: which evaluations come before a stage, and what a gate needs to be decided.

A gated evaluation comes before every stage that goes on from the model that it measures, and after the evaluations of
the models that it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.graph import cycles, is_path
from pipelines.recipe import Recipe
from pipelines.scores import SCORED, SCORES, SUBJECT
from pipelines.suggest import suggestion
from stages.base import Fault, Stage
from stages.runtime.artifact import ArtifactError, read_record
from stages.runtime.gates import PARENT, GateConfig

Kinds = Mapping[str, type[Stage]]


def gates_of(config: object) -> Sequence[GateConfig]:
    """The gates of a stage's config; none of a stage that measures nothing."""
    found: Sequence[GateConfig] = getattr(config, "gates", ())
    return found


def gated(recipe: Recipe) -> list[str]:
    """The evaluations of ``recipe`` that have gates, in its order."""
    return [name for name, config in recipe.stages.items() if gates_of(config)]


def standing_before(recipe: Recipe, kinds: Kinds) -> dict[str, list[str]]:
    """By stage, the gated evaluations of the models that it takes in."""
    found: dict[str, list[str]] = {}
    for name in gated(recipe):
        subject = getattr(recipe.stages[name], SUBJECT)
        for child, config in recipe.stages.items():
            models = [field for field, given in kinds[child].inputs.items() if given.produces == "model"]
            if kinds[child].produces != SCORED and any(getattr(config, field) == subject for field in models):
                found.setdefault(child, []).append(name)
    return found


def needed_before(recipe: Recipe, kinds: Kinds) -> dict[str, list[str]]:
    """By stage, what has to come before it for the sake of gates alone."""
    edges = standing_before(recipe, kinds)
    for name in gated(recipe):
        for gate in gates_of(recipe.stages[name]):
            model = baseline(recipe, name, gate)
            edges.setdefault(name, []).extend(evaluators_of(recipe, kinds, model) if model else [])
    return edges


def baseline(recipe: Recipe, name: str, gate: GateConfig) -> str | None:
    """What ``gate`` of the evaluation ``name`` is compared with: a model stage of the recipe, or an artifact's path.

    None where it is the parent and the recipe has none.
    """
    if gate.baseline != PARENT:
        return gate.baseline
    subject = getattr(recipe.stages[name], SUBJECT)
    parent = getattr(recipe.stages.get(subject), SUBJECT, None)
    return None if parent is None or is_path(parent) else parent


def evaluators_of(recipe: Recipe, kinds: Kinds, model: str) -> list[str]:
    """The stages of the recipe that evaluate ``model``, in its order."""
    return [
        name
        for name, config in recipe.stages.items()
        if kinds[name].produces == SCORED and getattr(config, SUBJECT) == model
    ]


def placement_faults(recipe: Recipe, kinds: Kinds, parents: Mapping[str, Sequence[str]]) -> list[Fault]:
    """Gates against a model that is none, is not measured, or comes after the gate; ``parents`` are by stage."""
    faults = [
        recipe.fault(f"{name}.gates.{number}.against", message)
        for name in gated(recipe)
        for number, gate in enumerate(gates_of(recipe.stages[name]))
        for message in _against_faults(recipe, kinds, name, gate)
    ]
    edges = needed_before(recipe, kinds)
    together = {name: [*given, *edges.get(name, ())] for name, given in parents.items()}
    for cycle in () if faults else cycles(together):
        name = next(one for one in cycle if one in gated(recipe))
        way = " -> ".join([*cycle, cycle[0]])
        message = f"must be decided before what goes on from its model, yet waits for it: {way}; compare with another"
        faults.append(recipe.fault(f"{name}.gates", message))
    return faults


def _against_faults(recipe: Recipe, kinds: Kinds, name: str, gate: GateConfig) -> Iterator[str]:
    if gate.baseline is None:
        return
    subject, model = getattr(recipe.stages[name], SUBJECT), baseline(recipe, name, gate)
    models = [stage for stage in recipe.stages if kinds[stage].produces == "model" and stage != subject]
    if model is not None and is_path(model):
        record = _record(Path(model))
        if record is None or record["state"] != "done" or not (Path(model) / "output" / SCORES).is_file():
            yield f"must be the directory of a finished evaluation; got {model}; set runs/<pipeline>/<evaluation>-<key>"
    elif model is None:
        yield f"must be a model stage, since {subject} has no parent in this recipe; got parent; set max or min instead"
    elif model not in models:
        near = suggestion(model, models, "other model stage")
        measured = getattr(recipe.stages.get(model), SUBJECT, None)
        if model in recipe.stages and kinds[model].produces == SCORED and measured in models:
            near = f"set {measured}, which {model} measures"
        yield f"must be parent or another model stage of {recipe.name}; got {model!r}; {near}"
    elif not evaluators_of(recipe, kinds, model):
        yield f"must be measured as well; no evaluate stage has `from: {model}`; add one with the same suites"


def _record(directory: Path) -> dict[str, Any] | None:
    try:
        return read_record(directory)
    except ArtifactError:
        return None
