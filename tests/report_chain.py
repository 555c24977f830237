"""A chain of stand-in stages that write what the real ones write, for chat, comparison and report."""

import json
import math
import random
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipelines.chain import Chain, build_chain
from pipelines.recipe import load_recipe
from stages.base import Input, Section, Stage, StageConfig, StageResult, operational
from stages.runtime.gates import GateConfig
from stages.runtime.lifecycle import Surroundings, execute

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> "quoted" & </pre></style>'


class Source(Section):
    name: str
    """Name."""
    licence: str = "CC0"
    """Licence."""


class GatherConfig(StageConfig):
    kind: Literal["gather"]
    """This stage."""
    corpus: str | None = None
    """What it is made of."""
    sources: list[Source] = Field(default_factory=list)
    """What it reads."""


class FitConfig(StageConfig):
    kind: Literal["fit"]
    """This stage."""
    data: str
    """What it learns from."""
    from_: str | None = Field(default=None, alias="from")
    """What it starts from."""
    max_steps: int = 40
    """Steps."""
    quality: float = 0.0
    """How good the model is, in nats."""
    weights: bool = False
    """Whether a real tiny model is written."""
    ending: Literal["done", "error"] = "done"
    """What becomes of the run."""


class JudgeConfig(StageConfig):
    kind: Literal["judge"]
    """This stage."""
    from_: str = Field(alias="from")
    """The model."""
    data: str
    """What it is judged on."""
    quality: float = 0.0
    """How much better the scores are."""
    items: int = 200
    """Items of each score."""
    set_hash: str = "a" * 64
    """Identity of the set."""
    word: str = "well"
    """What the samples say."""
    families: int | None = None
    """Into how many families the items fall."""
    gates: list[GateConfig] = operational([])
    """What the scores must keep to."""


class ShipConfig(StageConfig):
    kind: Literal["ship"]
    """This stage."""
    from_: str = Field(alias="from")
    """The model."""
    note: str = ""
    """What the rows say."""


class Gather(Stage):
    kind: ClassVar[str] = "gather"
    Config: ClassVar[type[StageConfig]] = GatherConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "corpus"
    inputs: ClassVar[dict[str, Input]] = {"corpus": Input("corpus", optional=True)}

    def run(self, context: Any) -> StageResult:
        (context.output / "corpus.json").write_text("{}")
        return StageResult({"documents": 1234}, [f"{len(context.config.sources)} sources"])


class Fit(Stage):
    kind: ClassVar[str] = "fit"
    Config: ClassVar[type[StageConfig]] = FitConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "model"
    inputs: ClassVar[dict[str, Input]] = {"data": Input("corpus"), "from_": Input("model", optional=True)}
    launched: ClassVar[bool] = True

    def run(self, context: Any) -> StageResult:
        config, draws = context.config, random.Random(context.name)
        for step in range(2, config.max_steps + 1, 2):
            loss = 2.5 + 3 * math.exp(-step / 12) - config.quality + draws.gauss(0, 0.05)
            values = {"loss_nats_per_token": loss, "lr": 1e-3 * (1 - step / 60), "grad_norm": draws.uniform(0.5, 1.0)}
            values |= {"rewards/chosen": step / 90, "rewards/rejected": -step / 70, "tokens_per_s": 2000 + 9 * step}
            context.tracker.log("train", step, values)
            if step % 10 == 0:
                bpb = {f"bpb/{name}": loss / 2 + add for name, add in (("en", 0.0), ("de", 0.6), ("hi", -0.2))}
                context.tracker.log("eval", step, {"bpb": loss / 2, **bpb, "heldout_hash": "e" * 64})
        if config.ending == "error":
            raise RuntimeError(f"loss is not finite {HOSTILE}")
        if config.weights:
            write_model(context.output)
        (context.output / "info.json").write_text("{}") if not config.weights else None
        return StageResult({"parameters": 5074784, "final_lr": 3e-4}, [f"{config.max_steps} steps <b>fine</b>"])


class Judge(Stage):
    kind: ClassVar[str] = "judge"
    Config: ClassVar[type[StageConfig]] = JudgeConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "scores"
    inputs: ClassVar[dict[str, Input]] = {"from_": Input("model"), "data": Input("corpus")}

    def run(self, context: Any) -> StageResult:
        config = context.config
        plain, items = measured(config.quality, config.items, config.set_hash, context.name)
        if config.families is not None:
            for one in items.values():
                one["families"] = [f"t{place % config.families}" for place in range(config.items)]
        (context.output / "scores.json").write_text(json.dumps(plain))
        (context.output / "items.json").write_text(json.dumps(items))
        (context.output / "samples.json").write_text(json.dumps(samples(config.word)))
        return StageResult({}, ["judged"])


class Ship(Stage):
    kind: ClassVar[str] = "ship"
    Config: ClassVar[type[StageConfig]] = ShipConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "export"
    inputs: ClassVar[dict[str, Input]] = {"from_": Input("model")}

    def run(self, context: Any) -> StageResult:
        (context.output / "gguf").mkdir()
        (context.output / "gguf" / "model-q4_0.gguf").write_bytes(b"GGUF")
        rows = [
            {
                "format": name, "runtime": f"llama.cpp{context.config.note}", "max_logit_difference": gap,
                "mean_kl_nats": gap / 90, "perplexity_ratio": 1 + gap / 50, "top1_agreement": 1 - gap / 9,
                "file_bytes": bytes_, "time_to_first_token_s": 0.03, "tokens_per_s": 310.5, "threads": 2,
                "bound": {"mean_kl": 0.5}, "passed": name != "Q4_0",
            }
            for name, gap, bytes_ in (("F16", 0.002, 10_400_000), ("Q8_0", 0.05, 5_600_000), ("Q4_0", 0.9, 3_100_000))
        ]  # fmt: skip
        parity = {"reference": "pedigree fp32", "text": {"tokens": 4096, "set_hash": "c" * 64}, "rows": rows}
        parity["not_run"] = {"granite": "windows are not in that architecture"}
        (context.output / "parity.json").write_text(json.dumps(parity))
        return StageResult({}, ["shipped"])


