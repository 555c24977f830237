"""``--require-fast-kernels``: refuse, before anything runs, a layer that would train on less than a tested kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipelines.chain import Chain, Node
from pipelines.staleness import standing
from stages.base import ConfigError


def refuse_slow(chain: Chain, nodes: Iterable[Node]) -> None:
    """Look over the training stages among ``nodes`` that are not done.

    Raises:
        ConfigError: naming each mixer without a fast kernel, its layers, and what is missing.
    """
    training = [node for node in nodes if node.stage.launched and not standing(node).done]
    if not training:
        return
    # torch takes seconds to import, and tells what the device is.
    from model.fast import slow_layers

    faults = []
    for node in training:
        config: Any = node.job.config
        found = {} if node.job.model is None else slow_layers(node.job.model, config.precision)
        for word, message in found.items():
            place = f"model.mixers.{word}.backend"
            faults.append(chain.recipe.fault(place, f"{message} (--require-fast-kernels, {node.name})"))
    if faults:
        raise ConfigError(faults)
