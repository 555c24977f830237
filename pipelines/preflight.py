"""What can be refused before anything runs: devices, names of sources, parents that are finished already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.chain import Chain, Node
from pipelines.staleness import standing
from stages.base import ConfigError, Fault


def refuse(faults: Iterable[Fault]) -> None:
    """Refuse to go on where there are ``faults``.

    Raises:
        ConfigError: with each of them once.
    """
    told = list(dict.fromkeys(faults))
    if told:
        raise ConfigError(told)


def shorter_faults(chain: Chain, nodes: Iterable[Node]) -> list[Fault]:
    """What is asked to be shorter than its artifact already is, with what to set."""
    refusals = [refusal for node in nodes if (refusal := standing(node).refusal) is not None]
    return [chain.recipe.fault(refusal.path, refusal.message) for refusal in refusals]


def refuse_early(chain: Chain, nodes: Iterable[Node], world_size: int | None, has_gpu: bool | None) -> None:
    """Refuse what ``early_faults`` finds."""
    refuse(early_faults(chain, nodes, world_size, has_gpu))


def early_faults(chain: Chain, nodes: Iterable[Node], world_size: int | None, has_gpu: bool | None) -> list[Fault]:
    """Every fault of those of ``nodes`` that are not done which needs no stage to run in order to be seen.

    None leaves the number of ranks, or the kind of devices, out.
    """
    faults = []
    for node in nodes:
        if not standing(node).done:
            found = _found(chain, node, world_size, has_gpu)
            faults += [chain.recipe.fault(f"{node.name}.{fault.path}", fault.message) for fault in found]
    return faults


def _found(chain: Chain, node: Node, world_size: int | None, has_gpu: bool | None) -> list[Fault]:
    try:
        found = [*_own_faults(chain, node), *_device_faults(node, world_size, has_gpu)]
        # A plan may be made where the recipe will not run.
        return found + (node.stage.check_reach(node.job.config) if has_gpu is not None else [])
    except ConfigError as error:
        return error.faults


def device_notes(chain: Chain, has_gpu: bool) -> list[str]:
    """What would be refused on this machine's devices alone: a plan may be made where the recipe will not run."""
    return [
        f"{node.name}.{fault.path}: {fault.message}"
        for node in chain
        for fault in _device_faults(node, None, has_gpu)
        if fault not in _device_faults(node, None, None)
    ]


def _device_faults(node: Node, world_size: int | None, has_gpu: bool | None) -> list[Fault]:
    return node.stage.check_devices(node.job.config, world_size if node.stage.launched else None, has_gpu)


def _own_faults(chain: Chain, node: Node) -> list[Fault]:
    job = node.job
    known = {field: _sources(chain, parent) for field, parent in node.parents.items()}
    faults = node.stage.check_sources(job.config, {field: names for field, names in known.items() if names})
    finished = dict(_finished(chain, node))
    awaited = {field: chain.nodes[name].job.config for field, name in node.parents.items() if field not in finished}
    faults += node.stage.check_parent_configs(job.config, awaited)
    beside = {field: chain.nodes[name].job.config for field, name in node.parents.items()}
    faults += node.stage.check_beside(job.config, beside)
    if not finished or (node.stage.uses_model and job.model is None):
        # A faulty model section is told by itself.
        return faults
    try:
        return faults + node.stage.check_parents(job.config, job.model, finished)
    except (ValueError, KeyError, OSError):
        # A damaged parent is named, file by file, when its output is verified before the run.
        return faults


def _sources(chain: Chain, name: str) -> list[str]:
    """Names of the sources that reach the output of stage ``name``, each once; empty where none is known."""
    node = chain.nodes[name]
    own = node.stage.source_names(node.job.config)
    if own is not None:
        return list(own)
    # A tokenizer may come from another corpus than the one that it is used on.
    carriers = [parent.name for parent in chain.parents(node) if parent.stage.produces in ("corpus", "tokens")]
    return list(dict.fromkeys(source for carrier in carriers for source in _sources(chain, carrier)))


def _finished(chain: Chain, node: Node) -> Iterator[tuple[str, Path]]:
    for field, link in node.job.parents.items():
        # An artifact from outside the recipe was found finished when the chain was built.
        if field not in node.parents or standing(chain.nodes[node.parents[field]]).done:
            yield field, link.path
