"""What a recipe may ask of the sources' shares, and what of it cannot be. No torch here."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from data.errors import DataError
from data.mixture import Mixture, Phase, cell_of
from data.stream_config import StreamSettings
from stages.base import Fault, Section, SourceName


class MixturePhase(Section):
    """Other shares from one step on: annealing on the best text, or a curriculum."""

    from_step: int = Field(ge=1, le=1_000_000_000)
    """First optimizer step of the phase."""
    mixture: dict[str, float] = Field(min_length=1)
    """Weights that hold from there, named as in the first ``mixture``."""


STREAM_PACKING = "must be cut with a stream; got {}; tokenize to keep documents whole"
SHARD_WORKERS = "must be 0 with shards, which cost nothing to read; got {}; set it to 0"
SHARD_PASSES = "must be left out with shards, whose passes max_epochs bounds; got {}; remove it"


def mixture(config: Any) -> Mixture:
    """The mixture that a pretraining config asks for."""
    later = tuple(
        Phase(phase.from_step, phase.mixture, f"phases.{number}.mixture") for number, phase in enumerate(config.phases)
    )
    return Mixture(config.mixture, config.mixture_by, later, config.cap_epochs, config.max_steps)


def phase_faults(config: Any) -> list[Fault]:
    """Weights that are no shares, phases out of order or beyond the run, words that mean nothing without a mixture."""
    found = []
    for field, weights in _weights(config):
        wrong = [word for word, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]
        for word in wrong:
            found.append(Fault(f"{field}.{word}", f"must be 0 or more; got {weights[word]}; set its share of tokens"))
        if not wrong and not any(weights.values()):
            got = ", ".join(f"{word} {weight:g}" for word, weight in weights.items()) or "no weight"
            message = f"must leave at least one source with a share; got {got}; raise one weight, or remove it"
            found.append(Fault(field, message))
    before = 0
    for number, phase in enumerate(config.phases):
        if not before < phase.from_step < config.max_steps:
            message = f"must lie after step {before} and before max_steps {config.max_steps}; got {phase.from_step}"
            found.append(Fault(f"phases.{number}.from_step", f"{message}; set another step or drop the phase"))
        before = max(before, phase.from_step)
    if config.mixture_by != "source" and config.mixture is None and not config.phases:
        message = f"means something with `mixture` or `phases` only; got {config.mixture_by}; set weights or remove it"
        found.append(Fault("mixture_by", message))
    return found


def source_faults(config: Any, sources: Sequence[str]) -> list[Fault]:
    """Weights that do not fit the recipe's ``sources``, in whatever words the mixture is written."""
    if config.mixture_by == "source":
        return word_faults(config, sources)
    if not all(getattr(source, "language", None) for source in sources):
        # Sources of an artifact elsewhere: tokens.json has their languages, and is asked when it is opened.
        return []
    facts = [{"name": one, "language": one.language, "domain": one.domain} for one in map(_named, sources)]
    return word_faults(config, list(dict.fromkeys(cell_of(source, config.mixture_by) for source in facts)))


def _named(source: str) -> SourceName:
    assert isinstance(source, SourceName), "asked for its language above"
    return source


def word_faults(config: Any, words: Sequence[str]) -> list[Fault]:
    """Weights of words that the data do not have, and words that have no weight; ``words`` are all there are."""
    found = []
    for field, weights in _weights(config):
        found += weight_faults(field, weights, words)
    return found


def weight_faults(field: str, weights: Mapping[str, float], words: Sequence[str]) -> list[Fault]:
    """Faults of one mapping of weights, standing at ``field``, against all the ``words`` that there are."""
    found = []
    for name in weights:
        if name not in words:
            near = difflib.get_close_matches(name, words, n=1, cutoff=0)[0]
            message = f"must name one of the data's sources {', '.join(words)}; did you mean {near}?"
            found.append(Fault(f"{field}.{name}", message))
    for name in words:
        if name not in weights:
            message = "must give every source its weight; got none; set it, 0 leaves it out"
            found.append(Fault(f"{field}.{name}", message))
    return found


def _weights(config: Any) -> Iterator[tuple[str, dict[str, float]]]:
    if config.mixture is not None:
        yield "mixture", config.mixture
    for number, phase in enumerate(config.phases):
        yield f"phases.{number}.mixture", phase.mixture


def data_faults(config: Any, data: Any) -> list[Fault]:
    """Faults of a run against the config of the stage that will make its data: ``stream`` or ``tokenize``."""
    if isinstance(data, StreamSettings):
        weighed, capped = config.mixture is not None, config.cap_epochs is not None
        faults = [Fault(*one) for one in data.unfit(config.global_batch_size, weighed, capped, config.passes)]
        return faults if config.packing == "cut" else [*faults, Fault("packing", STREAM_PACKING.format(config.packing))]
    found = [Fault("passes", SHARD_PASSES.format(", ".join(config.passes)))] if config.passes else []
    return found + ([Fault("data_workers", SHARD_WORKERS.format(config.data_workers))] if config.data_workers else [])


def shard_faults(config: Any, tokens_dir: Path) -> list[Fault]:
    """Faults of a run against shards that are there: weights behind which no token stands, passes beyond the most.

    What a stream or whole packing asks costs more than a look, and is left to the run's own beginning.
    """
    from data.loader import MixtureLoader
    from data.stream import is_stream

    if is_stream(tokens_dir) or config.packing != "cut":
        return []
    sizes = {"seq_len": config.seq_len, "global_batch_size": config.global_batch_size}
    try:
        asked = {"mixture": mixture(config), "max_epochs": config.max_epochs}
        MixtureLoader(tokens_dir, seed=0, **sizes, **asked).plan(config.max_steps)
    except DataError as error:
        return [Fault(field or "data", message) for field, message in error.faults]
    except ValueError:
        return []  # damaged shards are named, file by file, when they are verified before the run
    return []
