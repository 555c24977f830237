"""What only supervised fine-tuning is asked, in forked lives; see ``finetune_lives``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 8
SHARED = [("zero1", 1, 8), ("zero1", 1, 1), ("zero0", 2, 4), ("zero1", 2, 4), ("zero2", 2, 4), ("zero3", 2, 4)]
"""How the eight conversations of a step are shared out: engine, ranks, conversations a micro-batch."""


def probe_class() -> Any:
    """The stage's own run, with the gradients of its first step written down before the step is taken."""
    from stages.runtime.sft_tuning import SupervisedTuning

    class Probe(SupervisedTuning):
        gradients: Path

        def _engine_config(self) -> dict[str, Any]:
            config = super()._engine_config()
            if config["zero_optimization"]["stage"] == 3:
                # Even these small parameters are to be partitioned.
                config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            return config

        def begin(self) -> None:
            super().begin()
            take = self.loop._take_step

            def noted() -> None:
                from deepspeed.utils import safe_get_full_grad

                from stages.runtime import distributed

                found = {name: safe_get_full_grad(weight) for name, weight in self.model.named_parameters()}
                if distributed.rank() == 0:
                    np.savez(self.gradients, **{name: grad.detach().numpy() for name, grad in found.items()})
                take()

            self.loop._take_step = noted  # type: ignore[method-assign]

    return Probe


def context_of(bench: Any, directory: Path, **changes: Any) -> Any:
    import finetune_cases

    return finetune_cases.context(bench.case, directory, bench.inputs, **changes)


def eight_conversations(bench: Any) -> None:
    """Leave eight conversations of very different lengths to train on, so that one step sees each of them once."""
    import finetune_cases

    file = bench.inputs["data"] / "output" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()][:ROWS]
    for number, row in enumerate(rows):
        row["messages"][-1]["content"] = " ".join([row["messages"][-1]["content"]] * (1 + number % 3))
    finetune_cases.write_jsonl(file, rows)


def one_step(bench: Any, engine: str, micro: int, into: Path) -> int:
    """The first step of eight conversations at learning rate 1e-9; its gradients go to ``into``."""
    from stages.base import StageResult

    tuning = probe_class()(
        context_of(
            bench, into.with_suffix(""), deepspeed=engine, micro_batch_size=micro, global_batch_size=ROWS, max_steps=1,
            schedule={"kind": "constant"},
        )
    )  # fmt: skip
    tuning.gradients = into
    return 0 if isinstance(tuning.run(), StageResult) else 1


def row_gradients(bench: Any, into: Path) -> int:
    """One conversation's gradient of sum(NLL) / n at a time, by plain autograd: the independent reference."""
    import torch

    tuning = probe_class()(context_of(bench, into.with_suffix("")))
    tuning._open_parent()
    tuning.prepare()
    model = tuning.load_model()
    count = sum(label != -100 for row in tuning.train for label in row.labels)
    found = {}
    for number, row in enumerate(tuning.train):
        model.zero_grad()
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        goals = torch.tensor(row.labels[1:])
        torch.nn.functional.cross_entropy(logits, goals, ignore_index=-100, reduction="sum").div(count).backward()
        found |= {f"{number}/{name}": weight.grad.numpy().copy() for name, weight in model.named_parameters()}
    scored = [sum(label != -100 for label in row.labels) for row in tuning.train]
    np.savez(into, tokens=sum(len(row.ids) for row in tuning.train), scored=scored, **found)
    return 0


