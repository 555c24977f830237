"""Rollouts: what the policy answers, by our own cached decoding, drawn the same whenever a step is run again.

The same text goes through the same template, sampler and scoring here, in probes, in training and in measurements.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from data.chat import REPLY_ENDS, render
from data.rewards import is_correct, total
from data.tasks import demonstration
from data.tokenizer import encode_texts
from model.decode import Sampling, generate
from stages.runtime import distributed


class Rollout(NamedTuple):
    """One completion: ids with the end token where it was drawn, their log-probabilities, and what it earned."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    finished: bool
    text: str
    reward: float
    correct: bool


class Roller:
    """Samples and scores completions.

    Args:
        tokenizer: the parent's.
        rewards: weight of each reward.
        max_completion_length: longest completion, tokens.
        temperature: of sampling; measurements are greedy.
        autocast: the context in which the trainer runs its forward passes, so that both see the same arithmetic (T10).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        rewards: Mapping[str, float],
        max_completion_length: int,
        temperature: float,
        autocast: Any = contextlib.nullcontext,
    ) -> None:
        self.tokenizer, self.rewards = tokenizer, rewards
        self.max_completion_length, self.temperature = max_completion_length, temperature
        self.autocast = autocast
        self._ends = [tokenizer.convert_tokens_to_ids(end) for end in REPLY_ENDS]
        self._encoded: dict[str, list[int]] = {}

    def encode(self, row: Mapping[str, Any]) -> list[int]:
        """Ids of a row's prompt, the assistant's turn opened."""
        if row["id"] not in self._encoded:
            self._encoded[row["id"]] = render(self.tokenizer, row["prompt"], add_generation_prompt=True).ids
        return self._encoded[row["id"]]

    def longest_answer(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Tokens of the longest worked answer of ``rows``, the end of the turn included."""
        replies = [demonstration(row)[-1]["content"] for row in rows]
        return max(map(len, encode_texts(self.tokenizer, replies))) + 1

    def sample(
        self, model: Any, rows: Sequence[Mapping[str, Any]], *, group: int, generator: torch.Generator
    ) -> list[Rollout]:
        """``group`` completions of each row, side by side, in the rows' order."""
        sampling = Sampling(temperature=self.temperature)
        return self._decode(model, rows, group, sampling, generator)

    def greedy(self, model: Any, rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[Rollout]:
        """The likeliest completion of each row, ``batch_size`` at a time; a pure function of the weights."""
        found: list[Rollout] = []
        for start in range(0, len(rows), batch_size):
            found += self._decode(model, rows[start : start + batch_size], 1, Sampling(), None)
        return found

    def _decode(
        self,
        model: Any,
        rows: Sequence[Mapping[str, Any]],
        group: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> list[Rollout]:
        prompts = [self.encode(row) for row in rows]
        with self.autocast():
            completions = generate(
                model,
                prompts,
                num_return_sequences=group,
                max_new_tokens=self.max_completion_length,
                eos_token_ids=self._ends,
                sampling=sampling,
                generator=generator,
            )
        return [
            self._scored(row, prompt, completion)
            for row, prompt, completion in zip(
                _repeated(rows, group), _repeated(prompts, group), completions, strict=True
            )
        ]

    def _scored(self, row: Mapping[str, Any], prompt: list[int], completion: Any) -> Rollout:
        """A completion that never stops has given no final answer, whatever it says."""
        ended = bool(completion.tokens) and completion.tokens[-1] in self._ends
        # Specials before the end are part of what was said: passed over, they would leave an exact answer.
        text = self.tokenizer.decode(completion.tokens[:-1] if ended else completion.tokens)
        earned = total(self.rewards, text, row) if completion.finished else 0.0
        return Rollout(
            prompt_ids=prompt,
            completion_ids=completion.tokens,
            logprobs=completion.logprobs,
            finished=completion.finished,
            text=text,
            reward=earned,
            correct=completion.finished and is_correct(text, row),
        )


def generator_of(device: Any, *names: int | str) -> torch.Generator:
    """A generator that only ``names`` decide (seed, purpose, step, rank), so that a resumed run draws the same (T6)."""
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8]) % 2**63)


def groups_of(rollouts: Sequence[Rollout], group: int) -> list[Sequence[Rollout]]:
    """Rollouts of the same question together."""
    return [rollouts[start : start + group] for start in range(0, len(rollouts), group)]


def is_informative(group: Sequence[Rollout]) -> bool:
    """Whether the completions of one question earned different rewards; otherwise every advantage is zero."""
    return len({rollout.reward for rollout in group}) > 1


def gathered(items: list[Any]) -> list[Any]:
    """The items of all ranks, rank by rank; collective, for small things."""
    if distributed.world_size() == 1:
        return items
    parts: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def _repeated(items: Sequence[Any], times: int) -> Iterator[Any]:
    return (item for item in items for _ in range(times))
