"""What the sets that suites read are made of: from a recipe before anything runs, from files once they are made.

No torch here: a plan asks as well.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Source(NamedTuple):
    """One source of held-out documents; an undeclared ``domain`` is empty."""

    name: str
    language: str
    domain: str


class Prompt(NamedTuple):
    """One prompt of ``safety``."""

    category: str
    language: str
    template: str


@dataclasses.dataclass(frozen=True)
class Sets:
    """The parts of each set by which scores are given; None of one that is not known yet."""

    documents: Sequence[Source] | None = None
    conversations: Collection[str] | None = None
    """Languages of the held-out conversations."""
    questions: Collection[str] | None = None
    """Tasks of the held-out questions."""
    prompts: Sequence[Prompt] | None = None
    """Held-out prompts; of a recipe all that its templates give."""
    facts: Collection[tuple[str, str]] | None = None
    """Domain and language of the facts."""
    problems: Collection[str] | None = None
    """Sources of the problems."""


def planned_sets(parents: Mapping[str, Any], sources: Mapping[str, Sequence[Any]]) -> Sets:
    """What the configs ``parents``, by the input's field, will make; ``sources`` names those that reach an input."""
    documents = sources.get("data")
    return Sets(
        documents=None if not documents else [_source(one) for one in documents],
        conversations=_of(parents, "messages", lambda config: {source.language for source in config.sources}),
        questions=_of(parents, "tasks", lambda config: {one.name for one in config.tasks if one.heldout}),
        prompts=_of(parents, "preferences", _planned_prompts),
        facts=_of(parents, "facts", _planned_facts),
        problems=_of(parents, "problems", lambda config: {source.name for source in config.sources}),
    )


def made_sets(outputs: Mapping[str, Path], prompts: int | None) -> Sets:
    """What the finished artifacts ``outputs``, by the input's field, hold; ``prompts`` as in ``SafetyConfig``.

    Raises:
        OSError: for a file that is not there.
        ValueError: for one that is damaged.
        KeyError: likewise.
    """
    return Sets(
        documents=_of(outputs, "data", _made_documents),
        conversations=_of(outputs, "messages", lambda output: _words(output / "heldout.jsonl", "language")),
        questions=_of(outputs, "tasks", lambda output: _words(output / "heldout.jsonl", "task")),
        prompts=_of(outputs, "preferences", lambda output: [
            Prompt(row["category"], row["language"], row["template"]) for row in held_out_prompts(output, prompts)
        ]),
        facts=_of(outputs, "facts", _made_facts),
        problems=_of(outputs, "problems", _made_problems),
    )  # fmt: skip


def held_out_prompts(preferences_dir: Path, per_group: int | None) -> list[Mapping[str, Any]]:
    """Each held-out prompt once, ``per_group`` of each category and language with the lowest ids."""
    by_prompt: dict[str, Mapping[str, Any]] = {}
    for row in _rows(preferences_dir / "heldout.jsonl"):
        fields = ("id", "prompt", "category", "language", "template")
        by_prompt.setdefault(json.dumps(row["prompt"]), {field: row[field] for field in fields})
    taken: Counter[tuple[str, str]] = Counter()
    kept = []
    for row in sorted(by_prompt.values(), key=lambda row: row["id"]):
        taken[row["category"], row["language"]] += 1
        if per_group is None or taken[row["category"], row["language"]] <= per_group:
            kept.append(row)
    return kept


def _of(known: Mapping[str, Any], field: str, read: Any) -> Any:
    return read(known[field]) if field in known else None


def _source(one: Any) -> Source:
    return Source(str(one), str(getattr(one, "language", "")), getattr(one, "domain", None) or "")


def _planned_facts(config: Any) -> set[tuple[str, str]]:
    from data.facts import PROMPTS

    return {
        (domain, language) for domain, language in PROMPTS if domain in config.domains and language in config.languages
    }


def _planned_prompts(config: Any) -> list[Prompt] | None:
    """Those of our own templates; what rows of elsewhere say of themselves is not known before they are read."""
    from data.preferences import heldout_templates, template_pairs
    from data.preferences_config import TemplateSource

    if not all(isinstance(source, TemplateSource) for source in config.sources):
        return None
    pairs = [pair for source in config.sources for pair in template_pairs(source)]
    heldout = heldout_templates(pairs, config.heldout_share)
    return [Prompt(pair.category, pair.language, pair.template) for pair in pairs if pair.template in heldout]


def _made_documents(output: Path) -> list[Source]:
    from data.shards import read_info

    return [
        Source(source["name"], source["language"], source.get("domain") or "") for source in read_info(output).sources
    ]


def _made_facts(output: Path) -> set[tuple[str, str]]:
    from data.facts import read_facts

    return {(fact["domain"], fact["language"]) for fact in read_facts(output)}


def _made_problems(output: Path) -> set[str]:
    from data.problems import read_problems

    return {problem["source"] for problem in read_problems(output)}


def _words(path: Path, field: str) -> set[str]:
    return {row[field] for row in _rows(path)}


def _rows(path: Path) -> list[Mapping[str, Any]]:
    with path.open("rb") as lines:
        return [json.loads(line) for line in lines]
