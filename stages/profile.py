"""The profile stage: tokens of a corpus by language and domain, and what to collect next, given what a model knows."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from data.domains import DOMAINS
from stages.base import ConfigError, Fault, Input, Stage, StageConfig, StageContext, StageResult, operational

if TYPE_CHECKING:
    from data.profile import Advice, Cell, Declared, Margin, Pair

FORMAT = 2
PROFILE_FILE = "profile.json"
FACT_DOMAINS = {
    **dict.fromkeys(("capital", "continent", "country_name"), "geography"),
    **dict.fromkeys(("language", "language_name", "currency_name"), "society"),
    **dict.fromkeys(("weekday", "month", "opposite", "colour"), "everyday"),
    **dict.fromkeys(("symbol", "young_animal"), "science"),
    "sum": "mathematics",
}
"""Domain of text by domain of facts; a domain of facts that is called like one of text stands for itself."""
_NAMED = 8
"""Cells that the summary's last line names; all are in the table above it."""
_MARGINS = "margins/nats_per_token"


class ProfileConfig(StageConfig):
    """What is counted, and whose knowledge it is held against."""

    kind: Literal["profile"]
    """Tokens by language and domain."""
    corpus: str
    """The ``clean`` stage whose training text is classified."""
    tokenizer: str
    """The ``tokenizer`` stage whose tokens are counted."""
    scores: str | None = None
    """An ``evaluate`` stage with the suite ``margins``: its margins by domain say which cells the model knows."""
    sample_bytes: int = Field(20_000_000, ge=10_000, le=1_000_000_000_000)
    """About so much text of each source is classified; what is more is estimated from it."""
    scarce_share: float = Field(0.02, gt=0, lt=1)
    """A domain with less of its language's tokens than this is scarce."""
    min_facts: int = Field(10, ge=1, le=10_000_000)
    """Fewest facts of a language and domain whose margin is judged; of fewer only that is said. With eight or fewer,
    one exception leaves even a sign test undecided at 5%."""
    fact_domains: dict[str, str] = Field({})
    """Domain of text by domain of facts, beside those that are known (``capital: geography``)."""
    progress_seconds: float = operational(10.0, gt=0, le=86_400)
    """Seconds between lines of progress."""


class Profile(Stage):
    """Classifies a corpus; the output is ``profile.json``."""

    kind: ClassVar[str] = "profile"
    Config: ClassVar[type[StageConfig]] = ProfileConfig
    code_version: ClassVar[int] = 2
    produces: ClassVar[str] = "profile"
    inputs: ClassVar[dict[str, Input]] = {
        "corpus": Input(produces="corpus"),
        "tokenizer": Input(produces="tokenizer"),
        "scores": Input(produces="scores", optional=True),
    }

    @classmethod
    def check(cls, config: ProfileConfig, model: Any) -> list[Fault]:
        """Facts are mapped to domains that there are."""
        return [
            Fault(f"fact_domains.{name}", f"must be one of {', '.join(DOMAINS)}; got {domain!r}; name one of them")
            for name, domain in config.fact_domains.items()
            if domain not in DOMAINS
        ]

    @classmethod
    def check_parents(cls, config: ProfileConfig, model: Any, parents: Mapping[str, Path]) -> list[Fault]:
        """The evaluation measured margins."""
        if "scores" not in parents or _margin_items(parents["scores"]) is not None:
            return []
        return [
            Fault("scores", f"must have run the suite margins; {config.scores} has not; add it or leave scores out")
        ]

    @classmethod
    def plan(cls, config: ProfileConfig, model: Any, world_size: int) -> dict[str, Any]:
        """How much of each source is read closely."""
        return {"sample_bytes_per_source": config.sample_bytes}

    def run(self, context: StageContext) -> StageResult:
        """Classify, count, hold against the margins, and write ``profile.json``."""
        from data.profile import advise, profile_corpus, unmatched

        config = context.config
        context.output.mkdir(parents=True, exist_ok=True)
        cells, declared = profile_corpus(
            context.parent_output("corpus"),
            context.parent_output("tokenizer"),
            sample_bytes=config.sample_bytes,
            seed=context.seed,
            progress_seconds=config.progress_seconds,
        )
        if not cells:
            raise ConfigError(Fault("sample_bytes", "must draw documents; got none; raise it"))
        margins, unmapped = _margins(context, config.fact_domains)
        advice = advise(cells, margins, config.scarce_share, config.min_facts)
        content = {
            "format": FORMAT,
            "scarce_share": config.scarce_share,
            "min_facts": config.min_facts,
            "cells": [{**dataclasses.asdict(cell), "half_width_tokens": cell.half_width_tokens} for cell in cells],
            "declared": [{**dataclasses.asdict(one), "classified_shares": one.shares} for one in declared],
            "advice": [{**dataclasses.asdict(one), "told": one.told} for one in advice],
            "unmapped_fact_domains": unmapped,
            "measured_languages_without_text": unmatched(margins, cells),
        }
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (context.output / PROFILE_FILE).write_text(text, encoding="utf-8")
        verdicts = [one.verdict for one in advice]
        counts = {
            f"cells_{name.split(':')[0].replace(' ', '_')}": verdicts.count(name) for name in sorted(set(verdicts))
        }
        summary = [*_summary(cells, advice, unmapped), *_declared_lines(declared)]
        return StageResult({"tokens": sum(cell.tokens for cell in cells), **counts}, summary)


