"""The chain of a recipe: each stage's key and directory, worked out without running anything.

A key is the SHA-256 of the stage's identity: kind, code version, config without operational fields, inputs and
extension, the model where it is used, seed, the parents' lineage keys, and the pinned revisions of its sources. The
lineage key adds the extension (``max_steps``): a longer run keeps its directory while its children get new ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from model.spec import ModelSpec
from pipelines.gates_graph import needed_before, placement_faults, standing_before
from pipelines.gates_names import name_faults
from pipelines.graph import Registry, in_order, input_name, is_path
from pipelines.recipe import Recipe
from stages.base import ConfigError, Fault, Stage, without_operational
from stages.runtime.artifact import (
    ArtifactError,
    Job,
    ParentLink,
    canonical_digest,
    finished_of,
    lineage_key,
    read_record,
)


@dataclasses.dataclass(frozen=True)
class Node:
    """One stage of the chain: its class, what is to be done, and which of its inputs are stages of this recipe."""

    stage: type[Stage]
    job: Job
    parents: Mapping[str, str]
    """Field of the config to name of the parent, for parents within the recipe."""

    @property
    def name(self) -> str:
        """The stage's name in the recipe."""
        return self.job.name

    @property
    def lineage(self) -> str:
        """What this stage contributes to its children's keys."""
        return lineage_key(self.job.key, self.job.extension)


@dataclasses.dataclass(frozen=True)
class Chain:
    """All stages of a recipe, parents before children."""

    recipe: Recipe
    runs: Path
    nodes: Mapping[str, Node]
    gates: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    """By stage, the evaluations whose gates stand before it."""
    first: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    """By stage, all evaluations that come before it for the sake of gates, those that they are compared with too."""

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def parents(self, node: Node) -> list[Node]:
        """The node's parents within the recipe, each once."""
        return [self.nodes[name] for name in dict.fromkeys(node.parents.values())]

    def ancestors(self, name: str) -> set[str]:
        """Names of all stages that ``name`` depends on, without itself."""
        direct = {parent.name for parent in self.parents(self.nodes[name])}
        return direct.union(*(self.ancestors(parent) for parent in direct)) if direct else direct

    def _leading_to(self, name: str) -> set[str]:
        """``name``, its ancestors, and the evaluations whose gates stand on the way."""
        found, waiting = set(), [name]
        while waiting:
            stage = waiting.pop()
            if stage not in found:
                found.add(stage)
                waiting += [*self.nodes[stage].parents.values(), *self.first.get(stage, ())]
        return found

    def selection(self, first: str | None, last: str | None) -> list[Node]:
        """The nodes from ``first`` on, up to what ``last`` needs, in order.

        Raises:
            ConfigError: when a name is unknown, or ``last`` does not depend on ``first``.
        """
        chosen = set(self.nodes)
        if first is not None:
            chosen &= {name for name in self.nodes if name == first or first in self.ancestors(name)}
        if last is not None:
            chosen &= self._leading_to(last)
        if not chosen:
            message = f"must name a stage that depends on --from {first}; got {last}"
            raise ConfigError(Fault("--until", f"{message}; the order is {', '.join(self.nodes)}"))
        return [node for node in self if node.name in chosen]


def build_chain(recipe: Recipe, runs: Path, stages: Registry) -> Chain:
    """The chain of ``recipe`` with its artifacts below ``runs``.

    Raises:
        ConfigError: when an artifact elsewhere, named as a parent, is absent, unfinished or of the wrong kind, a source
            has no pinned revision, or a gate cannot be decided in this recipe.
    """
    chain, faults = chain_of(recipe, runs, stages)
    if faults:
        raise ConfigError(faults)
    return chain