def leak(bench: Any, into: Path) -> int:
    """How far the second conversation's logits and gradients depend on the first's tokens, through TRL's collator."""
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tuning = probe_class()(context_of(bench, into.with_suffix("")))
    tuning._open_parent()
    tuning.prepare()
    model = tuning.load_model().eval()
    first, second = ({"input_ids": row.ids, "labels": row.labels} for row in tuning.train[:2])
    other = {**first, "input_ids": [(token + 7) % 300 for token in first["input_ids"]]}
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    start = len(first["input_ids"])
    batch, changed = collate([first, second]), collate([other, second])
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    described = {name: batch[name] for name in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")}
    model(inputs_embeds=embedded, **described).logits[0, start:].square().sum().backward()
    by_positions = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0, start:]
    with torch.no_grad():
        together = model(**batch).logits[0]
        moved = model(**changed).logits[0]
        alone = model(input_ids=torch.tensor([second["input_ids"]])).logits[0]
    found = {
        "rows": batch["input_ids"].shape[0],
        "other_moved": (together[:start] - moved[:start]).abs().max().item(),
        "moved": (together[start:] - moved[start:]).abs().max().item(),
        "gradient": embedded.grad[0, :start].abs().max().item(),
        "own_gradient": embedded.grad[0, start:].abs().max().item(),
        "from_alone": (together[start:] - alone).abs().max().item(),
        "by_positions": (by_positions - together[start:]).abs().max().item(),
        "scale": alone.abs().max().item(),
        "first_label": batch["labels"][0, start].item(),
    }
    into.write_text(json.dumps(found))
    return 0


def nonfinite(bench: Any, into: Path) -> int:
    """A run whose second step has an infinite loss; what was said of it."""
    import finetune_cases

    from stages.runtime.sft_tuning import SupervisedTuning

    class Poisoned(SupervisedTuning):
        def make_trainer(self, *args: Any) -> Any:
            trainer = super().make_trainer(*args)
            honest = trainer.compute_loss

            def poisoned(*args: Any, **kwargs: Any) -> Any:
                loss = honest(*args, **kwargs)
                return loss * float("inf") if self.state.step == 1 else loss

            trainer.compute_loss = poisoned
            return trainer

    log = finetune_cases.Log()
    result = Poisoned(context_of(bench, into.with_suffix(""), tracker=log)).run()
    into.write_text(json.dumps({"metrics": result.metrics, "skips": [r for r in log.rows if r["event"] == "skip"]}))
    return 0


def cast_by_the_engine(bench: Any, into: Path) -> int:
    """A run whose engine has cast one parameter when it stands; the text of the refusal."""
    import torch

    from stages.runtime.sft_tuning import SupervisedTuning

    class Cast(SupervisedTuning):
        def begin(self) -> None:
            weight = next(w for name, w in self.model.named_parameters() if name.endswith("A_log"))
            weight.data = weight.data.to(torch.bfloat16)
            super().begin()

    try:
        Cast(context_of(bench, into.with_suffix(""))).run()
    except RuntimeError as error:
        into.write_text(f"{type(error).__name__}: {error}")
    return 0


def without_a_stop(bench: Any, into: Path) -> int:
    """A run that must learn to stop and has not in four steps; the text of its refusal."""
    from stages.runtime.audit import AuditError
    from stages.sft import SFT

    try:
        SFT().run(context_of(bench, into.with_suffix(""), min_stop_probability=0.5))
    except AuditError as error:
        into.write_text(str(error))
    return 0


def probes(bench: Any) -> dict[str, Any]:
    """All of them; files lie in ``bench.root``."""
    root, codes = bench.root, {}
    singles = {
        "leak.json": leak, "nonfinite.json": nonfinite, "cast.txt": cast_by_the_engine, "stop.txt": without_a_stop,
    }  # fmt: skip
    for name, body in singles.items():
        codes[name] = bench.alone(lambda body=body, name=name: body(bench, root / name))
    bf16 = {"precision": "bf16", "deepspeed": "zero3", "activation_checkpointing": True}
    codes["bf16"] = bench.life("bf16", config=bf16)
    eight_conversations(bench)
    codes["rows.npz"] = bench.alone(lambda: row_gradients(bench, root / "rows.npz"))
    for engine, ranks, micro in SHARED:
        name = f"{engine}-{ranks}x{micro}.npz"
        body = lambda engine=engine, micro=micro, name=name: one_step(bench, engine, micro, root / name)  # noqa: E731
        codes[name] = bench.alone(body, ranks=ranks)
    return codes