def _margin_items(artifact: Path) -> dict[str, Any] | None:
    """The facts' ids and margins in an evaluation, none where it has none."""
    items = json.loads((artifact / "output" / "items.json").read_text(encoding="utf-8"))
    found = items.get(_MARGINS)
    return None if found is None else dict(found)


def _margins(context: StageContext, added: Mapping[str, str]) -> tuple[dict[Pair, Margin], list[str]]:
    """Margins by language and domain of text, and the domains of facts that no domain of text stands for."""
    from data.profile import Margin
    from stages.runtime.suites.intervals import ratio_interval

    items = _margin_items(context.parents["scores"]) if "scores" in context.parents else None
    if items is None:
        return {}, []
    known = {**{name: name for name in DOMAINS}, **FACT_DOMAINS, **added}
    grouped: dict[Pair, list[int]] = {}
    unmapped = set()
    for index, one in enumerate(items["ids"]):
        # A fact's id is its domain, its language and a hash.
        domain, language, _ = one.rsplit("-", 2)
        if domain in known:
            grouped.setdefault((language, known[domain]), []).append(index)
        else:
            unmapped.add(domain)
    margins = {}
    for pair, places in grouped.items():
        ids, values = ([items[name][place] for place in places] for name in ("ids", "numerator"))
        families = [items["families"][place] for place in places] if items.get("families") else None
        margins[pair] = Margin(sum(values) / len(values), len(values), ratio_interval(ids, values, None, families))
    return margins, sorted(unmapped)


def _summary(cells: Sequence[Cell], advice: Sequence[Advice], unmapped: Sequence[str]) -> list[str]:
    from data.profile import COLLECT, SCARCE

    lines = ["language  domain       tokens        +/-    of its language  documents read  margin (n)      verdict"]
    spread = {(cell.language, cell.domain): cell.half_width_tokens for cell in cells}
    read: dict[Pair, int] = {}
    for cell in cells:
        pair = (cell.language, cell.domain)
        read[pair] = read.get(pair, 0) + cell.sampled_documents
    for one in sorted(advice, key=lambda one: (one.language, -one.tokens)):
        pair = (one.language, one.domain)
        margin = f"{one.margin.nats_per_token:+.2f} ({one.margin.n})" if one.margin else "-"
        size = f"{one.tokens:>11,.0f}  {spread.get(pair, 0):>7,.0f}  {one.share:>14.1%}  {read.get(pair, 0):>14,}"
        lines.append(f"{one.language:<8}  {one.domain:<11}  {size}  {margin:<14}  {one.told}")
    wanted = _in_turn([one for one in advice if one.verdict in (COLLECT, SCARCE)])
    more = f", and {len(wanted) - _NAMED} more" if len(wanted) > _NAMED else ""
    lines.append(f"collect next: {', '.join(wanted[:_NAMED]) or 'nothing is scarce or weak'}{more}")
    if unmapped:
        lines.append(f"facts of no known domain: {', '.join(unmapped)}; say in fact_domains what they belong to")
    return lines


def _in_turn(advice: Sequence[Advice]) -> list[str]:
    """``language/domain`` of each, the languages by turns: the domains of one may be more than a line names."""
    waiting: dict[str, list[str]] = {}
    for one in advice:
        waiting.setdefault(one.language, []).append(f"{one.language}/{one.domain}")
    return [name for turn in itertools.zip_longest(*waiting.values()) for name in turn if name is not None]


def _declared_lines(declared: Sequence[Declared]) -> list[str]:
    """Each source's declared domain beside what the classifier makes of its text: neither replaces the other unseen."""
    lines = []
    for one in declared:
        shares = list(one.shares.items())
        found = ", ".join(f"{domain} {share:.0%}" for domain, share in shares[:3])
        more = f", {len(shares) - 3} more" if len(shares) > 3 else ""
        taken = "counted as declared" if one.believed else "which is no domain of knowledge: counted as classified"
        lines.append(f"source {one.source} declares {one.domain} ({taken}); classified: {found or 'nothing'}{more}")
    return lines
