"""Preference pairs in ids: prompts and answers by the chat template, truncation and exclusion counted, never silent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data.chat import render

PAD_MULTIPLE = 32
"""Lengths of batches are multiples of this. A row's result is then the same to the last bit in whatever batch it is:
matrix products of ragged sizes end in other kernels."""


@dataclasses.dataclass(frozen=True)
class TokenPair:
    """One pair in ids; an answer ends with the stop token unless it was truncated."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    category: str
    language: str
    template: str

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the chosen and of the rejected answer."""
        return len(self.chosen_ids), len(self.rejected_ids)


@dataclasses.dataclass(frozen=True)
class TokenisedPairs:
    """Pairs that can be trained on, and counts of what was done to the others.

    ``counts`` has ``truncated_answers``; and pairs left out: ``long_prompts`` (no room for an answer),
    ``equal_answers`` (the same once truncated), ``merged_prompts`` (the answer's first token holds the prompt's end).
    """

    pairs: list[TokenPair]
    counts: dict[str, int]

    @property
    def digest(self) -> str:
        """SHA-256 over the ids of all pairs, in order."""
        content = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in self.pairs]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


COUNTED = ("truncated_answers", "long_prompts", "equal_answers", "merged_prompts")


def tokenise(tokenizer: Any, rows: Iterable[Mapping[str, Any]], max_length: int) -> TokenisedPairs:
    """Pairs of ``rows`` with prompt and answer of at most ``max_length`` tokens (the start is kept), shortest first."""
    counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
    pairs = []
    for row in rows:
        prompt = render(tokenizer, row["prompt"], add_generation_prompt=True).ids
        answers = [_answer(tokenizer, row["prompt"], row[side], prompt) for side in ("chosen", "rejected")]
        room = max_length - len(prompt)
        if room < 1:
            counts["long_prompts"] += 1
            continue
        if any(answer is None for answer in answers):
            counts["merged_prompts"] += 1
            continue
        chosen, rejected = (answer[:room] for answer in answers if answer is not None)
        if chosen == rejected:
            counts["equal_answers"] += 1
            continue
        counts["truncated_answers"] += sum(len(answer or []) > room for answer in answers)
        facts = {name: row[name] for name in ("id", "category", "language", "template")}
        pairs.append(TokenPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, **facts))
    # Neighbours of like length: batches that are scored in order are padded little.
    pairs.sort(key=lambda pair: (len(pair.prompt_ids) + max(pair.lengths), pair.id))
    return TokenisedPairs(pairs, dict(counts))


def collator(pad_token_id: int) -> Any:
    """TRL's collator of pairs: chosen rows, then rejected rows, padded to the right."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    return DataCollatorForPreference(pad_token_id=pad_token_id, pad_to_multiple_of=PAD_MULTIPLE)


def columns(pairs: Sequence[TokenPair]) -> dict[str, list[Any]]:
    """The columns that TRL's collator reads."""
    return {name: [getattr(pair, name) for pair in pairs] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def _answer(tokenizer: Any, prompt: Sequence[Any], answer: Sequence[Any], prompt_ids: list[int]) -> list[int] | None:
    """Ids that the assistant has to say after ``prompt_ids``; None where the whole is not a continuation of them."""
    whole = render(tokenizer, [*prompt, *answer])
    end = max((place for place, said in enumerate(whole.assistant_mask) if said), default=-1) + 1
    if whole.ids[: len(prompt_ids)] != prompt_ids:
        return None
    # What the template writes after the stop token is nobody's answer.
    return whole.ids[len(prompt_ids) : end]
