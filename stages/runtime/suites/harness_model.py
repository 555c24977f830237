"""Our model behind lm-evaluation-harness's interface: likelihoods of continuations, and greedy replies."""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data.chat import render
from data.tokenizer import END_OF_TEXT, encode_text, token_byte_strings
from stages.base import ConfigError, Fault
from stages.runtime.suites.bench import Bench, Prompt
from stages.runtime.suites.config import DEFAULT_NEW_TOKENS


class HarnessModel(LM):
    """Every text begins as a document does in training, with its own first token, and nothing before it.

    Where that very token is to be scored (an empty context, a whole text) the end of a document stands before it, since
    something must: no model has learned what follows one, so such a token costs more than it should.
    """

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation after its context, and whether it is the greedy one."""
        scored = self.bench.score([self._row(*request.args) for request in requests])
        return [(-float(one.nats.sum()), one.is_greedy) for one in scored]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-probability (nats) of whole texts, each token given as much before it as the model is made for."""
        rows, owners = [], []
        for owner, request in enumerate(requests):
            for context, targets in self._windows(request.args[0]):
                rows.append(([*context, *targets], len(context)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, scored in zip(owners, self.bench.score(rows), strict=True):
            totals[owner] -= float(scored.nats.sum())
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy continuations, cut before the first of the strings in ``until``.

        With ``as_chat`` among the keyword arguments the context is a user's message and the continuation the reply.

        Raises:
            ConfigError: for a task that asks for sampled continuations.
        """
        if any(request.args[1].get("do_sample") and request.args[1].get("temperature") for request in requests):
            message = "must be tasks that decode greedily; got one that samples; leave it out, or use suite decoding"
            raise ConfigError(Fault("suites.harness.tasks", message))
        found: list[str] = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            by_length.setdefault(int(request.args[1].get("max_gen_toks", DEFAULT_NEW_TOKENS)), []).append(number)
        for max_new_tokens, numbers in sorted(by_length.items()):
            prompts = [self._prompt(str(number), requests[number].args, max_new_tokens) for number in numbers]
            for number, reply in zip(numbers, self.bench.replies(prompts, max_new_tokens), strict=True):
                found[number] = _cut(reply.text, requests[number].args[1].get("until") or [])
        return found

    def _row(self, context: str, continuation: str) -> tuple[list[int], int]:
        start = [] if context else [self.bench.specials[END_OF_TEXT]]
        whole = encode_text(self.bench.tokenizer, context + continuation)
        table, reached, first = token_byte_strings(self.bench.tokenizer), 0, 0
        while first < len(whole) and reached < len(context.encode()):
            reached += len(table[whole[first]])
            first += 1
        if first == len(whole) or reached > len(context.encode()):
            # A token lies across the boundary: what is asked for is the continuation's own tokens.
            before = encode_text(self.bench.tokenizer, context)
            whole, first = [*before, *encode_text(self.bench.tokenizer, continuation)], len(before)
        ids, first = [*start, *whole], first + len(start)
        # What does not fit is cut from the left, the continuation never.
        cut = max(0, min(len(ids) - self.bench.max_seq_len, first - 1))
        return ids[cut:], first - cut

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=encode_text(self.bench.tokenizer, text),
            prefix_token=self.bench.specials[END_OF_TEXT],
            max_seq_len=self.bench.max_seq_len,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _prompt(self, name: str, asked: tuple[str, dict[str, Any]], max_new_tokens: int) -> Prompt:
        context, arguments = asked
        if arguments.get("as_chat"):
            messages = [{"role": "user", "content": context}]
            ids = render(self.bench.tokenizer, messages, add_generation_prompt=True).ids
        else:
            ids = encode_text(self.bench.tokenizer, context) or [self.bench.specials[END_OF_TEXT]]
        return Prompt(name, ids[-max(1, self.bench.max_seq_len - max_new_tokens) :])


def _cut(text: str, until: list[str]) -> str:
    places = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(places)] if places else text
