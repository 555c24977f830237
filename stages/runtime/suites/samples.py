"""Replies to fixed prompts, greedy and sampled with a fixed seed: to be read, not scored."""

from __future__ import annotations

from model.decode import Sampling
from stages.runtime.suites.bench import Bench, greedy
from stages.runtime.suites.config import DEFAULT_PROMPTS, SamplesConfig
from stages.runtime.suites.scores import SuiteResult

VERSION = 2


def run(bench: Bench, config: SamplesConfig) -> SuiteResult:
    """Two replies a prompt; nothing is scored."""
    asked = DEFAULT_PROMPTS if config.prompts is None else {key: ("", text) for key, text in config.prompts.items()}
    messages = {key: [{"role": "user", "content": text}] for key, (_, text) in asked.items()}
    prompts = bench.prompts("samples", list(messages.items()), config.max_new_tokens)
    likeliest = {**greedy(config.max_new_tokens), "seed": None}
    sampled = {**likeliest, "temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
    samples = []
    for name, decoding in (("greedy", likeliest), ("sampled", sampled)):
        sampling = Sampling(decoding["temperature"], decoding["top_p"])
        replies = bench.replies(prompts, config.max_new_tokens, sampling, decoding["seed"])
        for prompt, reply in zip(prompts, replies, strict=True):
            samples.append({
                "id": f"{prompt.id}/{name}", "language": asked[prompt.id][0], "prompt": messages[prompt.id],
                "decoding": decoding, "completion": reply.text, "tokens": reply.tokens,
                "finished": reply.stopped,
            })  # fmt: skip
    return SuiteResult([], {}, sorted(samples, key=lambda sample: list(asked).index(sample["id"].rsplit("/", 1)[0])))
