"""Lives of the later stages, tracked by W&B offline, stopped inside what they measure, and the same without any of it.

Run as a script by ``test_tracked_stages.py``: ``tracked_lives.py ROOT PART ...`` prints one JSON object; parts are
training stages, ``reference`` and ``later``. The imports are paid once, by the process that forks the lives.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:1] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import finetune_cases as cases  # noqa: E402
from finetune_lives import Bench  # noqa: E402

PRELOAD = (
    "wandb", "deepspeed", "datasets", "peft", "bitsandbytes", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer", "stages.runtime.sft_tuning", "stages.runtime.dpo_training",
    "stages.runtime.qlora_tuning", "stages.runtime.grpo_trainer", "stages.runtime.lifecycle",
)  # fmt: skip
"""What the lives would each import for themselves."""
STOPPED = ("sft", "grpo", "dpo")
OFFLINE = {"WANDB_MODE": "offline", "WANDB_API_KEY": "f00dfeed" * 5, "PEDIGREE_PLANTED_SECRET": "correct-horse-battery"}
Asked = Callable[[Any, int], bool]


class Tracked(Bench):
    """Lives whose rows also go to W&B's offline files, and which can be asked to stop in a measurement."""

    def tracked(self, name: str, *, mode: str = "offline", asked: Asked | None = None, **how: Any) -> int:
        """One life; ``asked`` is given the run and the number of its look, and says whether SIGTERM comes there."""
        self.mode, self.asked = mode, asked
        return self.life(name, **how)

    def _execute(self, directory: Path, changes: dict[str, Any], ready: Callable[[], Any] = lambda: None) -> int:
        from stages.runtime import lifecycle

        real, mode = lifecycle.Surroundings, getattr(self, "mode", "disabled")
        lifecycle.Surroundings = lambda cache: real(cache, mode=mode)  # type: ignore[assignment, misc]
        os.environ.update(OFFLINE)
        if asked := getattr(self, "asked", None):
            ask_in_measurements(asked)
        return super()._execute(directory, changes, ready)


def ask_in_measurements(asked: Asked) -> None:
    """Have SIGTERM sent to this process at a look for requests inside a measurement, once."""
    from stages.runtime.finetune import Finetuning

    looks, real = [0], Finetuning.between_batches

    def between(self: Any) -> None:
        looks[0] += 1
        if asked(self, looks[0]):
            os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    Finetuning.between_batches = between  # type: ignore[method-assign]


def at_boundary(step: int) -> Asked:
    """In the measurement after that step, once only in the run's life."""
    return lambda run, look: hasattr(run, "loop") and run.state.step == step and run.state.evaluation_due


def stopped_in_measurement(bench: Tracked) -> dict[str, Any]:
    """Asked to stop in the measurement after step 2, then gone on with; and a run that measures nothing on the way."""
    measured = {"eval_every_steps": 2, "checkpoint_every_steps": 0}
    codes = [bench.tracked("asked", asked=at_boundary(2), config=measured)]
    said = bench.log("asked")
    saved = sorted(path.name for path in (bench.root / "asked" / "checkpoints").glob("step-*"))
    codes.append(bench.tracked("asked", config=measured))
    codes.append(bench.tracked("blind", mode="disabled", config={"eval_every_steps": 0, "checkpoint_every_steps": 0}))
    weights = [bench.root / name / "output" / "model.safetensors" for name in ("asked", "blind")]
    same = codes == [85, 0, 0] and weights[0].read_bytes() == weights[1].read_bytes()
    facts = {"codes": codes, "said": said, "saved": saved, "same_weights": same, "log": bench.log("asked")}
    return facts | {"measured": measured_steps(bench.root / "asked"), "before": measured_steps(bench.root / "blind")}


def measured_steps(directory: Path) -> list[int]:
    """Steps at which the run measured, as its rows have them."""
    from stages.runtime.tracking import read_metrics

    return [row["step"] for row in read_metrics(directory, "eval")]


def stopped_in_reference(bench: Tracked) -> dict[str, Any]:
    """Two ranks, one asked to stop after its first block of the reference pass; then gone on with."""
    from stages.runtime import dpo_reference

    # Four pairs a block, so that the tiny set has several.
    dpo_reference.BLOCK_PAIRS = 4
    two = {"deepspeed": "zero1", "micro_batch_size": 1}
    codes = [bench.tracked("reference", mode="disabled", asked=_first_look_of_rank_one, ranks=2, config=two)]
    said = bench.log("reference")
    blocks = len(list((bench.root / "reference" / "work").rglob("block-*.json")))
    codes.append(bench.tracked("reference", mode="disabled", ranks=2, config=two))
    return {"codes": codes, "said": said, "blocks": blocks, "log": bench.log("reference")}


def _first_look_of_rank_one(run: Any, look: int) -> bool:
    return os.environ.get("RANK") == "1" and look == 1


def later_stages(root: Path) -> dict[str, Any]:
    """Evaluation and export of the tiny parent, each tracked offline."""
    import evaluated

    from stages.evaluate import Evaluate
    from stages.export import Export

    parents = evaluated.make_parents(root / "parents")
    suites = {"bpb": evaluated.SUITES["bpb"], "margins": {}}
    named = {name: parents[name] for name in ("from_", "data", "facts")}
    plain = {"kind": "evaluate", "from": "model", "data": "data", "facts": "facts", "suites": suites, "batch_size": 4}
    exported = {name: parents[name] for name in ("from_", "data")}
    formats = dict.fromkeys(("granite", "f16", "q8_0", "q4_0"), False)
    export = {"kind": "export", "from": "model", "data": "data", "formats": formats, "parity_tokens": 64}
    export |= {"window_tokens": 32, "timing_prompt_tokens": 8, "timing_new_tokens": 4}
    return {
        "evaluate": one_life(root, Evaluate(), Evaluate.Config.model_validate(plain), named),
        "export": one_life(root, Export(), Export.Config.model_validate(export), exported),
    }


def one_life(root: Path, stage: Any, config: Any, parents: dict[str, Path]) -> dict[str, Any]:
    """A data or export stage through the lifecycle, in a fork."""
    from kills import live

    from stages.runtime import lifecycle
    from stages.runtime.artifact import Job, canonical_digest

    identity = {"kind": stage.kind, "code_version": 1, "sources": {}}
    job = Job(
        pipeline="lives", name=stage.kind, kind=stage.kind, key=canonical_digest(identity), identity=identity,
        extension={}, config=config, model=None, seed=17, directory=root / stage.kind,
        parents={field: cases.link(field, path) for field, path in parents.items()},
    )  # fmt: skip

    def body() -> int:
        os.environ.update(OFFLINE)
        return lifecycle.execute(stage, job, lifecycle.Surroundings(root / "cache", mode="offline"))

    log = root / f"{stage.kind}.log"
    return {"codes": [live(body, log=log)], "log": log.read_text()[-3000:]}


def part(name: str, root: Path) -> dict[str, Any]:
    """What was seen of one part."""
    if name == "later":
        return later_stages(root)
    (root / name).mkdir(parents=True)
    bench = Tracked("dpo" if name == "reference" else name, root / name)
    if name == "reference":
        return {name: stopped_in_reference(bench)}
    if name in STOPPED:
        return {name: stopped_in_measurement(bench)}
    return {name: {"codes": [bench.tracked("asked", config={"eval_every_steps": 0})], "log": bench.log("asked")}}


def main() -> int:
    """Run the parts and print what was seen."""
    root, found = Path(sys.argv[1]), dict[str, Any]()
    for name in PRELOAD:
        importlib.import_module(name)
    for name in sys.argv[2:]:
        found |= part(name, root)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
