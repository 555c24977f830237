"""Shares of sources: from weights by source, language or domain, over phases, within a cap of epochs."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from data.errors import DataError
from data.mix import PhasedSchedule

MixtureBy = Literal["source", "language", "domain", "language_domain"]
"""What the words of a mixture name; ``language_domain`` is written ``en/science``."""
NO_DOMAIN = "-"
Fault = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Weights from one optimizer step on; ``field`` is where they stand in the config."""

    from_step: int
    weights: Mapping[str, float] | None
    field: str = "mixture"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What a recipe asks of the sources' shares; the default is by tokens throughout."""

    weights: Mapping[str, float] | None = None
    """Weight of each word from step 0 on, on any positive scale; none means by tokens."""
    by: MixtureBy = "source"
    later: tuple[Phase, ...] = ()
    """Phases that follow, in order."""
    cap_epochs: float | None = None
    """Most passes over a source, kept by reading it less; needs ``max_steps``."""
    max_steps: int | None = None

    @property
    def phases(self) -> list[Phase]:
        """All phases, the first from step 0."""
        return [Phase(0, self.weights), *self.later]

    def shares(
        self, sources: Sequence[Mapping[str, Any]], tokens: Mapping[str, int], step_tokens: int
    ) -> list[dict[str, float]]:
        """Share of every source's tokens in every phase, within the cap; a step reads ``step_tokens``.

        Raises:
            DataError: for weights that do not fit the sources, or a cap that the data cannot meet.
        """
        found = source_shares(sources, tokens, self.phases, self.by)
        if self.cap_epochs is None:
            return found
        assert self.max_steps is not None, "a cap needs the length of the run"
        edges = [min(phase.from_step, self.max_steps) for phase in self.phases] + [self.max_steps]
        lengths = [step_tokens * (end - start) for start, end in itertools.pairwise(edges)]
        return capped(found, lengths, tokens, self.cap_epochs)

    def schedule(
        self, shares: Sequence[Mapping[str, float]], fill: Mapping[str, float], global_batch_size: int
    ) -> PhasedSchedule:
        """Rows to sources, so that ``shares`` hold in tokens where a row of a source is filled to ``fill``.

        The sources are those of ``fill``, in its order.
        """
        rows = [np.array([phase[name] / fill[name] for name in fill]) for phase in shares]
        return PhasedSchedule([
            (phase.from_step * global_batch_size, weights)
            for phase, weights in zip(self.phases, rows, strict=True)
        ])  # fmt: skip


def cell_of(source: Mapping[str, Any], by: MixtureBy) -> str:
    """The word of a mixture ``by`` that covers ``source`` (its facts in ``tokens.json``); ``-`` is no domain."""
    domain = source.get("domain") or NO_DOMAIN
    cells = {"source": source.get("name"), "language": source["language"], "domain": domain}
    return str(cells[by]) if by in cells else f"{source['language']}/{domain}"


def source_shares(
    sources: Sequence[Mapping[str, Any]], tokens: Mapping[str, int], phases: Sequence[Phase], by: MixtureBy
) -> list[dict[str, float]]:
    """Share of every source in every phase, each summing to one; sources of one cell share it by their tokens.

    Args:
        sources: facts of each source: ``name``, ``language``, ``domain``.
        tokens: training tokens of each source by name.
        phases: at least one; weights of none mean by tokens.

    Raises:
        DataError: with every word that names nothing, is missing, is negative, or has no tokens behind it.
    """
    cells: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        cells[cell_of(source, by)].append(source["name"])
    faults: list[Fault] = []
    result = []
    for phase in phases:
        weights = phase.weights
        if weights is None:
            weights = {cell: float(sum(tokens[name] for name in names)) for cell, names in cells.items()}
        held = {cell: sum(tokens[name] for name in names) for cell, names in cells.items()}
        found = weight_faults(weights, held, phase.field)
        faults += found
        if not found:
            result.append(_spread(weights, cells, tokens))
    if faults:
        raise DataError(faults)
    return result


def weight_faults(weights: Mapping[str, float], tokens: Mapping[str, int], field: str) -> list[Fault]:
    """What is wrong with one phase's weights, given the tokens behind each word; the fields carry ``field``."""
    faults: list[Fault] = []
    for name, weight in weights.items():
        if name not in tokens:
            near = difflib.get_close_matches(name, tokens, n=1, cutoff=0) or ["-"]
            faults.append((f"{field}.{name}", f"must name a source of {sorted(tokens)}; did you mean {near[0]}?"))
        elif not (math.isfinite(weight) and weight >= 0):
            faults.append((f"{field}.{name}", f"must be 0 or a positive number; got {weight}; set its share"))
        elif weight and not tokens[name]:
            message = f"must be 0, since the source holds no training token; got {weight}; set 0"
            faults.append((f"{field}.{name}", message))
    faults += [
        (f"{field}.{name}", "must give every source its weight; got none; set it, 0 leaves it out")
        for name in tokens
        if name not in weights
    ]
    if not faults and not any(weights.values()):
        faults.append((field, "must leave at least one source with training tokens; got none; raise one weight"))
    return faults


