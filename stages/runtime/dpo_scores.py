"""Margins and accuracies of held-out pairs, by category and language, each with n and an interval (TRAPS M6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from stages.runtime.dpo_data import TokenPair
from stages.runtime.suites.intervals import described_interval


def scores(pairs: Sequence[TokenPair], policy: np.ndarray, reference: np.ndarray) -> dict[str, float | int]:
    """Metrics of (n, 2) log-probabilities in nats (chosen, rejected) under the policy and under its parent.

    ``margin_nats`` is the mean of (policy - reference) of the chosen answer less that of the rejected one, 0 before
    training; ``accuracy`` the share of pairs in which it is above 0, ties counting half. ``preference_nats_per_token``
    and ``preference_accuracy`` ask the policy alone which answer is likelier a token, before as after.
    ``chosen_change_nats_per_token`` tells whether the chosen answers lose probability as well. All and each category,
    each language and each category in each language have ``n_pairs``; ``_low`` and ``_high`` bound a 95% interval, and
    are absent where all pairs are of one template, which says nothing of others.
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
            is_share = metric.endswith("accuracy")
            bounds = interval(values[members], [templates[member] for member in members], is_share=is_share)
            if bounds is not None:
                found[f"{metric}_low{suffix}"], found[f"{metric}_high{suffix}"] = bounds
    return found


def interval(values: np.ndarray, templates: Sequence[str], *, is_share: bool = False) -> tuple[float, float] | None:
    """95% interval of the mean over whole ``templates``, since fillings of one go together; none of one template."""
    if len(set(templates)) < 2:
        return None
    unit = "share" if is_share else "nats"
    ids = [str(place) for place in range(len(values))]
    return described_interval(ids, values.tolist(), None, templates, unit=unit, n_unit="pairs")[0]


def _wins(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, 0.5, (values > 0).astype(np.float64))


def _groups(pairs: Sequence[TokenPair]) -> dict[str, list[int]]:
    """Places of pairs by group name; the empty name is all of them."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        for name in ("", pair.category, pair.language, f"{pair.category}/{pair.language}"):
            found[name].append(place)
    return dict(sorted(found.items()))
