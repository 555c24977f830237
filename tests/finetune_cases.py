"""What every fine-tuning stage is tested with: a tiny parent, tiny data, a context; a stage adds one line to ``CASES``.

``tests/test_finetune_stages.py`` runs the kill, byte-flip and two-rank tests over all of them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpo_cases
import sft_cases
import tiny_preferences
from tiny_run import SOURCES, Log, make_tokens, spec

from stages.base import StageContext

STEPS = 4
PARENT_LR = 1e-2
KEY = "0" * 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One stage: where its class is, how its data artifact is made, and its own config fields.

    ``data`` fills ``directory/output`` of a finished artifact of the kind that the stage's ``data`` input wants.
    """

    stage: str
    data: Callable[[Path], None]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    probes: Callable[[Any], dict[str, Any]] | None = None
    """What else is asked of this stage, given the ``finetune_lives.Bench``; returns plain JSON data."""
    trains: str = ""
    """End of the names of the tensors that it trains; the others must stay the parent's."""

    def stage_class(self) -> Any:
        """The stage's class."""
        module, name = self.stage.split(":")
        return getattr(importlib.import_module(module), name)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def conversations(language: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a messages artifact: a word is asked about, its neighbours are the answer."""
    drawn, words = random.Random(f"{language}{seed}"), SOURCES[language]
    rows = []
    for number in range(count):
        place = drawn.randrange(len(words))
        length = drawn.randrange(1, 5)
        answer = " ".join(words[(place + step) % len(words)] for step in range(1, 1 + length))
        messages = [{"role": "user", "content": words[place]}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"{language}{seed}-{number}", "messages": messages, "source": "made", "language": language})
    return rows


def messages_data(directory: Path) -> None:
    """A messages artifact in two languages."""
    for split, count, seed in (("train", 20, 1), ("heldout", 5, 2)):
        rows = [row for language in SOURCES for row in conversations(language, count, seed)]
        write_jsonl(directory / "output" / f"{split}.jsonl", rows)


CASES: dict[str, Case] = {
    "dpo": Case("stages.dpo:Dpo", tiny_preferences.preferences_data, {"nll_weight": 0.5}),
    "grpo": Case("stages.grpo:GRPO", grpo_cases.tasks_data, grpo_cases.CONFIG),
    "sft": Case("stages.sft:SFT", messages_data, {"min_stop_probability": 0.0}, sft_cases.probes),
    "qlora": Case(
        "stages.qlora:QLoRA",
        messages_data,
        {"min_stop_probability": 0.0, "adapter": {"rank": 2}},
        trains="_proj.weight",
    ),
}
"""Fine-tuning stages by kind."""


def make_parent(directory: Path, **changes: Any) -> Path:
    """A finished model artifact of a tiny model, random weights, a real tokenizer; ``changes`` go into its spec."""
    from model.config import HybridConfig
    from model.lm import HybridForCausalLM
    from stages.runtime import rng
    from stages.runtime.checkpoint import save_weights

    tokens = make_tokens(directory / "tokens")
    output = directory / "parent" / "output"
    rng.seed_all(5)
    facts = json.loads((tokens / "output" / "tokens.json").read_text())
    config = HybridConfig.from_spec(spec(**changes), eos_token_id=facts["eos_id"], pad_token_id=facts["pad_id"])
    save_weights(output, HybridForCausalLM(config), tokens / "output" / "tokenizer")
    return finish(directory / "parent", {"final_lr": PARENT_LR})


def finish(artifact: Path, metrics: dict[str, Any]) -> Path:
    """Make ``artifact`` with its filled ``output`` a finished one."""
    from stages.runtime.artifact import write_record
    from stages.runtime.checkpoint import write_manifest

    digest = write_manifest(artifact / "output")
    write_record(
        artifact,
        {"format": 1, "state": "done", "key": KEY, "output_digest": digest, "metrics": metrics},
    )
    return artifact


def link(field: str, artifact: Path) -> Any:
    """What a job says of a parent that ``finish`` finished."""
    from stages.runtime.artifact import ParentLink, read_record

    record = read_record(artifact) or {}
    return ParentLink(field, KEY, record["output_digest"], artifact)


def make_inputs(case: Case, directory: Path) -> dict[str, Path]:
    """Finished artifacts by the stage's input fields; the model is the tiny parent."""
    data = directory / "data"
    case.data(data)
    finish(data, {})
    return {"from_": make_parent(directory), "data": data}


def model(case: Case) -> Any:
    """The recipe's model section: the tiny parent's."""
    return spec()


def config(case: Case, **changes: Any) -> Any:
    """Four steps of four sequences of at most 64 tokens."""
    stage = case.stage_class()
    plain = {
        "kind": stage.kind, "from": "pretrain", "data": "data", "max_length": 64, "global_batch_size": 4,
        "micro_batch_size": 2, "max_steps": STEPS, "lr": 5e-3, "log_every_steps": 1, "precision": "fp32",
        "deepspeed": "zero1", "schedule": {"kind": "cosine", "warmup_steps": 1},
    }  # fmt: skip
    return stage.Config.model_validate(plain | case.config | changes)


def context(
    case: Case, directory: Path, inputs: dict[str, Path], *, tracker: Any = None, **changes: Any
) -> StageContext:
    """A context as the lifecycle would hand it over."""
    for name in ("output.tmp", "work"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    return StageContext(
        pipeline="test", name=case.stage_class().kind, key=KEY, seed=17, config=config(case, **changes),
        model=model(case), directory=directory, output=directory / "output.tmp", work=directory / "work",
        cache=directory / "cache", parents=inputs, tracker=tracker or Log(),
    )  # fmt: skip


def campaign(kind: str, root: Path, part: str) -> dict[str, Any]:
    """What ``finetune_lives`` saw of one stage, run in a process of its own because it forks."""
    script = Path(__file__).with_name("finetune_lives.py")
    command = [sys.executable, str(script), str(root), "--kinds", kind, "--parts", part]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])[kind]