def _spread(
    weights: Mapping[str, float], cells: Mapping[str, list[str]], tokens: Mapping[str, int]
) -> dict[str, float]:
    total = sum(weights.values())
    shares = {}
    for cell, names in cells.items():
        held = sum(tokens[name] for name in names)
        for name in names:
            # One source alone must get its weight to the last bit, whatever its tokens.
            part = 1.0 if len(names) == 1 else tokens[name] / max(1, held)
            shares[name] = weights[cell] * part / total
    return shares


def capped(
    shares: Sequence[Mapping[str, float]], phase_tokens: Sequence[int], tokens: Mapping[str, int], cap_epochs: float
) -> list[dict[str, float]]:
    """``shares`` with every source held to ``cap_epochs`` passes; what it gives up goes to the others in proportion.

    A source over the cap has its share in every phase lowered by one factor, so that it is read exactly that often; the
    others of each phase grow alike until they meet the cap themselves, and are then lowered from what they have grown
    to (after UniMax, Chung et al. 2023, arXiv:2304.09151, which caps epochs from uniform shares; here from those asked
    for). Every phase's shares are 0 or more and sum to one.

    Args:
        shares: of every source in each phase.
        phase_tokens: tokens that the run reads in each phase.
        tokens: training tokens of each source.
        cap_epochs: most passes over any source.

    Raises:
        DataError: if a phase asks for more than its sources hold under the cap.
    """
    names = list(shares[0])
    asked = np.array([[phase[name] for name in names] for phase in shares])
    length, room = np.asarray(phase_tokens, dtype=np.float64), np.array([cap_epochs * tokens[name] for name in names])
    held = np.zeros(len(names), dtype=bool)
    result = asked.copy()
    while True:
        over = ~held & (length @ result > room * (1 + 1e-12))
        if not over.any():
            return [dict(zip(names, row, strict=True)) for row in result.tolist()]
        held |= over
        result = _lowered(result, length, room, over, held)
        _check_filled(result, asked > 0, names, length, room, cap_epochs)


def _lowered(
    shares: np.ndarray, length: np.ndarray, room: np.ndarray, over: np.ndarray, held: np.ndarray
) -> np.ndarray:
    """Shares (phases, sources) with the sources ``over`` the cap brought down to it; those not ``held`` fill up."""
    result = shares.copy()
    # From what they have grown to, so that the factor is below one: from what was asked it may lie above, and a phase
    # in which nothing gave way to them would be asked for more than all of it.
    result[:, over] *= room[over] / (length @ shares)[over]
    rest, others = np.maximum(0, 1 - result[:, held].sum(1)), result[:, ~held].sum(1)
    result[:, ~held] *= np.divide(rest, others, out=np.zeros_like(rest), where=others > 0)[:, None]
    return result


def _check_filled(
    shares: np.ndarray, asked: np.ndarray, names: list[str], length: np.ndarray, room: np.ndarray, cap_epochs: float
) -> None:
    filled = shares.sum(1)
    short = np.flatnonzero((length > 0) & (filled < 1 - 1e-9))
    if not short.size:
        return
    # The narrowest set of sources that holds too little for the phases that read nothing else says what is short.
    for phase in sorted(np.flatnonzero(length > 0), key=lambda one: int(asked[one].sum())):
        alike = (length > 0) & ~(asked & ~asked[phase]).any(1)
        if length[alike].sum() > room[asked[phase]].sum():
            given = f"{room[asked[phase]].sum():,.0f}"
            raise _short(_named(asked[phase], names), length[alike].sum(), _of(alike, length), cap_epochs, given)
    phase = short[0]
    given = f"{filled[phase] * length[phase]:,.0f} there, since other phases read them too"
    raise _short(_named(asked[phase], names), length[phase], f"phase {phase}", cap_epochs, given)


def _named(chosen: np.ndarray, names: list[str]) -> str:
    return ", ".join(name for name, one in zip(names, chosen, strict=True) if one)


def _of(phases: np.ndarray, length: np.ndarray) -> str:
    """What the chosen ``phases`` are together, for a person."""
    if phases[length > 0].all():
        return "the run"
    chosen = np.flatnonzero(phases)
    return f"phase{'s' * (len(chosen) > 1)} {', '.join(map(str, chosen))}"


def _short(sources: str, wanted: float, of: str, cap_epochs: float, given: str) -> DataError:
    message = (
        f"must let the sources {sources} give the {wanted:,.0f} tokens of {of}; at {cap_epochs:g} passes they give "
        f"{given}; raise cap_epochs, add data, or lower max_steps"
    )
    return DataError([("cap_epochs", message)])
