"""A quality classifier trained from one's own labels: logistic regression over hashed words and pairs of words.

Labels are split by the hash of their text, so that the same text is always on the same side: six tenths to learn from,
two to choose the threshold on, two to say how good it is; a threshold is never praised on the labels that chose it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.clean_config import QualityConfig
from data.clean_form import normalise
from data.compressed import MAX_ROW_BYTES, UnreadableFile, bounded_lines
from data.errors import DataError
from data.words import Array, WordRuns

MIN_LABELS = 20
"""Labels of either kind that each of the three parts must have."""
BATCH = 64
RATE = 0.5
CURVE_POINTS = 20
_PARTS = (("train", 0.6), ("threshold", 0.8), ("test", 1.0))


@dataclasses.dataclass(frozen=True)
class Labelled:
    """One labelled text."""

    text: str
    good: bool


class QualityModel:
    """Scores texts between 0 (to drop) and 1 (to keep)."""

    def __init__(self, weights: Array, bias: float, threshold: float, sample_characters: int) -> None:
        self.weights = weights
        self.bias = bias
        self.threshold = threshold
        self.sample_characters = sample_characters
        self._bits = int(math.log2(len(weights)))
        self._runs = WordRuns(2)

    def features(self, text: str) -> Array:
        """The distinct features of ``text``; each weighs 1 / sqrt(their number)."""
        runs = self._runs.by_length(text[: self.sample_characters], (1, 2))
        return np.unique(np.concatenate([runs[1], runs[2]]) >> np.uint64(64 - self._bits)).astype(np.int64)

    def score(self, text: str) -> float:
        """The probability that ``text`` is good, rounded so that the last bits of a machine decide nothing."""
        found = self.features(text)
        z = float(self.weights[found].sum(dtype=np.float64)) / math.sqrt(max(1, len(found))) + self.bias
        return round(1 / (1 + math.exp(-max(-40.0, min(40.0, z)))), 6)

    def keeps(self, text: str) -> bool:
        """Whether the score reaches the threshold."""
        return self.score(text) >= self.threshold

    def save(self, path: Path) -> None:
        """Write the model, to be read by workers and with the corpus."""
        with path.open("wb") as file:
            facts = np.array([self.bias, self.threshold, self.sample_characters])
            np.savez_compressed(file, weights=self.weights, facts=facts)

    @classmethod
    def load(cls, path: Path) -> QualityModel:
        """The model that ``save`` wrote."""
        with np.load(path) as file:
            bias, threshold, characters = file["facts"].tolist()
            return cls(file["weights"], bias, threshold, int(characters))


def train_quality(config: QualityConfig) -> tuple[QualityModel, dict[str, Any]]:
    """Train, choose the threshold, measure; the model and what the report says of it.

    Raises:
        DataError: for labels that cannot be read or are too few, and a precision that is not reached.
    """
    parts = _split(read_labels(config))
    model = fit(config, parts["train"])
    model.threshold = _threshold(config, _scored(model, parts["threshold"]))
    facts = _facts(model, parts)
    return model, {"aim": config.aim, "target": config.target, "missed": missed(config, facts["test"]), **facts}


def read_labels(config: QualityConfig) -> Iterator[Labelled]:
    """The labelled texts, in the corpus's form; a row that is none is a ``DataError`` with file and line."""
    path = Path(config.labels)
    try:
        for number, line in enumerate(bounded_lines(path, MAX_ROW_BYTES), start=1):
            if line.content is not None and not line.content.strip():
                continue
            try:
                row = json.loads(line.content or b"")
                text, label = row["text"], row["label"]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                message = f'must hold {{"text": ..., "label": ...}} a line; got {path.name}:{number}; mend it'
                raise DataError([("quality.labels", message)]) from None
            yield Labelled(normalise(text), str(label).lower() in config.good)
    except UnreadableFile as error:
        raise DataError([("quality.labels", f"must be readable to its end; got {path}: {error}")]) from error


def _split(labels: Iterable[Labelled]) -> dict[str, list[Labelled]]:
    parts: dict[str, list[Labelled]] = {name: [] for name, _ in _PARTS}
    for one in sorted(set(labels), key=lambda one: (_place(one.text), one.good)):
        parts[next(name for name, end in _PARTS if _place(one.text) < end)].append(one)
    for name, members in parts.items():
        good = sum(one.good for one in members)
        if min(good, len(members) - good) < MIN_LABELS:
            message = (
                f"must give each part at least {MIN_LABELS} labels to keep and as many to drop; got {good} and "
                f"{len(members) - good} for {name}; add labels, or see that quality.good names those to keep"
            )
            raise DataError([("quality.labels", message)])
    return parts


def _place(text: str) -> float:
    return int.from_bytes(hashlib.sha256(f"label\0{text}".encode()).digest()[:6], "big") / 2**48


