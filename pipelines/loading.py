"""From a recipe's file to its chain; all that can be known to be wrong with either is told at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.chain import Chain, chain_of
from pipelines.graph import Registry
from pipelines.mending import common, without_echoes
from pipelines.recipe import DEFAULT, Recipe, RecipeError, load_recipe, ordered
from stages.base import ConfigError, Fault

Look = Callable[[Chain], Sequence[Fault]]


def load_chain(
    path: Path | None,
    overrides: Sequence[str],
    runs: Path,
    stages: Registry,
    data: Path | None = None,
    look: Look | None = None,
) -> Chain:
    """The chain of the recipe in ``path`` (the default one where that is None) with its artifacts below ``runs``.

    ``look`` finds what else is wrong with a chain; it is asked where something is wrong already, so that its faults
    stand beside the others.

    Raises:
        ConfigError: with the recipe's faults, and those of the chain which do not come from these.
    """
    try:
        recipe = load_recipe(path or DEFAULT, overrides, stages, data)
    except RecipeError as error:
        found = common(_faults(one, runs, stages, look) for one in error.mended)
        found = without_echoes(found, [fault.path for fault in error.faults])
        # A baseline that was left out is missing for no other reason.
        found = [one for one in found if error.whole or not one.path.endswith(".against")]
        raise ConfigError(ordered([*error.faults, *found])) from error
    chain, faults = chain_of(recipe, runs, stages)
    if faults:
        raise ConfigError(ordered(list(dict.fromkeys([*faults, *(look(chain) if look else ())]))))
    return chain


def _faults(recipe: Recipe, runs: Path, stages: Registry, look: Look | None) -> list[Fault]:
    chain, faults = chain_of(recipe, runs, stages)
    return [*faults, *(look(chain) if look else ())]
