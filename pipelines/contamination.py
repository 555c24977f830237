"""Evaluation sets that a recipe measures with and does not keep its corpus clean of: told, never silent (TRAPS M4)."""

from __future__ import annotations

from collections.abc import Iterator

from data.clean_config import EVALUATION_SETS
from pipelines.chain import Chain, Node
from pipelines.scores import SCORED
from stages.clean import CleanConfig
from stages.stream import StreamConfig


def contamination_notes(chain: Chain) -> list[str]:
    """A line for each set that measures a model whose corpus may hold it.

    A set that is made from the corpus itself (conversations about held-out documents) cannot be named by it, and is
    kept apart by the held-out split; those of ``decontaminate.unchecked`` are left alone as the recipe says.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for node in chain:
        if node.stage.produces == SCORED:
            for corpus, measured in _unchecked(chain, node):
                found.setdefault((corpus, measured), []).append(node.name)
    notes = [_note(chain, corpus, measured, names) for (corpus, measured), names in found.items()]
    return notes + _stream_notes(chain) + _harness_notes(chain)


def _measured(chain: Chain) -> Iterator[Node]:
    return (node for node in chain if node.stage.produces == SCORED)


def _stream_notes(chain: Chain) -> list[str]:
    """A stream is read as it comes: nobody has looked in it for the sets that the stage does not name."""
    found: dict[str, set[str]] = {}
    for node in _measured(chain):
        sets = {parent.name for parent in chain.parents(node) if parent.stage.produces in EVALUATION_SETS}
        for name in chain.ancestors(node.name) if sets else ():
            stream = chain.nodes[name]
            if isinstance(config := stream.job.config, StreamConfig):
                found.setdefault(name, set()).update(sets - {*stream.parents.values(), *config.decontaminate.unchecked})
    return [_stream_note(chain, name, sorted(sets)) for name, sets in found.items() if sets]


def _stream_note(chain: Chain, name: str, sets: list[str]) -> str:
    fields = {chain.nodes[one].stage.produces: one for one in sets}
    ways = ", ".join(f"{name}.{field}={one}" for field, one in fields.items())
    return (
        f"{name} reads its text as it comes, and is not kept clean of {', '.join(sets)}: scores on them may be learnt "
        f"by heart; set {ways}, or name them in {name}.decontaminate.unchecked"
    )


def _harness_notes(chain: Chain) -> list[str]:
    """Published tasks and files of questions are no stage's: looked for only where clean is given their files."""
    found: dict[str, list[str]] = {}
    for node in _measured(chain):
        harness = getattr(getattr(node.job.config, "suites", None), "harness", None)
        for task in [*harness.tasks, *(file.name for file in harness.files)] if harness else ():
            found.setdefault(task, []).append(node.name)
    by_stages: dict[tuple[str, ...], list[str]] = {}
    for task, names in found.items():
        by_stages.setdefault(tuple(names), []).append(task)
    return [
        f"no corpus is kept clean of {', '.join(tasks)}, which the harness measures in {', '.join(names)}, but by the "
        "files that clean.decontaminate.files names"
        for names, tasks in by_stages.items()
    ]


def _unchecked(chain: Chain, node: Node) -> Iterator[tuple[str, str]]:
    """Corpus and set by name, for each set of ``node`` that a corpus behind its model is not kept clean of."""
    behind = [chain.nodes[name] for name in sorted(chain.ancestors(node.name))]
    for measured in chain.parents(node):
        for corpus in behind if measured.stage.produces in EVALUATION_SETS else []:
            config = corpus.job.config
            if not isinstance(config, CleanConfig) or corpus.name in chain.ancestors(measured.name):
                continue
            if measured.name not in (*corpus.parents.values(), *config.decontaminate.unchecked):
                yield corpus.name, measured.name


def _note(chain: Chain, corpus: str, measured: str, names: list[str]) -> str:
    field = chain.nodes[measured].stage.produces
    taken = chain.nodes[corpus].parents.get(field)
    way = f"set {corpus}.{field}={measured}" if taken is None else f"{field} is {taken} already"
    return (
        f"{corpus} is not kept clean of {measured}, which measures in {', '.join(names)}: {way}, or add {measured} to "
        f"{corpus}.decontaminate.unchecked"
    )