STAGES: dict[str, type[Stage]] = {"gather": Gather, "fit": Fit, "judge": Judge, "ship": Ship}


def measured(quality: float, count: int, set_hash: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``scores.json`` and ``items.json``: a ratio, a mean of zeros and ones, a mean; better by ``quality``."""
    shared, own = random.Random("items"), random.Random(name)
    ids = [f"item{number}" for number in range(count)]
    weights = [float(shared.randrange(80, 900)) for _ in ids]
    bits = [weight * (2.2 - quality + shared.gauss(0, 0.3) + own.gauss(0, 0.05)) for weight in weights]
    luck = [shared.random() for _ in ids]
    right = [float(each < 0.4 + 0.5 * quality + own.uniform(-0.02, 0.02)) for each in luck]
    refused = [float(each < 0.1) for each in luck]
    items = {
        "bpb/de": {"ids": ids, "numerator": bits, "denominator": weights},
        "reasoning/add": {"ids": ids, "numerator": right},
        "safety/over_refusal": {"ids": ids, "numerator": refused},
    }
    facts = {"bpb/de": ("bits_per_byte", "lower", "documents"), "reasoning/add": ("share", "higher", "questions"),
             "safety/over_refusal": ("share", "lower", "prompts")}  # fmt: skip
    scores = []
    for score, (unit, better, what) in facts.items():
        total = sum(items[score].get("denominator", [1.0] * count))
        value = sum(items[score]["numerator"]) / total
        scores.append(
            {
                "name": score, "suite": score.partition("/")[0], "suite_version": 1, "value": value, "unit": unit,
                "better": better, "n": count, "n_unit": what, "interval": [value - 0.03, value + 0.03],
                "method": "bootstrap", "set_hash": set_hash, "decoding": None, "settings": {}, "items": score,
            }
        )  # fmt: skip
    plain = {"format": 1, "stage": "x", "key": "k", "digest": "d", "confidence": 0.95, "scores": scores}
    return plain | {"not_run": {"harness": "not chosen in suites"}}, items


def samples(word: str) -> dict[str, Any]:
    """``samples.json`` of two prompts, one of them in Hindi; the answer tries to break out of the page."""
    greedy = {"temperature": 0, "top_p": 1, "seed": 17, "max_new_tokens": 64}
    hindi = f"नई दिल्ली भारत की राजधानी है, {word}।\n\x1b[31mred"
    asked = [
        ("en-cat/greedy", "en", "What is a cat?", f"A cat is {word}. {HOSTILE}"),
        ("hi-capital/greedy", "hi", "भारत की राजधानी क्या है?", hindi),
    ]
    rows = [
        {"id": name, "language": language, "prompt": [{"role": "user", "content": prompt}], "decoding": greedy,
         "completion": text, "tokens": 12, "finished": True}
        for name, language, prompt, text in asked
    ]  # fmt: skip
    return {"format": 1, "set_hash": "b" * 64, "samples": rows}


def write_model(output: Path) -> None:
    """A tiny real model with its tokenizer, as a training stage leaves it; the tokenizer is trained on little text."""
    import shutil
    import tempfile

    import torch
    from tiny_run import make_tokens, spec

    from model.config import HybridConfig
    from model.lm import HybridForCausalLM
    from stages.runtime.weights import save_weights

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokens(Path(folder)) / "output" / "tokenizer"
        torch.manual_seed(0)
        model = HybridForCausalLM(HybridConfig.from_spec(spec()))
        with torch.no_grad():
            for parameter in model.parameters():
                # As initialised it says the same to everything; so each token depends on those before.
                parameter.mul_(12 if parameter.ndim > 1 else 1)
        save_weights(output, model, tokenizer)
        shutil.rmtree(folder, ignore_errors=True)


RECIPE = """name: toy
seed: 17
tracking: {wandb: disabled}
stages:
  text: {kind: gather, sources: [{name: wiki, licence: CC BY-SA 4.0}]}
  base: {kind: fit, data: text}
  pairs: {kind: gather, corpus: text}
  tuned: {kind: fit, data: pairs, from: base, quality: 0.3}
  left: {kind: fit, data: pairs, from: tuned, quality: 0.4}
  right: {kind: fit, data: pairs, from: tuned, quality: 0.5}
  judge-base: {kind: judge, from: base, data: pairs}
  judge-tuned: {kind: judge, from: tuned, data: pairs, quality: 0.3}
  judge-left: {kind: judge, from: left, data: pairs, quality: 0.3, word: left}
  judge-right: {kind: judge, from: right, data: pairs, quality: 0.5, word: right}
  ship: {kind: ship, from: left}
"""


def make_chain(directory: Path, text: str = RECIPE) -> Chain:
    """The chain of the recipe ``text``, with its artifacts below ``directory/runs``."""
    path = directory / "toy.yaml"
    path.write_text(text, encoding="utf-8")
    return build_chain(load_recipe(path, stages=STAGES), directory / "runs", STAGES)


def run_chain(chain: Chain, *names: str) -> Chain:
    """Run the stages ``names``, or all of them."""
    for node in chain:
        if not names or node.name in names:
            execute(node.stage(), node.job, Surroundings(chain.runs / "cache"))
    return chain
