"""Programs that the model writes, executed in the sandbox: unbiased pass@k, and the share that is Python at all."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from data.problems import continuation, program, read_problems, reply_code
from data.tokenizer import encode_text
from model.decode import Sampling
from stages.base import ConfigError, Fault
from stages.runtime.sandbox import Outcome, Sandbox, SandboxError, open_sandbox
from stages.runtime.suites.bench import Bench, Prompt, Reply, greedy
from stages.runtime.suites.code_config import CodeConfig
from stages.runtime.suites.dealing import dealt
from stages.runtime.suites.scores import Items, ScoreSheet, SuiteResult, content_hash

VERSION = 1
SHOWN = 3
"""Problems a source whose first program is shown."""
_BATCH = 16
Problem = Mapping[str, str]


class Tried(NamedTuple):
    """What the model wrote for one problem, and what became of each program."""

    problem: Problem
    codes: list[str]
    replies: list[Reply]
    outcomes: list[Outcome]


def run(bench: Bench, config: CodeConfig) -> SuiteResult:
    """``code/<source>/pass_at_<k>`` and ``code/<source>/valid_python``; the sandbox's level stands in the settings.

    Raises:
        ConfigError: where no sandbox can be had, or no prompt fits.
    """
    problems = chosen(list(read_problems(bench.inputs["problems"])), config.problems)
    problems, replies = _replies(bench, problems, config)
    written = [[code_of(problem, reply, config.style) for reply in those]
               for problem, those in zip(problems, replies, strict=True)]  # fmt: skip
    level, outcomes = _executed([(problem, code) for problem, codes in zip(problems, written, strict=True)
                                 for code in codes], config)  # fmt: skip
    found = iter(outcomes)
    tried = [Tried(*one, [next(found) for _ in one[1]]) for one in zip(problems, written, replies, strict=True)]
    sheets, samples = [], []
    for source, those in groupby(
        sorted(tried, key=lambda one: one.problem["source"]), lambda one: one.problem["source"]
    ):
        rows = list(those)
        sheets.append(_sheet(source, rows, config, level))
        samples += [_sample(one, config) for one in rows[:SHOWN]]
        _print(source, rows, level)
    return SuiteResult(
        [score for sheet in sheets for score in sheet.scores],
        {name: items for sheet in sheets for name, items in sheet.items.items()},
        samples,
    )


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that one of ``k`` programs drawn from ``n``, of which ``correct`` pass, passes.

    1 - C(n - c, k) / C(n, k): unbiased, which 1 - (1 - c / n)**k is not (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    Raises:
        ValueError: for a ``k`` beyond ``n``, of which no estimate exists.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"k must be from 1 to n, correct from 0 to n; got k {k}, correct {correct} of n {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def chosen(problems: Sequence[Problem], per_source: int | None) -> list[Problem]:
    """The first ``per_source`` of each source."""
    taken: Counter[str] = Counter()
    kept = []
    for problem in problems:
        taken[problem["source"]] += 1
        if per_source is None or taken[problem["source"]] <= per_source:
            kept.append(problem)
    return kept


def code_of(problem: Problem, reply: Reply, style: str) -> str:
    """What of a reply is put behind the problem's prompt and executed."""
    return reply_code(problem, reply.text) if style == "chat" else continuation(problem, reply.text)


def _replies(bench: Bench, problems: Sequence[Problem], config: CodeConfig) -> tuple[list[Problem], list[list[Reply]]]:
    """Those of the problems whose prompt fits, each with its replies."""
    prompts = {prompt.id: prompt for prompt in _prompts(bench, problems, config)}
    kept = [problem for problem in problems if problem["id"] in prompts]
    numbered = [
        Prompt(f"{problem['id']}#{number}", prompts[problem["id"]].ids)
        for problem in kept
        for number in range(config.samples)
    ]
    is_greedy = config.temperature == 0
    sampling = None if is_greedy else Sampling(config.temperature, config.top_p)
    drawn = iter(bench.replies(numbered, config.max_new_tokens, sampling, None if is_greedy else config.seed))
    return kept, [[next(drawn) for _ in range(config.samples)] for _ in kept]


