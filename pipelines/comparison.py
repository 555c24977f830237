"""Scores of several variants side by side, each difference with its interval and verdict; nothing is averaged (M5, M8).

The first variant is the baseline. Only scores of the same set are compared (M3): other hashes are an error.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.paired import CONFIDENCE, METHOD, Difference, difference
from pipelines.scores import Evaluation, Score
from pipelines.suggest import suggestion
from stages.base import ConfigError, Fault

SHORT = 12
"""Characters of a hash that are shown."""
LINES = 8
"""Lines in which a refusal is summed up."""


@dataclasses.dataclass(frozen=True)
class Unlike:
    """One way in which a score of ``variant`` was not measured as the ``baseline``'s ``score``."""

    score: Score
    baseline: str
    variant: str
    what: str
    mine: str
    theirs: str

    @property
    def fault(self) -> Fault:
        """As a fault of the score."""
        message = f"must be measured with the same {self.what}; {self.baseline} has {self.mine}, {self.variant} has"
        return Fault(self.score.name, f"{message} {self.theirs}; evaluate both with the same suites and data")


class UnlikeError(ConfigError):
    """Variants that were not measured alike: ``faults`` sums it up, ``every`` has each score."""

    def __init__(self, found: Sequence[Unlike | Fault]) -> None:
        super().__init__(summarised(found))
        self.every = [one.fault if isinstance(one, Unlike) else one for one in found]


@dataclasses.dataclass(frozen=True)
class Row:
    """One score: each variant's, and each later variant's difference from the first."""

    scores: list[Score]
    differences: list[Difference]

    @property
    def name(self) -> str:
        """The score's name."""
        return self.scores[0].name


