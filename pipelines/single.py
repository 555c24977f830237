"""``--stage X``: a stage, or several one after another, on this rank, after the data stages that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

from pipelines.chain import Chain, Node
from pipelines.gate import Gate
from pipelines.gates_run import idle_words, passed_over, settle, settle_before, tell_idle, unmeasured_faults
from pipelines.graph import input_name
from pipelines.preflight import early_faults, refuse, shorter_faults
from pipelines.staleness import standing
from stages.base import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, ConfigError, Fault
from stages.runtime import distributed
from stages.runtime.artifact import has_gpu, shown
from stages.runtime.isolation import own_settings
from stages.runtime.lifecycle import Surroundings, execute, follow

CommandFor = Callable[[Node], str]


def run_stages(
    chain: Chain,
    names: Sequence[str],
    around: Surroundings,
    command_for: CommandFor,
    overrides: Sequence[str] = (),
) -> int:
    """Run the stages ``names`` in order and return the first exit code that is not 0, the same on every rank.

    Several share this process and its imports, but no settings; each is an artifact of its own. ``command_for`` gives
    the command that runs a stage, for messages; ``overrides`` are the gates that do not stop it.

    Raises:
        ConfigError: when a training ancestor is missing or stale; it is never trained on the side.
    """
    with distributed.note_launcher():
        distributed.settle_threads()
        if distributed.rank() == 0:
            tell_idle(idle_words(chain, overrides, names))
        for name in names:
            code = _run_noted(chain, chain.nodes[name], around, command_for, overrides)
            if code != EXIT_DONE:
                return code
    return EXIT_DONE


def _run_noted(
    chain: Chain, node: Node, around: Surroundings, command_for: CommandFor, overrides: Sequence[str]
) -> int:
    if distributed.world_size() == 1:
        code = _prepare(chain, node, around, command_for, overrides)
        if code is None:
            code = _execute(node, _knowing(chain, node, around, overrides))
        return _settled(chain, node, code, overrides)
    gate = Gate(node.job.directory)
    if distributed.rank() == 0:
        return _settled(chain, node, _run_with_others(chain, node, around, command_for, gate, overrides), overrides)
    verdict = gate.wait()
    return follow(node.stage(), node.job, around) if verdict is None else verdict


def needed(chain: Chain, node: Node, command_for: CommandFor, also: Collection[str] = ()) -> list[Node]:
    """The data stages that must run before ``node`` can, in order; what a finished stage was made from is not needed.

    ``also`` names stages that will be run anyway.

    Raises:
        ConfigError: for each training stage among them, with why it is stale and the command that runs it.
    """
    wanted: dict[str, Node] = {}
    faults: list[Fault] = []

    def visit(child: Node) -> None:
        for field, name in child.parents.items():
            parent = chain.nodes[name]
            if name in wanted or name in also or (found := standing(parent)).done:
                continue
            place = f"{child.name}.{input_name(child.stage, field)}"
            if found.refusal is not None:
                # The command that would run it is refused too.
                faults.append(chain.recipe.fault(found.refusal.path, found.refusal.message))
                continue
            if parent.stage.launched:
                why = "; ".join(found.reasons)
                message = f"must be a finished stage; got {name}, {found.state} ({why}); run: {command_for(parent)}"
                faults.append(chain.recipe.fault(place, message))
                continue
            visit(parent)
            wanted[name] = parent

    visit(node)
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return list(wanted.values())


def _knowing(chain: Chain, node: Node, around: Surroundings, overrides: Sequence[str]) -> Surroundings:
    """``around`` with the gates that ``node`` is let past, for its record."""
    return dataclasses.replace(around, overridden_gates=passed_over(chain, node, overrides))


def _settled(chain: Chain, node: Node, code: int, overrides: Sequence[str]) -> int:
    """The exit code of a stage that ended with ``code``, once its gates are judged."""
    return EXIT_FAILED if code == EXIT_DONE and not settle(chain, node, overrides) else code


def _prepare(
    chain: Chain, node: Node, around: Surroundings, command_for: CommandFor, overrides: Sequence[str]
) -> int | None:
    """Make the data stages that ``node`` needs; None when the way is free, else the exit code.

    A request to stop that comes between two stages is honoured by the next one, just before it would run: its state is
    then written as for any other request.
    """
    if standing(node).done:
        print(f"{node.name}: already done, {shown(node.job.directory)}")
        return EXIT_DONE
    if undecided := unmeasured_faults(chain, node, overrides, command_for):
        raise ConfigError(undecided)
    if not settle_before(chain, node, overrides):
        return EXIT_FAILED
    for ancestor in _accepted(chain, node, command_for):
        code = _execute(ancestor, around)
        if code != EXIT_DONE:
            return code
    return None


def _accepted(chain: Chain, node: Node, command_for: CommandFor) -> list[Node]:
    """The data stages that ``node`` needs, where nothing is wrong that can be seen before a stage runs."""
    faults = shorter_faults(chain, [node])
    try:
        before = needed(chain, node, command_for)
    except ConfigError as error:
        faults, before = [*faults, *error.faults], []
    refuse([*faults, *early_faults(chain, [*before, node], distributed.world_size(), has_gpu())])
    return before


def _run_with_others(
    chain: Chain, node: Node, around: Surroundings, command_for: CommandFor, gate: Gate, overrides: Sequence[str]
) -> int:
    """Rank 0 of several: whatever becomes of the preparation, the others hear of it."""
    gate.close()
    code: int | None = EXIT_FAILED
    try:
        code = _prepare(chain, node, around, command_for, overrides)
        if code is None:
            around = _knowing(chain, node, around, overrides)
            code = execute(node.stage(), node.job, around, lambda: _let_in(node, gate))
    except ConfigError:
        code = EXIT_CONFIG
        raise
    finally:
        gate.finish(EXIT_FAILED if code is None else code)
    return code


def _execute(node: Node, around: Surroundings) -> int:
    with own_settings():
        return execute(node.stage(), node.job, around, lambda: distributed.stop_if_asked(node.job.directory))


def _let_in(node: Node, gate: Gate) -> None:
    distributed.stop_if_asked(node.job.directory)
    if node.stage.launched or node.stage.shared:
        gate.open()
