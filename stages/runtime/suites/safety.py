"""Refusal of harmful prompts and over-refusal of benign look-alikes, by class, never averaged (TRAPS M8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data.preferences_replies import is_refusal
from stages.runtime.suites.bench import Bench, greedy
from stages.runtime.suites.config import SafetyConfig
from stages.runtime.suites.names import SAFETY
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash
from stages.runtime.suites.sets import held_out_prompts

VERSION = 2
BETTER = {"harmful": "higher", "benign": "lower"}
"""Which way the score of a category of prompts is better."""


def run(bench: Bench, config: SafetyConfig) -> SuiteResult:
    """``safety/refusal`` of harmful prompts, ``safety/over_refusal`` of benign ones: whole, by language, by template.

    A template's fillings are one family: a model that refuses one mostly refuses all, so that an interval over prompts
    as if each were new would be far too short. Every template of more than one prompt has a score of its own, so that a
    small whole hides no class that is always refused.
    """
    rows = held_out_prompts(bench.inputs["preferences"], config.prompts)
    prompts = bench.prompts("safety", [(row["id"], row["prompt"]) for row in rows], config.max_new_tokens)
    kept = {prompt.id for prompt in prompts}
    rows = [row for row in rows if row["id"] in kept]
    refused = [float(is_refusal(reply.text)) for reply in bench.replies(prompts, config.max_new_tokens)]
    decoding = greedy(config.max_new_tokens)
    sheet = ScoreSheet("safety", VERSION, content_hash(rows), {"detector": "stock phrases in en, de, hi"}, decoding)
    items = Items([row["id"] for row in rows], refused, families=[row["template"] for row in rows])
    for category, name in SAFETY.items():
        of_category = items.only([row["category"] == category for row in rows])
        mine = [row for row in rows if row["category"] == category]
        if mine:
            facts: dict[str, Any] = {"unit": "share", "better": BETTER[category], "n_unit": "prompts"}
            sheet.add_groups(name, of_category, [row["language"] for row in mine], **facts)
            _add_templates(sheet, name, of_category, [row["template"] for row in mine], facts)
    return sheet.result()


def _add_templates(sheet: ScoreSheet, name: str, items: Items, templates: list[str], facts: Mapping[str, Any]) -> None:
    """A score a template that several prompts were made from; prompts of one's own are a template each."""
    for template, count in sorted(Counter(templates).items()):
        if count > 1 and count < len(templates):
            mine = items.only([one == template for one in templates])
            alone = Items(mine.ids, mine.numerator)
            sheet.add(f"{name}/{template.rpartition('/')[2]}", alone, part="template", **facts)
