"""The same preference run on one rank and on two, under ZeRO-1 and ZeRO-2, forked from one process that imported all.

Run as a script by ``test_dpo_ranks.py``: prints one JSON object of losses, held-out margins and how far weights differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:1] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from finetune_lives import Bench  # noqa: E402

RUNS = {
    "one": (1, {"deepspeed": "zero1", "micro_batch_size": 2}),
    "one-by-four": (1, {"deepspeed": "zero1", "micro_batch_size": 4}),
    "two-zero1": (2, {"deepspeed": "zero1", "micro_batch_size": 2}),
    "two-zero2": (2, {"deepspeed": "zero2", "micro_batch_size": 1}),
}


def seen(bench: Bench, name: str) -> dict[str, Any]:
    """What a run logged."""
    from stages.runtime.tracking import read_metrics

    rows = read_metrics(bench.root / name)
    return {
        "losses": [row["loss_nats"] for row in rows if row["event"] == "train"],
        "first_margin": next(row["rewards/margins"] for row in rows if row["event"] == "train"),
        "margins": [row["margin_nats"] for row in rows if row["event"] == "eval"],
    }


def distance(bench: Bench, name: str, other: str) -> float:
    """Euclidean distance of two runs' weights over the way that the first came from the parent."""
    from safetensors.torch import load_file

    def weights(folder: Path) -> dict[str, Any]:
        return load_file(folder / "output" / "model.safetensors")

    one, two, parent = (weights(path) for path in (bench.root / name, bench.root / other, bench.inputs["from_"]))
    apart = sum(float((one[key] - two[key]).double().square().sum()) for key in one)
    return (apart / sum(float((one[key] - parent[key]).double().square().sum()) for key in one)) ** 0.5


def main() -> int:
    """Run everything and print what was seen."""
    root = Path(sys.argv[1])
    root.mkdir(parents=True)
    bench = Bench("dpo", root)
    bench.warm_up()
    codes = {name: bench.life(name, ranks=ranks, config=config) for name, (ranks, config) in RUNS.items()}
    found = {name: seen(bench, name) if codes[name] == 0 else {"log": bench.log(name)} for name in RUNS}
    apart = {name: distance(bench, "one", name) for name in RUNS if codes["one"] == codes[name] == 0}
    print(json.dumps({"codes": codes, "runs": found, "apart": apart}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
