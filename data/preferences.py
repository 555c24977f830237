"""Preference pairs: gathered, checked, and split by template so that what is measured was never trained on.

The side of a template (for rows of one's own: of a prompt) depends on the hash of its name alone. A family of templates
is one template in all languages, so that a translation never stands on the other side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from data import preferences_de, preferences_en, preferences_hi
from data.errors import DataError
from data.preferences_config import (
    FilePreferences,
    HubPreferences,
    PackagePreferences,
    PreferenceSource,
    TemplateSource,
)
from data.preferences_replies import compliance, opening, refusal
from data.preferences_rows import Pair, RowFault, files_of, read_rows

TEMPLATES: dict[str, ModuleType] = {"en": preferences_en, "de": preferences_de, "hi": preferences_hi}
SPLITS = ("train", "heldout")
FACTS = "preferences.json"
SHOWN_FAULTS = 20


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Usable pairs, rows left out by rule and source, and a few of the faults as examples."""

    pairs: list[Pair]
    dropped: dict[str, Counter[str]]
    examples: list[str]


def template_pairs(source: TemplateSource) -> Iterator[Pair]:
    """Every filling of every template: refusal over compliance for harmful prompts, help over refusal for benign."""
    for language in source.languages:
        texts = TEMPLATES[language]
        for family, template in texts.HARMFUL.items():
            for prompt in _fillings(texts, template, source.max_per_template):
                answers = refusal(prompt, language), compliance(prompt, language)
                yield _own_pair(source, language, "harmful", family, prompt, *answers)
        for family, (template, help_text) in texts.BENIGN.items():
            for prompt in _fillings(texts, template, source.max_per_template):
                answers = f"{opening(prompt, language)} {help_text}", refusal(prompt, language)
                yield _own_pair(source, language, "benign", family, prompt, *answers)


def gather(sources: Sequence[PreferenceSource], cache: Path, say: Callable[[str], None]) -> Gathered:
    """Pairs of all sources without duplicates and contradictions.

    Raises:
        DataError: with every source's faults when one has more than its ``max_faulty_share``, or no usable row.
    """
    pairs: list[Pair] = []
    dropped: dict[str, Counter[str]] = {}
    faults: list[tuple[str, str]] = []
    examples: list[str] = []
    for index, source in enumerate(sources):
        say(f"{source.name}: licence of the text: {source.licence}")
        found, bad = _read(source, cache)
        dropped[source.name] = Counter(fault.rule for fault in bad)
        examples += [str(fault) for fault in bad[:SHOWN_FAULTS]]
        message = _refusal_of(source, len(found), bad)
        faults += [(f"sources.{index}", message)] if message else []
        pairs += found
    if faults:
        raise DataError(faults)
    return Gathered(_without_repeats(pairs, dropped), dropped, examples)


def split(pairs: Sequence[Pair], share: float) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """Pairs by side, each in the order of their ids, and how many training pairs each source lost to an overlap.

    A template is held out when the hash of its name lies below ``share``; each category of a source in each language
    has at least its lowest one there. A training pair whose prompt is also held out is left out.
    """
    heldout = heldout_templates(pairs, share)
    sides: dict[str, list[Pair]] = {"train": [], "heldout": []}
    for pair in pairs:
        sides["heldout" if pair.template in heldout else "train"].append(pair)
    asked = {pair.prompt_key for pair in sides["heldout"]}
    overlap = Counter(pair.source for pair in sides["train"] if pair.prompt_key in asked)
    sides["train"] = [pair for pair in sides["train"] if pair.prompt_key not in asked]
    return {side: sorted(members, key=lambda pair: pair.id) for side, members in sides.items()}, dict(overlap)


