"""What every suite works with: the model at rest, likelihoods of given tokens, and replies to conversations.

R rows, T time, D d_model, V vocab_size. Rows are batched in one order that the set alone decides, ``batch_size`` at a
time, and the batches are dealt out to the ranks, so that an evaluation gives the same bits again on one rank or many;
another ``batch_size`` moves a token's nats by rounding alone. Every rank makes the same calls and gets all results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from data import tokenizer as tokenizers
from data.chat import REPLY_ENDS, render
from model.config import HybridConfig
from model.decode import Sampling, generate
from model.lm import HybridForCausalLM, register
from stages.base import ConfigError, Fault
from stages.runtime import distributed
from stages.runtime.manifest import CheckpointError
from stages.runtime.suites.dealing import dealt
from stages.runtime.warm_start import spec_of
from stages.runtime.weights import load_weights

T = TypeVar("T")
_ROUND_TOKENS = 16
_SMALL_PARAMETERS = 30_000_000


class Scored(NamedTuple):
    """Nats of each scored token of one row, and how many tokens were likelier at the worst of their places."""

    nats: np.ndarray
    worst_rank: int

    @property
    def is_greedy(self) -> bool:
        """Whether each token was the likeliest at its place: greedy decoding would have said all of them."""
        return self.worst_rank == 0


class Reply(NamedTuple):
    """One reply: its text, its tokens without the end, and how it ended.

    ``stopped`` is true where it ended by itself, by either of ``REPLY_ENDS``; ``closes_turn`` where it did so as the
    template has it; ``is_clean`` where its tokens hold no other special and are UTF-8.
    """

    text: str
    tokens: int
    stopped: bool
    is_clean: bool
    closes_turn: bool


class Prompt(NamedTuple):
    """A conversation to be answered, in ids; a sampled reply is drawn by the id, so each sample has its own."""

    id: str
    ids: list[int]


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model ready to be measured, with its tokenizer and the folders of the sets by input."""

    model: HybridForCausalLM
    tokenizer: Any
    specials: Mapping[str, int]
    device: torch.device
    precision: str
    batch_size: int
    inputs: Mapping[str, Path]

    @property
    def max_seq_len(self) -> int:
        """The longest sequence the model is made for."""
        return int(self.model.config.spec.max_seq_len)

    @property
    def ends(self) -> list[int]:
        """Ids that end a reply."""
        return [self.specials[end] for end in REPLY_ENDS]

    def score(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[Scored]:
        """``(ids, first)`` rows to the nats of the tokens from ``first`` on, each given all before it.

        Raises:
            ValueError: for a ``first`` below 1, since a first token has nothing before it.
        """
        if any(not 1 <= first <= len(ids) for ids, first in rows):
            raise ValueError("field first must be between 1 and the row's length; got one beyond; prepend a token")
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
        return self._dealt(order, lambda batch: self._score_batch([rows[index] for index in batch]))

    def _dealt(self, order: Sequence[int], work: Callable[[Sequence[int]], Sequence[T]]) -> list[T]:
        """``work`` of ``batch_size`` indices at a time in ``order``, its results by index."""
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        parts = dealt(batches, work)
        found: dict[int, T] = {}
        for batch, part in zip(batches, parts, strict=True):
            found.update(zip(batch, part, strict=True))
        return [found[index] for index in range(len(order))]

    @torch.no_grad()
    def _score_batch(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[Scored]:
        width = -(-len(rows[0][0]) // _ROUND_TOKENS) * _ROUND_TOKENS
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        for row, (ids, _) in zip(input_ids, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        positions = torch.arange(width).expand(len(rows), -1)
        with self.arithmetic():
            # Padding stands at the end, where no scored token can see it.
            hidden = self.model.model(
                input_ids=input_ids.to(self.device), position_ids=positions.to(self.device),
                seq_idx=torch.zeros_like(input_ids, dtype=torch.int32).to(self.device),
            ).last_hidden_state  # fmt: skip
            # Row by row, so that only one row's logits are held and their arithmetic knows of no other row.
            return [
                _scored(self.model.lm_head(row[first - 1 : len(ids) - 1]), ids[first:])
                for row, (ids, first) in zip(hidden, rows, strict=True)
            ]

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of matrix products."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def prompts(
        self, suite: str, conversations: Sequence[tuple[str, Sequence[Mapping[str, str]]]], max_new_tokens: int
    ) -> list[Prompt]:
        """Conversations ``(id, messages)`` in ids; those that leave no room for ``max_new_tokens`` are left out, aloud.

        Raises:
            ConfigError: when none is left.
        """
        room = self.max_seq_len - max_new_tokens
        rendered = [
            Prompt(one, render(self.tokenizer, list(messages), add_generation_prompt=True).ids)
            for one, messages in conversations
        ]
        kept = [prompt for prompt in rendered if len(prompt.ids) <= room]
        if not kept:
            message = (
                f"must leave room for a prompt in model.max_seq_len {self.max_seq_len}; got {max_new_tokens} and "
                f"{len(rendered)} prompts, none of which fits; set less, or choose other prompts"
            )
            raise ConfigError(Fault(f"suites.{suite}.max_new_tokens", message))
        if len(kept) < len(rendered) and distributed.rank() == 0:
            lost = len(rendered) - len(kept)
            print(f"{suite}: {lost} of {len(rendered)} prompts are longer than {room} tokens and left out")
        return kept

    def replies(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int | None = None,
    ) -> list[Reply]:
        """A reply to each prompt by cached decoding, greedy unless ``sampling`` and ``seed`` are given.

        A sampled reply is drawn from its prompt's id and ``seed``: it does not depend on the other prompts.

        Raises:
            ValueError: when two prompts to be sampled share an id.
        """
        if seed is not None and len({prompt.id for prompt in prompts}) < len(prompts):
            raise ValueError("field prompts must have ids of their own to be sampled; got one twice; number them")
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].ids))

        def work(batch: Sequence[int]) -> list[Reply]:
            asked = [prompts[index] for index in batch]
            with self.arithmetic():
                completions = generate(
                    self.model, [prompt.ids for prompt in asked], max_new_tokens=max_new_tokens,
                    eos_token_ids=self.ends, sampling=sampling,
                    generator=None if seed is None else [_generator(seed, prompt.id) for prompt in asked],
                )  # fmt: skip
            return [self._reply(one.tokens) for one in completions]

        return self._dealt(order, work)

    def _reply(self, tokens: list[int]) -> Reply:
        stopped = bool(tokens) and tokens[-1] in self.ends
        closes_turn = bool(tokens) and tokens[-1] == self.specials[tokenizers.IM_END]
        body = tokens[:-1] if stopped else tokens
        raw = tokenizers.decode_bytes(self.tokenizer, body)
        text = raw.decode("utf-8", errors="replace")
        is_clean = text.encode() == raw and not set(body) & set(self.specials.values())
        return Reply(text, len(body), stopped, is_clean, closes_turn)