def fit(config: QualityConfig, labels: Sequence[Labelled]) -> QualityModel:
    """Logistic regression by AdaGrad (Duchi et al. 2011) over small batches in a fixed order."""
    model = QualityModel(np.zeros(2**config.hash_bits, np.float32), 0.0, 0.5, config.sample_characters)
    rows = [model.features(one.text) for one in labels]
    weights, bias = np.zeros(2**config.hash_bits), 0.0
    squares, bias_squares = np.full(len(weights), 1e-8), 1e-8
    order = np.random.default_rng(0)
    for _ in range(config.epochs):
        for chosen in _batches(order.permutation(len(rows))):
            lengths = np.array([len(rows[i]) for i in chosen])
            columns = np.concatenate([rows[i] for i in chosen])
            row = np.repeat(np.arange(len(chosen)), lengths)
            scale = 1 / np.sqrt(np.maximum(lengths, 1))
            z = np.bincount(row, weights[columns], len(chosen)) * scale + bias
            error = (1 / (1 + np.exp(-np.clip(z, -40, 40))) - [labels[i].good for i in chosen]) / len(chosen)
            gradient = np.bincount(columns, (error * scale)[row], len(weights)) + config.l2 * weights
            squares += gradient**2
            weights -= RATE * gradient / np.sqrt(squares)
            bias_squares += error.sum() ** 2
            bias -= RATE * error.sum() / math.sqrt(bias_squares)
    model.weights, model.bias = weights.astype(np.float32), float(bias)
    return model


def _batches(order: Array) -> Iterator[Array]:
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def _scored(model: QualityModel, labels: Sequence[Labelled]) -> list[tuple[float, bool]]:
    """(score, good), the best first."""
    return sorted(((model.score(one.text), one.good) for one in labels), reverse=True)


def _threshold(config: QualityConfig, scored: Sequence[tuple[float, bool]]) -> float:
    if config.aim == "share":
        return scored[max(0, math.ceil(config.target * len(scored)) - 1)][0]
    reached, best = None, 0.0
    for point in _curve(scored, range(1, len(scored) + 1)):
        best = max(best, point["precision"])
        if point["precision"] >= config.target:
            reached = point["threshold"]
    if reached is None:
        message = f"must be reachable; got {config.target:g}, the best is {best:.3f}; set it lower or add labels"
        raise DataError([("quality.target", message)])
    return float(reached)


def _curve(scored: Sequence[tuple[float, bool]], sizes: Iterable[int]) -> Iterator[dict[str, float]]:
    """What is kept at the score of each of the first ``sizes`` texts; equal scores stand or fall together."""
    good = np.cumsum([good for _, good in scored])
    scores = np.array([score for score, _ in scored])
    for threshold in dict.fromkeys(scored[size - 1][0] for size in sizes):
        kept = int((scores >= threshold).sum())
        yield {
            "threshold": threshold,
            "kept_share": round(kept / len(scored), 4),
            "precision": round(int(good[kept - 1]) / kept, 4),
            "recall": round(int(good[kept - 1]) / max(1, int(good[-1])), 4),
        }


def _facts(model: QualityModel, parts: dict[str, list[Labelled]]) -> dict[str, Any]:
    """What holds on the part that decided nothing, with Wilson's interval (1927) of the precision."""
    scored = _scored(model, parts["test"])
    kept = [good for score, good in scored if score >= model.threshold]
    good = sum(good for _, good in scored)
    size = len(scored)
    sizes = sorted({max(1, round(size * point / CURVE_POINTS)) for point in range(1, CURVE_POINTS + 1)})
    return {
        "threshold": model.threshold,
        "labels": {name: {"keep": sum(x.good for x in part), "n": len(part)} for name, part in parts.items()},
        "test": {
            "n": size,
            "kept": len(kept),
            "precision": round(sum(kept) / len(kept), 4) if kept else None,
            "precision_interval": wilson(sum(kept), len(kept)),
            "recall": round(sum(kept) / good, 4),
            "good_share_before": round(good / size, 4),
        },
        "curve": list(_curve(scored, sizes)),
    }


def missed(config: QualityConfig, test: dict[str, Any]) -> str | None:
    """One line where the labels that chose nothing do not bear out what the threshold was set for; None where they do.

    A precision is missed when it lies below the target; a share to keep, when the target lies outside its interval.
    """
    name, n = ("precision", test["kept"]) if config.aim == "precision" else ("share kept", test["n"])
    value = test["precision"] if config.aim == "precision" else round(test["kept"] / test["n"], 4)
    if value is None:
        return f"the classifier keeps none of {test['n']} labels that chose nothing; quality.target {config.target:g}"
    low, high = test["precision_interval"] if config.aim == "precision" else wilson(test["kept"], n) or [0.0, 1.0]
    is_chance = low <= config.target <= high
    if value >= config.target if config.aim == "precision" else is_chance:
        return None
    chance = "which may be chance" if is_chance else "which is more than chance"
    return (
        f"the classifier misses quality.target {config.target:g}: {name} {value:g} on labels that chose nothing "
        f"(n={n}, 95% interval {low:g} to {high:g}), {chance}; give it more labels, or another target"
    )


def wilson(hits: int, n: int) -> list[float] | None:
    """The 95% interval of a share; none without a trial."""
    if not n:
        return None
    z = 1.959964
    middle, spread = hits + z**2 / 2, z * math.sqrt(hits * (n - hits) / n + z**2 / 4)
    return [round((middle - spread) / (n + z**2), 4), round((middle + spread) / (n + z**2), 4)]
