"""The names of the scores that an evaluation will give, known before it runs; a gate on another one can never open.

No torch here: a plan asks. A name that ends in ``*`` stands for parts that are not known yet.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

from data.facts import DIFFICULTIES
from stages.base import Fault
from stages.runtime.gates import GateConfig
from stages.runtime.suites.config import (
    DecodingConfig,
    HarnessConfig,
    MarginsConfig,
    NeedlesConfig,
    Suites,
)
from stages.runtime.suites.languages import KNOWN
from stages.runtime.suites.sets import Prompt, Sets, Source

SAFETY = {"harmful": "safety/refusal", "benign": "safety/over_refusal"}
"""Score by the prompts' category."""
LOCAL_METRICS = {"tasks_local": ("exact_match",), "heldout_local": ("bits_per_byte",)}
"""Metrics of the harness's local tasks that are no multiple choice."""
NO_DIRECTION = ("decoding/agreement", "format/length_tokens")
"""Scores (and their parts) of which neither more nor less is better: nothing can be called a regression."""
CHOICE_METRICS = ("acc", "acc_norm")
_NEAREST, _SHOWN = 3, 12
_WILD = "*?["


def score_names(suites: Suites, sets: Sets) -> list[str]:
    """Every score that ``suites`` give on ``sets``, suite by suite."""
    found: list[str] = []
    if suites.bpb is not None:
        found += _bpb(sets.documents)
    if suites.margins is not None:
        found += _margins(suites.margins, sets.facts)
    if suites.reasoning is not None:
        tasks = ["*"] if sets.questions is None else sorted(sets.questions)
        found += ["reasoning/all", "reasoning/answered", *(f"reasoning/{task}" for task in tasks)]
    if suites.safety is not None:
        found += _safety(sets.prompts)
    if suites.decoding is not None:
        found += _decoding(suites.decoding, sets)
    if suites.format is not None:
        found += [
            name
            for score in ("stop_rate", "template", "length_tokens")
            for name in _grouped(f"format/{score}", sets.conversations)
        ]
    if suites.needles is not None:
        found += _needles(suites.needles)
    if suites.code is not None:
        sources = ["*"] if sets.problems is None else sorted(sets.problems)
        measures = [*(f"pass_at_{k}" for k in sorted(set(suites.code.k))), "valid_python"]
        found += [f"code/{source}/{measure}" for source in sources for measure in measures]
    if suites.harness is not None:
        found += _harness(suites.harness)
    return found


def metric_faults(gates: Sequence[GateConfig], names: Sequence[str]) -> list[Fault]:
    """Gates on a score that is none of ``names``, with the nearest of them; a suite without any is told elsewhere."""
    faults = []
    for number, gate in enumerate(gates):
        suite = gate.metric.partition("/")[0]
        mine = [name for name in names if name.partition("/")[0] == suite]
        if mine and not any(may_fit(name, gate.metric) for name in mine):
            message = f"must be a score that suite {suite} gives; got {gate.metric!r}; {nearest(gate.metric, mine)}"
            faults.append(Fault(f"gates.{number}.metric", message))
        elif gate.max_regression is not None and f"{gate.metric}/".startswith(tuple(f"{one}/" for one in NO_DIRECTION)):
            message = f"must be left out for {gate.metric}, of which neither more nor less is better"
            faults.append(Fault(f"gates.{number}.max_regression", f"{message}; set max or min instead"))
    return faults


def may_fit(name: str, metric: str) -> bool:
    """Whether the score ``name`` (or one of those that it stands for) may be one that ``metric`` asks for."""
    if not name.endswith("*"):
        return fnmatch.fnmatchcase(name, metric)
    known, asked = name[:-1], _literal(metric)
    return asked.startswith(known) or (asked != metric and known.startswith(asked))


def nearest(metric: str, names: Sequence[str]) -> str:
    """The most alike of ``names``, as the end of a message; where none is alike the first few."""
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return near_ones(metric, [name for name in names if not name.endswith("*")]) or f"set one of {shown}"