def greedy(max_new_tokens: int) -> dict[str, Any]:
    """The decoding settings of greedy replies, as scores and samples state them."""
    return {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": max_new_tokens}


def open_bench(
    parent: Path, *, batch_size: int, precision: str, inputs: Mapping[str, Path], digest: str | None = None
) -> Bench:
    """Load the finished model of ``parent`` (its output folder) in fp32, onto a GPU if there is one.

    Raises:
        CheckpointError: for damaged files, weights that do not fit ``config.json``, or an output that is not, or no
            longer, the one of ``digest``.
    """
    # A tokenizer is loaded beside a config.json whose architecture transformers must know.
    register()
    specials = tokenizers.special_ids(parent)
    end, pad = specials[tokenizers.END_OF_TEXT], specials[tokenizers.PAD]
    model = HybridForCausalLM(HybridConfig.from_spec(spec_of(parent), eos_token_id=end, pad_token_id=pad)).float()
    load_weights(parent, model, digest)
    device = torch.device(f"cuda:{distributed.local_rank()}" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    return Bench(model, tokenizers.load(parent), specials, device, precision, batch_size, inputs)


@contextlib.contextmanager
def few_threads(model: torch.nn.Module) -> Iterator[None]:
    """One thread for a small model on a CPU: two wait for each other longer than they work (about tenfold when tiny).

    It also takes the number of cores out of the order in which sums are made, so that machines agree more closely.
    """
    parameter = next(model.parameters())
    threads = torch.get_num_threads()
    is_small = sum(weight.numel() for weight in model.parameters()) < _SMALL_PARAMETERS
    if parameter.device.type == "cpu" and is_small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _scored(logits: torch.Tensor, targets: Sequence[int]) -> Scored:
    """Nats in fp64 from fp32 log-probabilities of ``logits`` (T, V).

    Raises:
        CheckpointError: where a logit is NaN or +inf.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    if logprobs.isnan().any():
        raise CheckpointError("the model's logits must be finite; they are not: it has diverged; measure another one")
    wanted = torch.tensor(list(targets), device=logits.device)
    nats = -logprobs.gather(1, wanted[:, None])[:, 0]
    # Of equal ones the lower id is taken first, as greedy decoding does.
    ids, mine = torch.arange(logits.shape[-1], device=logits.device), -nats[:, None]
    before = (logprobs > mine) | ((logprobs == mine) & (ids < wanted[:, None]))
    return Scored(nats.double().cpu().numpy(), int(before.sum(-1).max()) if len(wanted) else 0)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
