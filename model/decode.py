"""Cached generation: our own sampler for rollouts and chat, equal to running the whole sequence at every step.

B batch, T time, V vocab_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from model.cache import HybridCache
from model.lm import HybridForCausalLM

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""What sampling draws from: one generator for all rows, or one on the CPU for each row."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: ``temperature`` 0 takes the likeliest; ``top_p`` keeps the smallest set with that mass."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        if self.temperature < 0:
            raise ValueError(f"field temperature must be at least 0; got {self.temperature}; set 0 for greedy decoding")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"field top_p must be in (0, 1]; got {self.top_p}; set 1 to keep every token")


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed one prompt: ``tokens`` with the end token where it was drawn (``finished``), none after it.

    ``logprobs`` holds, for each token, the log-probability, in nats, under the model's softmax at the temperature of
    sampling (at 1 for greedy decoding), before ``top_p`` cuts it.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool


@torch.no_grad()
def generate(
    model: HybridForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    generator: Generators = None,
    prefill_chunk_size: int = 512,
    state_dtype: torch.dtype | None = None,
    num_return_sequences: int = 1,
) -> list[Completion]:
    """Continue each prompt until an end token or ``max_new_tokens``; one ``Completion`` a prompt, in their order.

    With ``num_return_sequences`` each prompt is run once and continued so many times, its completions side by side, as
    if it had been given so many times. Prompts may differ in length; what a prompt gives does not depend on its
    neighbours, except that sampling draws one number a row and step from ``generator``; with a sequence of them,
    one a completion, not even that. Prefill takes ``prefill_chunk_size`` columns at a time, which bounds memory and
    changes nothing else.
    ``state_dtype`` is ``HybridCache``'s.

    Raises:
        ValueError: for an empty prompt, an id beyond the embedding, or sampling without a generator, or without one for
            each completion.
    """
    sampling = sampling or Sampling()
    _check(prompts, model.config.vocab_size, sampling, generator, num_return_sequences)
    input_ids, mask = _left_padded(prompts, model.device)
    cache = HybridCache(state_dtype)
    logits = _prefill(model, input_ids, mask, cache, prefill_chunk_size)
    if num_return_sequences > 1:
        cache.batch_repeat_interleave(num_return_sequences)
        logits = logits.repeat_interleave(num_return_sequences, 0)
    ends = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=model.device)
    finished = torch.zeros(len(logits), dtype=torch.bool, device=model.device)
    drawn, logprobs, counts = [], [], torch.zeros(len(logits), dtype=torch.long, device=model.device)
    for _ in range(max_new_tokens):
        token, logprob = draw(logits, sampling, generator)
        drawn.append(token)
        logprobs.append(logprob)
        counts += ~finished
        finished |= torch.isin(token, ends)
        if len(drawn) == max_new_tokens or bool(finished.all()):
            break
        logits = model(token[:, None], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return _completions(drawn, logprobs, counts.tolist(), finished.tolist())


@torch.no_grad()
def stream(
    model: HybridForCausalLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk_size: int = 512,
    cache: HybridCache | None = None,
) -> Iterator[int]:
    """Continue one prompt, giving each id as soon as it is drawn, the end token included: those of ``generate``.

    A ``cache`` that has taken in the first ids of ``prompt``, in an earlier turn, saves running them again. At every
    moment it holds the prompt and the ids given before the last one, so that it may serve the next turn.

    Raises:
        ValueError: as ``generate``, or when the cache leaves nothing of ``prompt`` to run.
    """
    sampling, cache = sampling or Sampling(), HybridCache() if cache is None else cache
    _check([prompt], model.config.vocab_size, sampling, generator)
    if cache.columns >= len(prompt):
        raise ValueError(f"field cache must hold fewer than the prompt's {len(prompt)} ids; got {cache.columns}")
    input_ids, mask = _left_padded([prompt], model.device)
    logits = _prefill(model, input_ids, mask, cache, prefill_chunk_size)
    for step in range(max_new_tokens):
        token, _ = draw(logits, sampling, generator)
        drawn = int(token)
        yield drawn
        if drawn in eos_token_ids or step == max_new_tokens - 1:
            return
        logits = model(token[:, None], past_key_values=cache, logits_to_keep=1).logits[:, -1]


def draw(logits: Tensor, sampling: Sampling, generator: Generators) -> tuple[Tensor, Tensor]:
    """One token a row from ``logits`` (B, V): ids (B,) and log-probabilities (B,) as ``Completion`` defines them."""
    logprobs = torch.log_softmax(logits.float() / (sampling.temperature or 1.0), -1)
    if sampling.temperature == 0:
        token = logprobs.argmax(-1)
    else:
        token = _inverse_cdf(_nucleus(logprobs.exp(), sampling.top_p), generator)
    return token, logprobs.gather(1, token[:, None])[:, 0]


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """``probabilities`` with all but the likeliest tokens of mass ``top_p`` set to zero, not renormalised."""
    if top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(1, order, ordered.masked_fill(outside, 0.0))


def _inverse_cdf(weights: Tensor, generator: Generators) -> Tensor:
    # One number a row and step: a row's draws do not depend on what the others look like.
    edges = weights.double().cumsum(-1)
    point = _points(len(weights), generator, weights.device)
    chosen = torch.searchsorted(edges, point * edges[:, -1:], right=True)[:, 0]
    return torch.minimum(chosen, _last_positive(weights))


def _points(rows: int, generator: Generators, device: torch.device) -> Tensor:
    """(rows, 1) float64 numbers in [0, 1)."""
    if isinstance(generator, Sequence):
        # Drawn on the CPU, so that a row's numbers are the same on every device.
        drawn = [torch.rand(1, 1, generator=one, dtype=torch.float64) for one in generator]
        return torch.cat(drawn).to(device)
    return torch.rand(rows, 1, generator=generator, device=device, dtype=torch.float64)


def _last_positive(weights: Tensor) -> Tensor:
    """Rounding can put the drawn point on the upper edge; this is the last id that may then be taken."""
    return weights.shape[1] - 1 - (weights > 0).flip(1).to(torch.int8).argmax(1)


def _check(
    prompts: Sequence[Sequence[int]], vocab_size: int, sampling: Sampling, generator: Generators, copies: int = 1
) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("field prompts must be one or more prompts of at least one token; got an empty one")
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= vocab_size:
        raise ValueError(f"field prompts must hold ids from 0 to {vocab_size - 1}; got {low if low < 0 else high}")
    if sampling.temperature > 0 and generator is None:
        raise ValueError("field generator must be given for sampling; got none; set torch.Generator()")
    rows = len(prompts) * copies
    if isinstance(generator, Sequence) and len(generator) != rows:
        raise ValueError(f"field generator must hold one for each of {rows} completions; got {len(generator)}; set one")


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _prefill(model: HybridForCausalLM, input_ids: Tensor, mask: Tensor, cache: HybridCache, chunk_size: int) -> Tensor:
    for start in range(cache.columns, input_ids.shape[1], chunk_size):
        end = min(start + chunk_size, input_ids.shape[1])
        outputs = model(input_ids[:, start:end], mask[:, :end], past_key_values=cache, logits_to_keep=1)
    return outputs.logits[:, -1]


def _completions(
    drawn: list[Tensor], logprobs: list[Tensor], counts: list[int], finished: list[bool]
) -> list[Completion]:
    if not drawn:
        return [Completion([], [], False) for _ in counts]
    tokens, values = torch.stack(drawn, 1).tolist(), torch.stack(logprobs, 1).tolist()
    rows = zip(tokens, values, counts, finished, strict=True)
    return [Completion(row[:count], value[:count], done) for row, value, count, done in rows]