def near_ones(name: str, names: Sequence[str]) -> str:
    """``did you mean this or that?``; empty where none of ``names`` is alike."""
    near = difflib.get_close_matches(name, names, n=_NEAREST, cutoff=0.7)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _literal(pattern: str) -> str:
    """What stands before the first sign that stands for others."""
    return pattern[: min((pattern.index(sign) for sign in _WILD if sign in pattern), default=len(pattern))]


def _grouped(name: str, groups: Collection[str] | None, whole: bool = True) -> Iterator[str]:
    """``name`` and its parts, which are given where there are several (``ScoreSheet.add_groups``)."""
    if whole:
        yield name
    if groups is None:
        yield f"{name}/*"
    elif len(groups) > 1:
        yield from (f"{name}/{group}" for group in sorted(groups))


def _bpb(documents: Sequence[Source] | None) -> Iterable[str]:
    if documents is None:
        return ["bpb/all", "bpb/*"]
    languages = sorted({source.language for source in documents})
    domains = sorted({source.domain for source in documents} - {""})
    return [
        "bpb/all", *(f"bpb/{language}" for language in languages),
        *(f"bpb/source/{source.name}" for source in documents), *(f"bpb/domain/{domain}" for domain in domains),
    ]  # fmt: skip


def _margins(config: MarginsConfig, facts: Collection[tuple[str, str]] | None) -> Iterator[str]:
    languages = None if facts is None else {language for _, language in facts}
    domains = None if facts is None else {domain for domain, _ in facts}
    for name in ("margins/nats_per_token", "margins/accuracy"):
        yield from _grouped(name, languages)
        yield from _grouped(name, domains, whole=False)
        yield from (f"{name}/{difficulty}" for difficulty in DIFFICULTIES)
    for k in sorted(set(config.top_k)):
        yield from _grouped(f"margins/recall_at_{k}", languages)


def _safety(prompts: Sequence[Prompt] | None) -> Iterator[str]:
    for category, name in SAFETY.items():
        mine = None if prompts is None else [prompt for prompt in prompts if prompt.category == category]
        if mine == []:
            continue
        yield from _grouped(name, None if mine is None else {prompt.language for prompt in mine})
        if mine is not None:
            counts = Counter(prompt.template for prompt in mine)
            yield from (
                f"{name}/{template.rpartition('/')[2]}"
                for template, count in sorted(counts.items())
                if 1 < count < len(mine)
            )


def _decoding(config: DecodingConfig, sets: Sets) -> Iterator[str]:
    languages = sets.conversations
    yield from _grouped("decoding/agreement", languages)
    for how in ("greedy", "sampled"):
        yield f"decoding/repetition_ratio_{how}"
        told = None if languages is None else [language for language in languages if language in KNOWN]
        if told != []:
            yield from _grouped(f"decoding/language_{how}", told)
        if config.facts is not None:
            of_facts = None if sets.facts is None else {language for _, language in sets.facts}
            yield from _grouped(f"decoding/said_{how}", of_facts)


def _needles(config: NeedlesConfig) -> Iterator[str]:
    lengths = [f"length_{length}" for length in dict.fromkeys(config.lengths)]
    depths = [f"depth_{depth:g}" for depth in dict.fromkeys(config.depths)]
    cells = [f"{length}_{depth}" for length in lengths for depth in depths]
    for name in ("needles/accuracy", "needles/exact"):
        yield name
        for groups in (set(config.languages), lengths, depths, cells):
            yield from _grouped(name, groups, whole=False)


def _harness(config: HarnessConfig) -> Iterator[str]:
    for task in config.local:
        yield from (f"harness/{task}/{metric}" for metric in LOCAL_METRICS.get(task, CHOICE_METRICS))
    for own in config.files:
        metrics = CHOICE_METRICS if own.kind == "choice" else ("exact_match",)
        yield from (f"harness/{own.name}/{metric}" for metric in metrics)
    # A name may stand for a group, whose tasks have names of their own that begin alike or not.
    yield from (["harness/*"] if config.tasks else [])
