"""Whether replies end by themselves and keep to the template: behaviour apart from what they say (TRAPS M5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.messages import read_messages
from data.tokenizer import SPECIAL_TOKENS
from stages.runtime.suites.bench import Bench, Reply, greedy
from stages.runtime.suites.config import FormatConfig
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash

VERSION = 2


def run(bench: Bench, config: FormatConfig) -> SuiteResult:
    """``format/stop_rate``, ``format/template`` and ``format/length_tokens`` of greedy replies, by language.

    Stopping and obeying are two things: a reply stops at either of ``data.chat.REPLY_ENDS``, as whoever serves the
    model does; the template has it end by ``<|im_end|>`` alone.
    """
    rows = conversations(bench.inputs["messages"], config.conversations)
    prompts = bench.prompts("format", [(row["id"], row["messages"]) for row in rows], config.max_new_tokens)
    kept = {prompt.id for prompt in prompts}
    rows = [row for row in rows if row["id"] in kept]
    replies = bench.replies(prompts, config.max_new_tokens)
    ids, languages = [row["id"] for row in rows], [row["language"] for row in rows]
    families = [row.get("family") or row["id"] for row in rows]
    sheet = ScoreSheet("format", VERSION, content_hash(rows), {}, greedy(config.max_new_tokens))
    for name, values, unit, better in (
        ("stop_rate", [float(reply.stopped) for reply in replies], "share", "higher"),
        ("template", [float(obeys(reply)) for reply in replies], "share", "higher"),
        ("length_tokens", [float(reply.tokens) for reply in replies], "tokens", "none"),
    ):
        sheet.add_groups(
            f"format/{name}",
            Items(ids, values, families=families),
            languages,
            unit=unit,
            better=better,
            n_unit="replies",
        )
    return sheet.result()


def obeys(reply: Reply) -> bool:
    """Whether a reply is one turn of visible text, closed by ``<|im_end|>``, without a special token or one spelled."""
    spelled = any(special in reply.text for special in SPECIAL_TOKENS)
    return reply.closes_turn and reply.is_clean and bool(reply.text.strip()) and not spelled


def conversations(messages_dir: Path, per_language: int | None) -> list[Mapping[str, Any]]:
    """The held-out conversations with the lowest ids of each language, up to their last reply, which is left off."""
    taken: Counter[str] = Counter()
    kept: list[Mapping[str, Any]] = []
    for row in sorted(read_messages(messages_dir, "heldout"), key=lambda row: row["id"]):
        taken[row["language"]] += 1
        if per_language is None or taken[row["language"]] <= per_language:
            kept.append({**row, "messages": row["messages"][:-1]})
    return kept
