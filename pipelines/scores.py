"""What ``evaluate`` stages measured, read from their artifacts: ``scores.json``, ``items.json``, ``samples.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.base import ConfigError
from stages.runtime.artifact import RECORD, ArtifactError
from stages.runtime.manifest import MANIFEST, CheckpointError, verify_manifest

if TYPE_CHECKING:
    from pipelines.chain import Chain, Node

SCORES, ITEMS, SAMPLES = "scores.json", "items.json", "samples.json"
SCORED = "scores"
"""What an evaluating stage produces."""
SUBJECT = "from_"
"""The input that names the model which is evaluated."""


@dataclasses.dataclass(frozen=True)
class Items:
    """What a score is made of: ``value = sum(numerator) / sum(denominator)`` over the items ``ids``.

    Items of one of the ``families`` (a template, a document) are not independent; without them each is one of its own.
    """

    ids: list[str]
    numerator: list[float]
    denominator: list[float]
    families: list[str] | None = None

    @property
    def independent(self) -> int:
        """How many of the items, or families of items, are independent."""
        return len(set(self.ids if self.families is None else self.families))


@dataclasses.dataclass(frozen=True)
class Score:
    """One score with its unit, count and interval; ``set_hash`` says which set it was measured on (TRAPS M3)."""

    name: str
    suite: str
    value: float | None
    unit: str
    better: str
    n: int
    n_unit: str
    interval: tuple[float, float] | None
    set_hash: str
    suite_version: int
    method: str
    decoding: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    items: Items | None
    part: str | None = None
    """What the last segment of the name is (``language``, ``domain``); none for a score over a whole set."""

    @property
    def counted(self) -> str:
        """What was counted, and into how many families it falls where not all of it is independent."""
        independent = self.n if self.items is None else self.items.independent
        families = f" in {independent:,} families" if independent < self.n else ""
        return f"{self.n:,} {self.n_unit}{families}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One finished evaluation of a model: its scores in their order, samples, and what was left out and why."""

    stage: str
    directory: Path
    confidence: float
    scores: list[Score]
    samples: list[dict[str, Any]]
    not_run: dict[str, str]


def read_evaluation(stage: str, directory: Path) -> Evaluation:
    """The evaluation in the artifact ``directory``, made by the stage of that name.

    Raises:
        ArtifactError: naming the file that is missing, was changed, or is not what ``evaluate`` writes.
    """
    output = directory / "output"
    _verify(output, stage)
    plain = read_json(output / SCORES)
    samples = read_json(output / SAMPLES)["samples"] if (output / SAMPLES).is_file() else []
    items = read_json(output / ITEMS) if (output / ITEMS).is_file() else {}
    try:
        # Arithmetic is a setting of every score: bf16 against fp32 is no difference between two models.
        shared = {"precision": (plain.get("settings") or {}).get("precision")}
        scores = [_score(entry, items, shared) for entry in plain["scores"]]
        confidence = float(plain.get("confidence", 0.95))
        return Evaluation(stage, directory, confidence, scores, list(samples), dict(plain.get("not_run") or {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{output / SCORES} must hold scores as evaluate writes them; {type(error).__name__}: {error}"
        raise ArtifactError(f"{message}; run {stage} again") from error


def _verify(output: Path, stage: str) -> None:
    """Scores that were changed after they were sealed, or lost their items, must not be compared."""
    # What was never sealed is read as it is; its writer vouches for it.
    if (output.parent / RECORD).is_file() or (output / MANIFEST).is_file():
        try:
            verify_manifest(output)
        except (CheckpointError, OSError) as error:
            said = str(error).partition("; use another checkpoint")[0]
            raise ArtifactError(f"{said}; restore it, or rm -r {output.parent} and run {stage} again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ArtifactError: when there is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; make its artifact anew") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} must hold a JSON object; got {type(found).__name__}; make its artifact anew")
    return found


def evaluators(chain: Chain, subject: str) -> list[Node]:
    """The stages of the recipe that evaluate the stage ``subject``, in order."""
    return [node for node in chain if node.stage.produces == SCORED and node.parents.get(SUBJECT) == subject]


def finished(chain: Chain, subject: str) -> list[Evaluation]:
    """What is there of the evaluations of ``subject`` as the recipe stands."""
    from pipelines.staleness import standing

    found = []
    for node in evaluators(chain, subject):
        try:
            done = standing(node).done
        except ConfigError:
            continue
        if done:
            found.append(read_evaluation(node.name, node.job.directory))
    return found


def _score(entry: Mapping[str, Any], items: Mapping[str, Any], shared: Mapping[str, Any]) -> Score:
    interval = entry.get("interval")
    value = entry["value"]
    return Score(
        name=str(entry["name"]),
        suite=str(entry["suite"]),
        value=None if value is None else float(value),
        unit=str(entry["unit"]),
        better=str(entry.get("better", "none")),
        n=int(entry["n"]),
        n_unit=str(entry.get("n_unit", "items")),
        interval=None if interval is None or None in interval else (float(interval[0]), float(interval[1])),
        set_hash=str(entry["set_hash"]),
        suite_version=int(entry.get("suite_version", 1)),
        method=str(entry.get("method", "")),
        decoding=entry.get("decoding"),
        settings={**shared, **(entry.get("settings") or {})},
        items=_items(items.get(entry["items"])) if entry.get("items") else None,
        part=entry.get("part"),
    )


def _items(plain: Mapping[str, Any] | None) -> Items | None:
    if plain is None:
        return None
    ids, numerator = [str(name) for name in plain["ids"]], [float(value) for value in plain["numerator"]]
    denominator = [float(value) for value in plain.get("denominator") or [1.0] * len(ids)]
    families = None if plain.get("families") is None else [str(name) for name in plain["families"]]
    counts = [len(ids), len(numerator), len(denominator), len(ids if families is None else families)]
    if len(set(counts)) > 1:
        raise ValueError("{} ids, {} numerators, {} denominators and {} families".format(*counts))
    return Items(ids, numerator, denominator, families)
