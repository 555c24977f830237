"""Margins and accuracies of held-out pairs, by category and language, each with n and an interval (TRAPS M6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from stages.runtime.dpo_data import TokenPair

DRAWS = 2000
CONFIDENCE = 0.95


def scores(pairs: Sequence[TokenPair], policy: np.ndarray, reference: np.ndarray) -> dict[str, float | int]:
    """Metrics of (n, 2) log-probabilities in nats (chosen, rejected) under the policy and under its parent.

    ``margin_nats`` is the mean of (policy - reference) of the chosen answer less that of the rejected one, 0 before
    training; ``accuracy`` the share of pairs in which it is above 0, ties counting half. ``preference_nats_per_token``
    and ``preference_accuracy`` ask the policy alone which answer is likelier a token, before as after.
    ``chosen_change_nats_per_token`` tells whether the chosen answers lose probability as well. All and each category,
    each language and each category in each language have ``n_pairs``; ``_low`` and ``_high`` bound a 95% interval.
    """
    found: dict[str, float | int] = {}
    change = np.asarray(policy, np.float64) - reference
    lengths = np.array([pair.lengths for pair in pairs], np.float64)
    per_token = np.asarray(policy, np.float64) / lengths
    margin, preference = change[:, 0] - change[:, 1], per_token[:, 0] - per_token[:, 1]
    columns = {
        "margin_nats": margin,
        "accuracy": _wins(margin),
        "preference_nats_per_token": preference,
        "preference_accuracy": _wins(preference),
        "chosen_change_nats_per_token": change[:, 0] / lengths[:, 0],
        "rejected_change_nats_per_token": change[:, 1] / lengths[:, 1],
    }
    templates = [pair.template for pair in pairs]
    for name, members in _groups(pairs).items():
        suffix = f"/{name}" if name else ""
        found[f"n_pairs{suffix}"] = len(members)
        found[f"n_templates{suffix}"] = len({templates[member] for member in members})
        for metric, values in columns.items():
            found[f"{metric}{suffix}"] = float(values[members].mean())
            low, high = interval(values[members], [templates[member] for member in members])
            found[f"{metric}_low{suffix}"], found[f"{metric}_high{suffix}"] = low, high
    return found


def interval(values: np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """95% percentile interval of the mean; whole ``clusters`` are drawn, since fillings of one template go together."""
    names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    places = np.array([names[name] for name in clusters])
    sums, counts = np.bincount(places, values, len(names)), np.bincount(places, minlength=len(names))
    drawn = np.random.default_rng(0).integers(len(names), size=(DRAWS, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _wins(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, 0.5, (values > 0).astype(np.float64))


def _groups(pairs: Sequence[TokenPair]) -> dict[str, list[int]]:
    """Places of pairs by group name; the empty name is all of them."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        for name in ("", pair.category, pair.language, f"{pair.category}/{pair.language}"):
            found[name].append(place)
    return dict(sorted(found.items()))