@dataclasses.dataclass(frozen=True)
class Beside:
    """One prompt and what each variant said to it; None where a variant was not asked."""

    name: str
    prompt: list[dict[str, str]]
    decoding: Mapping[str, Any]
    samples: list[dict[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All of it; ``partial`` maps scores that some variants lack to those that have them."""

    variants: list[str]
    rows: list[Row]
    samples: list[Beside]
    partial: dict[str, list[str]]

    def by_suite(self) -> dict[str, list[Row]]:
        """The rows by what they measure: knowledge, recall, decoding, format and safety stay apart (TRAPS M5)."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.scores[0].suite, []).append(row)
        return found


def compare(evaluations: Mapping[str, Sequence[Evaluation]], wanted: Sequence[str] = ()) -> Comparison:
    """Compare the variants, by name, on the scores that fit one of the ``wanted`` patterns (all without any).

    Raises:
        UnlikeError: where sets, versions, settings or items differ.
        ConfigError: naming every pattern that fits nothing.
    """
    variants = list(evaluations)
    by_name = {name: _by_score(found) for name, found in evaluations.items()}
    names = list(dict.fromkeys(name for scores in by_name.values() for name in scores))
    chosen = _chosen(names, wanted)
    rows: list[Row] = []
    partial: dict[str, list[str]] = {}
    faults: list[Unlike | Fault] = []
    for name in chosen:
        having = [variant for variant in variants if name in by_name[variant]]
        if len(having) < len(variants):
            partial[name] = having
            continue
        scores = [by_name[variant][name] for variant in variants]
        found = _unlike(variants, scores)
        faults += found
        if found:
            continue
        try:
            rows.append(Row(scores, [difference(scores[0], score) for score in scores[1:]]))
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise UnlikeError(faults)
    return Comparison(variants, rows, beside([_samples(evaluations[name]) for name in variants]), partial)


def beside(samples: Sequence[Sequence[dict[str, Any]]]) -> list[Beside]:
    """Each variant's samples put together by id, prompt and decoding, in the order of the first that has them."""
    table: dict[str, list[dict[str, Any] | None]] = {}
    first: dict[str, dict[str, Any]] = {}
    for number, mine in enumerate(samples):
        for sample in mine:
            # An id whose prompt was changed is another question, and so is one that is decoded otherwise.
            key = f"{sample.get('id')}\0{sample.get('prompt')}\0{sample.get('decoding')}"
            first.setdefault(key, sample)
            table.setdefault(key, [None] * len(samples))[number] = sample
    return [
        Beside(str(first[key].get("id")), list(first[key].get("prompt") or []), first[key].get("decoding") or {}, row)
        for key, row in table.items()
    ]


def plain(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON data."""
    return {
        "format": 1,
        "variants": comparison.variants,
        "baseline": comparison.variants[0],
        "method": METHOD,
        "confidence": CONFIDENCE,
        "scores": [_plain_row(comparison.variants, row) for row in comparison.rows],
        "not_in_every_variant": comparison.partial,
        "samples": [dataclasses.asdict(each) for each in comparison.samples],
    }


def _plain_row(variants: Sequence[str], row: Row) -> dict[str, Any]:
    first = row.scores[0]
    return {
        "name": first.name,
        "suite": first.suite,
        "unit": first.unit,
        "better": first.better,
        "set_hash": first.set_hash,
        "values": {
            name: {"value": score.value, "n": score.n, "n_unit": score.n_unit, "interval": score.interval}
            for name, score in zip(variants, row.scores, strict=True)
        },
        "differences": {
            name: dataclasses.asdict(found) for name, found in zip(variants[1:], row.differences, strict=True)
        },
    }


def _by_score(evaluations: Sequence[Evaluation]) -> dict[str, Score]:
    """Scores by name; where two evaluations of a model have one of a name, the later stage of the recipe counts."""
    return {score.name: score for evaluation in evaluations for score in evaluation.scores}


def _samples(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    return [sample for evaluation in evaluations for sample in evaluation.samples]


def _chosen(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The scores that a pattern fits; ``bpb`` fits ``bpb/de`` as well."""
    if not wanted:
        return list(names)
    fits = {
        pattern: {name for name in names if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")}
        for pattern in wanted
    }
    faults = [
        Fault("--metric", f"must name one of their scores; got {pattern!r}; {suggestion(pattern, names, 'score')}")
        for pattern, found in fits.items()
        if not found
    ]
    if faults:
        raise ConfigError(faults)
    return [name for name in names if any(name in found for found in fits.values())]


def mismatches(variants: Sequence[str], scores: Sequence[Score]) -> list[Fault]:
    """What keeps the scores from being compared (TRAPS M3); their sets, units, versions and settings must be one."""
    return [one.fault for one in _unlike(variants, scores)]


def _unlike(variants: Sequence[str], scores: Sequence[Score]) -> list[Unlike]:
    first, found = scores[0], []
    for variant, score in zip(variants[1:], scores[1:], strict=True):
        if first.set_hash != score.set_hash:
            found.append(Unlike(first, variants[0], variant, "set", _set_of(first), _set_of(score)))
        for what, mine, theirs in (
            ("unit", first.unit, score.unit),
            ("suite version", first.suite_version, score.suite_version),
            ("decoding", first.decoding or {}, score.decoding or {}),
            ("settings", first.settings, score.settings),
        ):
            if mine != theirs:
                found.append(Unlike(first, variants[0], variant, what, *_apart(mine, theirs)))
    return found


def _set_of(score: Score) -> str:
    return f"{score.set_hash[:SHORT]} ({score.counted})"


def _apart(mine: Any, theirs: Any) -> tuple[str, str]:
    """Two values in words; of two mappings only what is not the same."""
    if not isinstance(mine, Mapping):
        return str(mine), str(theirs)
    names = [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
    one, other = (", ".join(f"{name} {_cut(given.get(name))}" for name in names) for given in (mine, theirs))
    return one, other


def _cut(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 2 * SHORT else f"{text[:SHORT]}..."


def summarised(faults: Sequence[Unlike | Fault]) -> list[Fault]:
    """A line a suite and variant, at most ``LINES``; all that differs stands in the first of its scores."""
    groups: dict[tuple[str, str], list[Unlike]] = {}
    for one in faults:
        if isinstance(one, Unlike):
            groups.setdefault((one.score.suite, one.variant), []).append(one)
    lines = [_line(members) for members in groups.values()]
    lines += [one for one in faults if isinstance(one, Fault)]
    left = len(lines) - LINES
    way = "--verbose lists every score; --metric NAME compares those that were measured alike"
    more = f"{left} more suites or variants differ; " if left > 0 else ""
    return [*lines[:LINES], Fault("compare", f"{more}{way}")]


def _line(members: Sequence[Unlike]) -> Fault:
    """What keeps one suite's scores apart, shown by the first of them."""
    names = list(dict.fromkeys(one.score.name for one in members))
    ways: dict[str, Unlike] = {}
    for one in members:
        ways.setdefault(one.what, one)
    shown = names[0] if len(names) == 1 else f"{len(names)} scores, such as {names[0]},"
    said = "; ".join(f"{one.what} {one.mine} in {one.baseline}, {one.theirs} in {one.variant}" for one in ways.values())
    return Fault(members[0].score.suite, f"{shown} must be measured alike to be compared; {said}")
