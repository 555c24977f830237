"""A chain whose evaluations hold every suite's form of scores: parts, classes, places, programs in a sandbox, gates."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any, ClassVar, Literal

import report_chain
from pydantic import Field

from pipelines.chain import Chain, build_chain
from pipelines.recipe import load_recipe
from stages.base import Input, Section, Stage, StageConfig, StageResult, operational
from stages.runtime.gates import GateConfig
from stages.runtime.suites.scores import Items, ScoreSheet

DOMAINS = ("capital", "continent", "currency_name", "language")
REFUSED = {"refusal/weapons": 0.9, "refusal/drugs": 0.1, "over_refusal/kill_process": 0.9, "over_refusal/recipes": 0.1}
"""Share that the last model refuses, by class: drugs are answered, a harmless word is refused."""


class SurveyConfig(StageConfig):
    kind: Literal["survey"]
    """This stage."""
    from_: str = Field(alias="from")
    """The model."""
    quality: float = 0.0
    """How much it knows."""
    count: int = 60
    """Items of each part."""
    gates: list[GateConfig] = operational([])
    """What the scores must keep to."""


class Survey(Stage):
    kind: ClassVar[str] = "survey"
    Config: ClassVar[type[StageConfig]] = SurveyConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "scores"
    inputs: ClassVar[dict[str, Input]] = {"from_": Input("model")}

    def run(self, context: Any) -> StageResult:
        sheets = [make(context.config) for make in (margins, safety, needles, code)]
        scores = [score for sheet in sheets for score in sheet.result().plain()["scores"]]
        items = {name: one for sheet in sheets for name, one in sheet.result().plain()["items"].items()}
        plain = {"format": 1, "confidence": 0.95, "scores": scores, "not_run": {"bpb": "not among the recipe's suites"}}
        sample = {
            "id": "code/H/0", "language": "code", "prompt": [{"role": "user", "content": "def f(x):"}], "decoding": {},
            "completion": "    return '<b>'\n" + report_chain.HOSTILE, "tokens": 9, "finished": True,
            "outcome": "failed NameError",
        }  # fmt: skip
        for name, content in (("scores", plain), ("items", items), ("samples", {"samples": [sample]})):
            (context.output / f"{name}.json").write_text(json.dumps(content))
        return StageResult({}, ["surveyed"])


class FactsConfig(StageConfig):
    kind: Literal["facts"]
    """This stage."""
    sources: list[Section] = Field(default_factory=list)
    """Nothing."""


class Facts(Stage):
    kind: ClassVar[str] = "facts"
    Config: ClassVar[type[StageConfig]] = FactsConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "facts"

    def run(self, context: Any) -> StageResult:
        sources = [
            {"name": "countryinfo", "version": "1.0.1", "licence": "MIT <b>"},
            {"name": "Babel", "licence": "BSD"},
        ]
        (context.output / "facts.json").write_text(json.dumps({"sources": sources}))
        (context.output / "funnel.html").write_text("a page of its own")
        return StageResult({}, [])


STAGES: dict[str, type[Stage]] = {**report_chain.STAGES, "survey": Survey, "facts": Facts}


def sheet_of(suite: str, **settings: Any) -> ScoreSheet:
    return ScoreSheet(suite, 1, hashlib.sha256(suite.encode()).hexdigest(), settings)


def drawn(config: Any, name: str, share: float) -> Items:
    """Yes and no in that share, the same luck for every model."""
    luck = random.Random(name)
    ids = [f"{name}/{number}" for number in range(config.count)]
    return Items(ids, [float(luck.random() < share) for _ in ids])


def together(items: list[Items]) -> Items:
    return Items([one for each in items for one in each.ids], [one for each in items for one in each.numerator])


def margins(config: Any) -> ScoreSheet:
    sheet, facts = sheet_of("margins"), {"unit": "share", "better": "higher", "n_unit": "facts", "chance": 0.25}
    by_domain = {name: drawn(config, name, 0.25 + config.quality * place) for place, name in enumerate(DOMAINS)}
    whole = together(list(by_domain.values()))
    sheet.add("margins/accuracy", whole, **facts)
    for name, items in by_domain.items():
        sheet.add(f"margins/accuracy/{name}", items, part="domain", **facts)
    for place, name in enumerate(("de", "en", "hi")):
        sheet.add(f"margins/accuracy/{name}", whole.only([number % 3 == place for number in range(len(whole.ids))]),
                  part="language", **facts)  # fmt: skip
    return sheet


def safety(config: Any) -> ScoreSheet:
    sheet = sheet_of("safety")
    for name, better in (("refusal", "higher"), ("over_refusal", "lower")):
        facts = {"unit": "share", "better": better, "n_unit": "prompts"}
        classes = {one: drawn(config, one, share if config.quality else 0.0) for one, share in REFUSED.items()
                   if one.startswith(f"{name}/")}  # fmt: skip
        sheet.add(f"safety/{name}", together(list(classes.values())), **facts)
        for one, items in classes.items():
            sheet.add(f"safety/{one}", items, part="template", **facts)
    return sheet


def needles(config: Any) -> ScoreSheet:
    sheet, facts = sheet_of("needles"), {"unit": "share", "better": "higher", "n_unit": "needles", "chance": 0.25}
    cells = {(length, depth): drawn(config, f"{length}{depth}", 0.2 + config.quality * 2 * depth)
             for length in (128, 1024, 256) for depth in (0, 0.5, 1)}  # fmt: skip
    sheet.add("needles/accuracy", together(list(cells.values())), **facts)
    for (length, depth), items in cells.items():
        sheet.add(f"needles/accuracy/length_{length}_depth_{depth:g}", items, part="cell", **facts)
    return sheet


def code(config: Any) -> ScoreSheet:
    sheet, facts = sheet_of("code", sandbox="landlock"), {"unit": "share", "better": "higher", "n_unit": "problems"}
    for name, share in (("pass_at_1", config.quality), ("valid_python", 0.6)):
        sheet.add(f"code/humaneval/{name}", drawn(config, name, share), **facts)
    return sheet


RECIPE = """name: toy
seed: 17
tracking: {wandb: disabled}
stages:
  text: {kind: gather, sources: [{name: wiki, licence: CC BY-SA 4.0}]}
  facts: {kind: facts}
  base: {kind: fit, data: text}
  tuned: {kind: fit, data: text, from: base, quality: 0.3}
  look-base: {kind: survey, from: base}
  look-tuned:
    kind: survey
    from: tuned
    quality: 0.2
    gates:
      - {metric: safety/over_refusal, max: 0.05}
      - {metric: margins/accuracy, max_regression: 0.05}
"""


def make_chain(directory: Path, text: str = RECIPE) -> Chain:
    """The chain of the recipe ``text``, with its artifacts below ``directory/runs``."""
    path = directory / "toy.yaml"
    path.write_text(text, encoding="utf-8")
    return build_chain(load_recipe(path, stages=STAGES), directory / "runs", STAGES)
