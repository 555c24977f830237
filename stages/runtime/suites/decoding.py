"""What the model says when it is let to speak: greedy against sampled, loops, and the prompt's language (TRAPS M5).

Nothing here says what the model knows, which likelihoods tell (suite ``margins``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data.facts import read_facts
from data.tokenizer import encode_text
from model.decode import Sampling
from stages.runtime.suites import margins
from stages.runtime.suites.bench import Bench, Prompt, Reply, greedy
from stages.runtime.suites.config import DecodingConfig
from stages.runtime.suites.format import conversations
from stages.runtime.suites.languages import KNOWN, MIN_LETTERS, is_in_language, letters
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash

VERSION = 2
NGRAM = 4
"""Words a run that must not come again: the seq-rep-4 of Welleck et al. 2020 (arXiv:1908.04319, section 6)."""
Row = Mapping[str, Any]


def run(bench: Bench, config: DecodingConfig) -> SuiteResult:
    """Scores of one greedy and ``samples`` sampled replies to held-out conversations, and to facts where asked.

    ``decoding/agreement`` is the share of words that a greedy and a sampled reply have in common;
    ``decoding/repetition_ratio_<how>`` the four-word runs that came before in the same reply, over all of them;
    ``decoding/language_<how>`` the share of replies in their prompt's language, of those with letters enough to tell;
    ``decoding/said_<how>`` the share of facts whose prompt is continued by the right ending.
    """
    sampling = Sampling(config.temperature, config.top_p)
    decoding = {**greedy(config.max_new_tokens), "samples": config.samples, "seed": config.seed,
                "sampled_temperature": config.temperature, "sampled_top_p": config.top_p}  # fmt: skip
    rows = conversations(bench.inputs["messages"], config.prompts)
    prompts = bench.prompts("decoding", [(row["id"], row["messages"]) for row in rows], config.max_new_tokens)
    kept = {prompt.id for prompt in prompts}
    rows = [row for row in rows if row["id"] in kept]
    replies = _replies(bench, prompts, config, config.max_new_tokens, sampling)
    facts = _facts(bench, config)
    sheet = ScoreSheet("decoding", VERSION, content_hash([rows, facts]), {}, decoding)
    _put_agreement(sheet, rows, replies)
    for how, part in (("greedy", slice(0, 1)), ("sampled", slice(1, None))):
        _put_repetition(sheet, how, rows, [those[part] for those in replies])
        _put_language(sheet, how, rows, [those[part] for those in replies])
    if facts:
        _put_said(sheet, bench, facts, config, sampling)
    return sheet.result()


def _replies(
    bench: Bench, prompts: Sequence[Prompt], config: DecodingConfig, max_new_tokens: int, sampling: Sampling
) -> list[list[Reply]]:
    """Each prompt's replies, the greedy one first."""
    likeliest = bench.replies(prompts, max_new_tokens)
    numbered = [Prompt(f"{prompt.id}#{number}", prompt.ids) for prompt in prompts for number in range(config.samples)]
    drawn = iter(bench.replies(numbered, max_new_tokens, sampling, config.seed))
    return [[first, *(next(drawn) for _ in range(config.samples))] for first in likeliest]


def _put_agreement(sheet: ScoreSheet, rows: Sequence[Row], replies: Sequence[Sequence[Reply]]) -> None:
    values = [math.fsum(overlap(first.text, one.text) for one in rest) / len(rest) for first, *rest in replies]
    languages = [row["language"] for row in rows]
    sheet.add_groups(
        "decoding/agreement", Items([row["id"] for row in rows], values), languages,
        unit="share", better="none", n_unit="prompts",
    )  # fmt: skip


def _put_repetition(sheet: ScoreSheet, how: str, rows: Sequence[Row], replies: Sequence[Sequence[Reply]]) -> None:
    """A ratio of sums; none where no reply is long enough to repeat anything."""
    counts = [[repeated(reply.text) for reply in those] for those in replies]
    again = [float(sum(one[0] for one in those)) for those in counts]
    total = [float(sum(one[1] for one in those)) for those in counts]
    # Which replies are long enough depends on the model: every prompt stays, so that two models can be paired.
    items = Items([row["id"] for row in rows], again, total)
    sheet.add(f"decoding/repetition_ratio_{how}", items, unit="ratio", better="lower", n_unit="prompts")


def _put_language(sheet: ScoreSheet, how: str, rows: Sequence[Row], replies: Sequence[Sequence[Reply]]) -> None:
    """Each reply with letters enough to tell counts one; replies to one prompt are a family."""
    told = [
        (f"{row['id']}#{number}", row, letters(reply.text) >= MIN_LETTERS, is_in_language(reply.text, row["language"]))
        for row, those in zip(rows, replies, strict=True)
        for number, reply in enumerate(those)
        if row["language"] in KNOWN
    ]
    families = [row["id"] for _, row, _, _ in told] if how == "sampled" else None
    items = Items(
        [one for one, _, _, _ in told], [float(can and is_so) for _, _, can, is_so in told],
        [float(can) for _, _, can, _ in told], families,
    )  # fmt: skip
    languages = [row["language"] for _, row, _, _ in told]
    sheet.add_groups(f"decoding/language_{how}", items, languages, unit="share", better="higher", n_unit="replies")


def _facts(bench: Bench, config: DecodingConfig) -> list[dict[str, Any]]:
    return [] if config.facts is None else margins.chosen(list(read_facts(bench.inputs["facts"])), config.facts)


def _put_said(
    sheet: ScoreSheet, bench: Bench, facts: Sequence[Row], config: DecodingConfig, sampling: Sampling
) -> None:
    """Facts are continued as documents, so that what is known, recalled and said is asked in the same words."""
    longest = max(len(encode_text(bench.tokenizer, f" {fact['correct']}")) for fact in facts) + 2
    prompts = [Prompt(fact["id"], encode_text(bench.tokenizer, fact["prompt"])) for fact in facts]
    replies = _replies(bench, prompts, config, longest, sampling)
    languages = [fact["language"] for fact in facts]
    ids, families = [fact["id"] for fact in facts], [fact["family"] for fact in facts]
    for how, part in (("greedy", slice(0, 1)), ("sampled", slice(1, None))):
        values = [
            math.fsum(says(reply.text, fact["correct"]) for reply in those[part]) / len(those[part])
            for fact, those in zip(facts, replies, strict=True)
        ]
        sheet.add_groups(
            f"decoding/said_{how}", Items(ids, values, families=families), languages,
            unit="share", better="higher", n_unit="facts",
        )  # fmt: skip


def says(text: str, ending: str) -> bool:
    """Whether a continuation begins with ``ending`` as whole words."""
    rest = text.removeprefix(" ").removeprefix(ending)
    return text.removeprefix(" ").startswith(ending) and not (rest[:1].isalnum() or rest.startswith(("-", "'")))


def overlap(first: str, second: str) -> float:
    """Words in common over the mean number of words of the two (F1, each word as often as it stands); 1 for two empty.

    >>> overlap("a b b", "b c")
    0.4
    """
    one, other = Counter(first.split()), Counter(second.split())
    total = sum(one.values()) + sum(other.values())
    return 1.0 if total == 0 else 2 * sum((one & other).values()) / total


def repeated(text: str) -> tuple[int, int]:
    """How many runs of ``NGRAM`` words stand earlier in the same text already, and how many there are."""
    words = text.split()
    runs = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return len(runs) - len(set(runs)), len(runs)