def chain_of(recipe: Recipe, runs: Path, stages: Registry) -> tuple[Chain, list[Fault]]:
    """What there is of the chain, and what is wrong with it: stages at fault are not in it, nor what follows them."""
    kinds = {name: stages[config.kind] for name, config in recipe.stages.items()}
    within = {name: dict(_parents_within(kinds[name], config)) for name, config in recipe.stages.items()}
    nodes: dict[str, Node] = {}
    faults = placement_faults(recipe, kinds, {name: list(parents.values()) for name, parents in within.items()})
    faults += name_faults(recipe, kinds)
    first = {} if faults else needed_before(recipe, kinds)
    for name in in_order({name: [*parents.values(), *first.get(name, ())] for name, parents in within.items()}):
        if any(parent not in nodes for parent in within[name].values()):
            continue
        try:
            nodes[name] = _node(recipe, name, kinds[name], runs, nodes, stages)
        except ConfigError as error:
            faults += [recipe.fault(f"{name}.{fault.path}", fault.message) for fault in error.faults]
    return Chain(recipe, runs, nodes, standing_before(recipe, kinds), first), faults


def _parents_within(stage: type[Stage], config: Any) -> Iterator[tuple[str, str]]:
    for field in stage.inputs:
        parent = getattr(config, field)
        if parent is not None and not is_path(parent):
            yield field, parent


def _node(
    recipe: Recipe, name: str, stage: type[Stage], runs: Path, nodes: Mapping[str, Node], stages: Registry
) -> Node:
    config: Any = recipe.stages[name]
    model = recipe.model if stage.uses_model else None
    links = dict(_links(stage, config, nodes, stages))
    extension = to_jsonable_python(stage.extension(config))
    identity = identity_of(stage, config, model, recipe.seed, {field: link.lineage for field, link in links.items()})
    key = canonical_digest(identity)
    job = Job(
        pipeline=recipe.name,
        name=name,
        kind=stage.kind,
        key=key,
        identity=identity,
        extension=extension,
        config=config,
        model=model,
        seed=recipe.seed,
        directory=runs / recipe.name / f"{name}-{key[:8]}",
        parents=links,
    )
    return Node(stage, job, dict(_parents_within(stage, config)))


def identity_of(
    stage: type[Stage], config: Any, model: ModelSpec | None, seed: int, parents: Mapping[str, str]
) -> dict[str, Any]:
    """The plain data whose hash is the stage's key; ``stage.json`` holds it, so that anyone can work the key out."""
    identity = {
        "kind": stage.kind,
        "code_version": stage.code_version,
        "config": stage.key_config(config),
        "model": without_operational(model) if stage.uses_model else None,
        "seed": seed,
        "parents": dict(parents),
        "sources": stage.source_revisions(config),
    }
    plain: dict[str, Any] = to_jsonable_python(identity)
    return plain


def _links(
    stage: type[Stage], config: Any, nodes: Mapping[str, Node], stages: Registry
) -> Iterator[tuple[str, ParentLink]]:
    for field in stage.inputs:
        parent = getattr(config, field)
        if parent is None:
            continue
        if is_path(parent):
            yield field, _outside(stage, field, Path(parent), stages)
        else:
            node = nodes[parent]
            yield field, ParentLink(parent, node.job.key, node.lineage, node.job.directory)


def _outside(stage: type[Stage], field: str, path: Path, stages: Registry) -> ParentLink:
    """The link to a finished artifact outside the recipe, whose output's digest enters the key."""
    must, name = f"must be the directory of a finished artifact; got {path}", input_name(stage, field)
    try:
        record = read_record(path)
    except ArtifactError as error:
        raise ConfigError(Fault(name, str(error))) from error
    if record is None:
        raise ConfigError(Fault(name, f"{must}, which holds no stage.json; set runs/<pipeline>/<stage>-<key>"))
    if (finished := finished_of(record, path)) is None:
        raise ConfigError(Fault(name, f"{must}, whose state is {record['state']}; finish it first"))
    kind, produces = record["kind"], stage.inputs[field].produces
    if kind not in stages or stages[kind].produces != produces:
        raise ConfigError(Fault(name, f"must produce {produces}; got {path}, made by a stage of kind {kind}"))
    return ParentLink(record["stage"], record["key"], finished["output_digest"], path.resolve())