def _prompts(bench: Bench, problems: Sequence[Problem], config: CodeConfig) -> list[Prompt]:
    if config.style == "chat":
        asked = [(problem["id"], [{"role": "user", "content": problem["question"]}]) for problem in problems]
        return bench.prompts("code", asked, config.max_new_tokens)
    room = bench.max_seq_len - config.max_new_tokens
    rendered = [Prompt(one["id"], encode_text(bench.tokenizer, one["prompt"])) for one in problems]
    kept = [prompt for prompt in rendered if len(prompt.ids) <= room]
    if not kept:
        message = (
            f"must leave room for a prompt in model.max_seq_len {bench.max_seq_len}; got {config.max_new_tokens} and "
            f"{len(rendered)} prompts, none of which fits; set less"
        )
        raise ConfigError(Fault("suites.code.max_new_tokens", message))
    if len(kept) < len(rendered):
        lost = len(rendered) - len(kept)
        print(f"code: {lost} of {len(rendered)} prompts are longer than {room} tokens and left out", flush=True)
    return kept


def _executed(programs: Sequence[tuple[Problem, str]], config: CodeConfig) -> tuple[str, list[Outcome]]:
    """The sandbox's level, and each program's outcome; the ranks share the work, and must share the level."""
    batches = [programs[start : start + _BATCH] for start in range(0, len(programs), _BATCH)]
    with contextlib.ExitStack() as held:

        @functools.cache
        def opened() -> Sandbox:
            sandbox = held.enter_context(open_sandbox(config.sandbox, config.limits()))
            print(sandbox.described(), flush=True)
            return sandbox

        def work(batch: Sequence[tuple[Problem, str]]) -> tuple[str, list[Outcome]]:
            # Within what is dealt out, so that a rank without a sandbox leaves none of the others waiting.
            try:
                found = opened().run_all([program(problem, code) for problem, code in batch], config.workers)
            except SandboxError as error:
                raise ConfigError(Fault("suites.code.sandbox", str(error))) from error
            return opened().level, found

        parts = dealt(batches, work)
    levels = sorted({level for level, _ in parts})
    if len(levels) > 1:
        message = f"must be the same on every rank; got {', '.join(levels)}; name one"
        raise ConfigError(Fault("suites.code.sandbox", message))
    return levels[0], [outcome for _, outcomes in parts for outcome in outcomes]


def _sheet(source: str, rows: Sequence[Tried], config: CodeConfig, level: str) -> ScoreSheet:
    settings = {
        "sandbox": level, "python": f"{sys.version_info.major}.{sys.version_info.minor}", "style": config.style,
        "cpu_s": config.cpu_s, "memory_bytes": config.memory_bytes,
    }  # fmt: skip
    set_hash = content_hash([[dict(one.problem) for one in rows], config.style])
    sheet = ScoreSheet("code", VERSION, set_hash, settings, decoding(config))
    ids, n = [one.problem["id"] for one in rows], config.samples
    passed = [sum(outcome.passed for outcome in one.outcomes) for one in rows]
    for k in sorted(set(config.k)):
        values = Items(ids, [pass_at_k(n, correct, k) for correct in passed])
        sheet.add(f"code/{source}/pass_at_{k}", values, unit="share", better="higher", n_unit="problems")
    valid = Items(ids, [sum(outcome.verdict != "syntax" for outcome in one.outcomes) / n for one in rows])
    sheet.add(f"code/{source}/valid_python", valid, unit="share", better="higher", n_unit="problems")
    return sheet


def decoding(config: CodeConfig) -> dict[str, Any]:
    """The decoding settings, as scores and samples state them."""
    likeliest = greedy(config.max_new_tokens)
    if config.temperature == 0:
        return likeliest
    drawn = {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
    return {**likeliest, **drawn, "samples": config.samples}


def _sample(one: Tried, config: CodeConfig) -> dict[str, Any]:
    """The problem's first program, to be read, with what became of it."""
    outcome = one.outcomes[0]
    return {
        "id": f"code/{one.problem['id']}", "language": "code",
        "prompt": [{"role": "user", "content": one.problem["question" if config.style == "chat" else "prompt"]}],
        "decoding": decoding(config), "completion": one.codes[0], "tokens": one.replies[0].tokens,
        "finished": one.replies[0].tokens < config.max_new_tokens,
        "outcome": f"{outcome.verdict} {outcome.detail}".strip(),
    }  # fmt: skip


def _print(source: str, rows: Sequence[Tried], level: str) -> None:
    verdicts = Counter(f"{outcome.verdict} {outcome.detail}".strip() for one in rows for outcome in one.outcomes)
    shown = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.most_common(6))
    print(f"code/{source}: {sum(verdicts.values())} programs in the sandbox {level}: {shown}", flush=True)
