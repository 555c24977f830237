"""Contrastive facts: knowledge read off likelihoods, apart from whether the model would ever say it (TRAPS M5)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from data.facts import read_facts
from data.tokenizer import END_OF_TEXT, encode_text, token_byte_strings
from stages.runtime.suites.bench import Bench
from stages.runtime.suites.config import MarginsConfig
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash

VERSION = 1


def run(bench: Bench, config: MarginsConfig) -> SuiteResult:
    """``margins/nats_per_token`` and ``margins/accuracy``, whole, by language and by domain.

    A fact's margin is the mean over its wrong endings of NLL(wrong) less NLL(correct), each per token of the ending. It
    counts as known when the right ending has the lowest NLL per token of all.
    """
    facts = chosen(list(read_facts(bench.inputs["facts"])), config.facts)
    endings = [[fact["correct"], *fact["distractors"]] for fact in facts]
    rows = [ending_row(bench, fact["prompt"], one) for fact, those in zip(facts, endings, strict=True) for one in those]
    scored = iter(bench.score(rows))
    means = [[float(next(scored).nats.mean()) for _ in those] for those in endings]
    margins = [sum(wrong) / len(wrong) - right for right, *wrong in means]
    known = [float(right < min(wrong)) for right, *wrong in means]
    ids = [fact["id"] for fact in facts]
    chance = sum(1 / len(those) for those in endings) / len(endings)
    sheet = ScoreSheet("margins", VERSION, content_hash(facts), {"chance_accuracy": round(chance, 6)})
    for field in ("language", "domain"):
        groups, whole = [fact[field] for fact in facts], field == "language"
        for name, values, unit in (("nats_per_token", margins, "nats_per_token"), ("accuracy", known, "share")):
            sheet.add_groups(
                f"margins/{name}", Items(ids, values), groups, unit=unit, better="higher", n_unit="facts", whole=whole
            )
    return sheet.result()


def chosen(facts: list[dict[str, Any]], per_group: int | None) -> list[dict[str, Any]]:
    """The first ``per_group`` of each domain and language."""
    taken: Counter[tuple[str, str]] = Counter()
    kept = []
    for fact in facts:
        group = (fact["domain"], fact["language"])
        taken[group] += 1
        if per_group is None or taken[group] <= per_group:
            kept.append(fact)
    return kept


def ending_row(bench: Bench, prompt: str, ending: str) -> tuple[list[int], int]:
    """Ids of the document that begins with ``prompt`` and goes on with ``ending``, and where the ending begins.

    The text is encoded as one. A token that begins before the ending's space does not count as the ending's.
    """
    ids = [bench.specials[END_OF_TEXT], *encode_text(bench.tokenizer, f"{prompt} {ending}")]
    table, reached = token_byte_strings(bench.tokenizer), 0
    for place, token in enumerate(ids):
        if reached >= len(prompt.encode()) and place:
            return ids, place
        reached += len(table[token])
    raise ValueError(f"ending {ending!r} must hold a token of its own after {prompt!r}")
