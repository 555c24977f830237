"""Everything an evaluation needs, tiny: a model with its tokenizer, and each of the sets it is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_cases import finish, make_parent, messages_data
from tiny_run import Log, make_tokens

from data.facts import write_facts
from data.preferences_replies import refusal
from data.tasks import TaskChoice, rows
from stages.base import StageContext
from stages.evaluate import Evaluate, EvaluateConfig

MAX_SEQ_LEN = 192
INPUTS = ("data", "messages", "tasks", "preferences", "facts")
SUITES: dict[str, Any] = {
    "bpb": {"seq_len": 32, "documents": 4, "document_tokens": 40},
    "margins": {"top_k": [1, 5]},
    "reasoning": {"questions": 9, "max_new_tokens": 4},
    "safety": {"max_new_tokens": 4},
    "decoding": {"prompts": 2, "facts": 2, "max_new_tokens": 8},
    "format": {"max_new_tokens": 6},
    "needles": {"lengths": [112], "depths": [0.0, 1.0], "needles": 2, "others": 1},
    "samples": {"prompts": {"one": "the cat", "two": "der Hund"}, "max_new_tokens": 5},
}
FACTS = [
    {"id": f"f{number}", "domain": domain, "language": "en", "family": correct,
     "prompt": prompt, "correct": correct,
     "distractors": {"medium": wrong} | ({"hard": hard} if hard else {})}
    for number, (domain, prompt, correct, wrong, hard) in enumerate([
        ("animals", "the cat sat on a red", "mat", ["dog", "hill"], ["cat", "sat"]),
        ("animals", "one small", "dog", ["cat", "old"], ["mat", "sat"]),
        ("places", "over the old", "hill", ["dog mat", "mat"], []),
    ])
]  # fmt: skip


def make_parents(folder: Path) -> dict[str, Path]:
    """Finished artifacts by the stage's input; the model has random weights."""
    parents = {name: folder / name for name in INPUTS if name != "data"}
    parents |= {"from_": make_parent(folder / "model", max_seq_len=MAX_SEQ_LEN), "data": make_tokens(folder / "data")}
    messages_data(parents["messages"])
    for name in ("facts", "tasks", "preferences"):
        (parents[name] / "output").mkdir(parents=True)
    write_facts(parents["facts"] / "output", FACTS, [])
    questions = [row for task in ("add", "reverse") for row in _questions(task)]
    write_rows(parents["tasks"] / "output" / "heldout.jsonl", questions)
    write_rows(parents["preferences"] / "output" / "heldout.jsonl", preference_rows())
    for name in INPUTS:
        finish(parents[name], {})
    return parents


def _questions(task: str) -> list[dict[str, Any]]:
    return list(rows(TaskChoice(name=task, size=3, train=0, heldout=12), "heldout", 0))


def preference_rows() -> list[dict[str, Any]]:
    """Two pairs a prompt, so that a prompt that is put twice shows."""
    return [
        {"id": f"{category}-{language}-{number}-{pair}", "category": category, "language": language,
         "template": f"{category}/{'ab'[number > 0]}",
         "prompt": [{"role": "user", "content": f"{category} {number} {language}"}],
         "chosen": [{"role": "assistant", "content": refusal("x", language)}], "rejected": []}
        for category in ("harmful", "benign") for language in ("en", "de") for number in range(3) for pair in range(2)
    ]  # fmt: skip


def write_rows(path: Path, content: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")


def config(**changes: Any) -> EvaluateConfig:
    """All suites but the harness."""
    plain = {"kind": "evaluate", "from": "model", "suites": SUITES, "batch_size": 4, **{name: name for name in INPUTS}}
    return EvaluateConfig.model_validate(plain | changes)


def context(folder: Path, parents: dict[str, Path], **changes: Any) -> StageContext:
    """A context as the lifecycle would hand it over."""
    plain = config(**changes)
    named = {name: path for name, path in parents.items() if getattr(plain, name) is not None}
    return StageContext(
        pipeline="test", name="evaluate", key="0" * 64, seed=17, config=plain, model=None, directory=folder,
        output=folder / "output", work=folder / "work", cache=folder / "cache", parents=named, tracker=Log(),
    )  # fmt: skip


def evaluate(folder: Path, parents: dict[str, Path], **changes: Any) -> tuple[Any, Path]:
    """Run the stage; its result and its output folder."""
    return Evaluate().run(context(folder, parents, **changes)), folder / "output"


def make_bench(parents: dict[str, Path], batch_size: int) -> Any:
    """The model of ``parents``, ready to be measured."""
    from stages.runtime.suites.bench import open_bench

    inputs = {name: path / "output" for name, path in parents.items()}
    return open_bench(inputs["from_"], batch_size=batch_size, precision="fp32", inputs=inputs)


def slow_nats(bench: Any, ids: list[int], first: int) -> list[float]:
    """One sequence alone through the whole model, in fp64 from the logits on."""
    import torch

    with torch.no_grad():
        logits = bench.model(input_ids=torch.tensor([ids])).logits[0].double()
    return [-torch.log_softmax(logits[t - 1], -1)[ids[t]].item() for t in range(first, len(ids))]


def content(output: Path) -> dict[str, bytes]:
    """Every file's bytes by name."""
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}