def heldout_templates(pairs: Iterable[Pair], share: float) -> set[str]:
    """Templates on the held-out side."""
    groups: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for pair in pairs:
        groups[pair.source, pair.category, pair.language].add(pair.template)
    chosen: set[str] = set()
    for members in groups.values():
        ordered = sorted(members, key=_place)
        chosen.update(name for name in ordered if _place(name) < share)
        chosen.update(ordered[: min(1, len(ordered) // 2)])
    return chosen


def write(directory: Path, gathered: Gathered, sources: Sequence[PreferenceSource], share: float) -> dict[str, Any]:
    """Split and write ``train.jsonl``, ``heldout.jsonl`` and last ``preferences.json``; returns the latter.

    Raises:
        DataError: when a category lacks pairs of a language on one side.
    """
    sides, overlap = split(gathered.pairs, share)
    _audit(sides)
    digests = {}
    for side, members in sides.items():
        lines = [json.dumps(pair.row(), ensure_ascii=False) + "\n" for pair in members]
        data = "".join(lines).encode()
        (directory / f"{side}.jsonl").write_bytes(data)
        digests[side] = hashlib.sha256(data).hexdigest()
    described = []
    for source in sources:
        counts = {side: _counts(pair for pair in sides[side] if pair.source == source.name) for side in SPLITS}
        lost = dict(gathered.dropped[source.name]) | (
            {"overlap": overlap[source.name]} if source.name in overlap else {}
        )
        described.append({"name": source.name, "licence": source.licence, "dropped": lost, **counts})
    facts = {
        "sources": described,
        **{side: {"pairs": len(sides[side]), "templates": sorted({pair.template for pair in sides[side]})}
           for side in SPLITS},
        "heldout_hash": digests["heldout"],
        "train_hash": digests["train"],
        "dropped_examples": gathered.examples[:SHOWN_FAULTS],
    }  # fmt: skip
    (directory / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return facts


def read_split(directory: Path, side: str) -> list[dict[str, Any]]:
    """Rows of ``train`` or ``heldout`` of a finished artifact's output."""
    with (directory / f"{side}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def source_revision(source: PreferenceSource) -> str:
    """What pins the source's content; raises ``FileNotFoundError`` for files that are not there."""
    digest = hashlib.sha256()
    if isinstance(source, HubPreferences):
        return f"{source.repository}@{source.revision}"
    if isinstance(source, PackagePreferences):
        return " ".join(f"{package.name}=={package.version}:{package.sha256}" for package in source.packages)
    if isinstance(source, FilePreferences):
        for path in files_of(source):
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    else:
        for pair in template_pairs(source):
            digest.update(f"{pair.id}{pair.template}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _place(name: str) -> float:
    """Where the hash of ``name`` lies between 0 and 1."""
    return int.from_bytes(hashlib.sha256(f"side\0{name}".encode()).digest()[:6], "big") / 2**48


def _fillings(texts: ModuleType, template: str, limit: int | None) -> list[str]:
    (slot,) = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    return [template.format(**{slot: value}) for value in texts.SLOTS[slot][:limit]]


def _own_pair(
    source: TemplateSource, language: str, category: str, family: str, prompt: str, chosen: str, rejected: str
) -> Pair:
    name = f"{category}/{family}"
    turns = [{"role": "user", "content": prompt}]
    return Pair(turns, chosen, rejected, category, language, name, source.name, f"{language}/{name}")


def _read(source: PreferenceSource, cache: Path) -> tuple[list[Pair], list[RowFault]]:
    if isinstance(source, TemplateSource):
        return list(template_pairs(source)), []
    rows = list(read_rows(source, cache))
    return [row for row in rows if isinstance(row, Pair)], [row for row in rows if isinstance(row, RowFault)]


def _refusal_of(source: PreferenceSource, usable: int, bad: Sequence[RowFault]) -> str:
    """Why the source as a whole is refused; empty when it is not."""
    allowed = 0.0 if isinstance(source, TemplateSource) else source.max_faulty_share
    if usable and len(bad) <= allowed * (usable + len(bad)):
        return ""
    rules = ", ".join(f"{rule} {count}" for rule, count in sorted(Counter(fault.rule for fault in bad).items()))
    shown = "; ".join(str(fault) for fault in bad[:SHOWN_FAULTS])
    more = f"; and {len(bad) - SHOWN_FAULTS} more" if len(bad) > SHOWN_FAULTS else ""
    return (
        f"source {source.name} must have at most {allowed:.0%} faulty rows and some usable; got {len(bad)} of "
        f"{usable + len(bad)} faulty ({rules or 'no rows'}): {shown}{more}; mend them, or set max_faulty_share"
    )


def _without_repeats(pairs: list[Pair], dropped: dict[str, Counter[str]]) -> list[Pair]:
    """``pairs`` without later equal ones, and without any two of which one prefers what the other rejects."""
    kept: dict[str, Pair] = {}
    preferred = {(pair.prompt_key, pair.chosen, pair.rejected) for pair in pairs}
    for pair in pairs:
        if (pair.prompt_key, pair.rejected, pair.chosen) in preferred:
            dropped[pair.source]["contradiction"] += 1
        elif kept.setdefault(pair.id, pair) is not pair:
            dropped[pair.source]["duplicate"] += 1
    return list(kept.values())


def _audit(sides: dict[str, list[Pair]]) -> None:
    groups = {side: {(pair.category, pair.language) for pair in members} for side, members in sides.items()}
    faults = []
    for category, language in sorted(groups["train"] | groups["heldout"]):
        missing = [side for side in SPLITS if (category, language) not in groups[side]]
        if missing:
            faults.append((
                "sources",
                f"must give {category} pairs in {language} of at least two templates or prompts, one a side; "
                f"got none for {' and '.join(missing)}; add some",
            ))  # fmt: skip
    if faults:
        raise DataError(faults)


def _counts(pairs: Iterable[Pair]) -> dict[str, Any]:
    by_group = Counter(f"{pair.category}/{pair.language}" for pair in pairs)
    return {"pairs": sum(by_group.values()), **dict(sorted(by_group.items()))}
