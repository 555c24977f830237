"""Contrastive facts: knowledge and recall read off likelihoods, apart from what the model would say (TRAPS M5)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data.facts import DIFFICULTIES, read_facts
from data.tokenizer import encode_text, token_byte_strings
from stages.runtime.suites.bench import Bench, Scored
from stages.runtime.suites.config import MarginsConfig
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash

VERSION = 2
MAIN = "medium"
"""The difficulty of the scores by language and domain, which every fact has."""
Fact = Mapping[str, Any]
Means = dict[str, float]
"""Mean nats a token of each ending of one fact."""


def run(bench: Bench, config: MarginsConfig) -> SuiteResult:
    """``margins/nats_per_token``, ``margins/accuracy`` by language, domain and difficulty; ``margins/recall_at_<k>``.

    A fact's margin is the mean over its wrong endings of NLL(wrong) less NLL(correct), each per token of the ending. It
    counts as known when the right ending has the lowest NLL per token of all, and as recalled at k when each token of
    the right ending is among the k likeliest of the whole vocabulary at its place. Recall is no knowledge: a model that
    prefers other continuations altogether may know what it does not recall, and the two are never averaged.
    """
    facts = chosen(list(read_facts(bench.inputs["facts"])), config.facts)
    scored = _scored(bench, facts)
    means = [{ending: float(one.nats.mean()) for ending, one in endings.items()} for endings in scored]
    ranks = [endings[fact["correct"]].worst_rank for fact, endings in zip(facts, scored, strict=True)]
    sheet = ScoreSheet("margins", VERSION, content_hash(facts), {})
    for difficulty in DIFFICULTIES:
        _put_difficulty(sheet, difficulty, facts, means)
    ids, languages = [fact["id"] for fact in facts], [fact["language"] for fact in facts]
    families = [fact["family"] for fact in facts]
    for k in sorted(set(config.top_k)):
        recalled = Items(ids, [float(rank < k) for rank in ranks], families=families)
        sheet.add_groups(f"margins/recall_at_{k}", recalled, languages, unit="share", better="higher", n_unit="facts")
    return sheet.result()


def _scored(bench: Bench, facts: Sequence[Fact]) -> list[dict[str, Scored]]:
    """Each fact's endings, the right one and the wrong ones of all difficulties, each once."""
    endings = [list(dict.fromkeys([fact["correct"], *_wrong(fact)])) for fact in facts]
    rows = [ending_row(bench, fact["prompt"], one) for fact, those in zip(facts, endings, strict=True) for one in those]
    scored = iter(bench.score(rows))
    return [{ending: next(scored) for ending in those} for those in endings]


def _wrong(fact: Fact) -> list[str]:
    return [ending for difficulty in DIFFICULTIES for ending in fact["distractors"].get(difficulty, ())]


def _put_difficulty(sheet: ScoreSheet, difficulty: str, facts: Sequence[Fact], means: Sequence[Means]) -> None:
    """The scores of one difficulty; those of ``MAIN`` by language and domain too, under the plain name."""
    having = [(fact, mean) for fact, mean in zip(facts, means, strict=True) if difficulty in fact["distractors"]]
    if not having:
        return
    rights = [mean[fact["correct"]] for fact, mean in having]
    wrongs = [[mean[ending] for ending in fact["distractors"][difficulty]] for fact, mean in having]
    margins = [math.fsum(wrong) / len(wrong) - right for right, wrong in zip(rights, wrongs, strict=True)]
    known = [float(right < min(wrong)) for right, wrong in zip(rights, wrongs, strict=True)]
    chance = math.fsum(1 / (1 + len(wrong)) for wrong in wrongs) / len(wrongs)
    ids, families = [fact["id"] for fact, _ in having], [fact["family"] for fact, _ in having]
    for name, values, unit in (("nats_per_token", margins, "nats_per_token"), ("accuracy", known, "share")):
        facts_of: dict[str, Any] = {"unit": unit, "better": "higher", "n_unit": "facts"}
        if unit == "share":
            facts_of["chance"] = round(chance, 6)
        items = Items(ids, values, families=families)
        if difficulty == MAIN:
            for part in ("language", "domain"):
                groups = [fact[part] for fact, _ in having]
                sheet.add_groups(f"margins/{name}", items, groups, part=part, whole=part == "language", **facts_of)
        sheet.add(f"margins/{name}/{difficulty}", items, part="difficulty", **facts_of)


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

    A document begins with its own first token, as in training, where nothing of the one before it is seen. The text is
    encoded as one. A token that begins before the ending's space does not count as the ending's.

    Raises:
        ValueError: when the ending has no token of its own.
    """
    ids = encode_text(bench.tokenizer, f"{prompt} {ending}")
    table, reached = token_byte_strings(bench.tokenizer), 0
    for place, token in enumerate(ids):
        if reached >= len(prompt.encode()) and place:
            return ids, place
        reached += len(table[token])
    raise ValueError(f"ending {ending!r} must hold a token of its own after {prompt!r}")
