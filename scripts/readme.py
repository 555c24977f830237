"""Writes the README's computed parts (flags, presets) between their markers; a test finds any drift.

python scripts/readme.py          # rewrite README.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def flags() -> str:
    """The options of ``pipelines/run.py``, one row each."""
    from pipelines.run import option_rows

    rows = [f"| `{flag}` | {help_text} |" for flag, help_text in option_rows()]
    return "\n".join(["| flag | what |", "|---|---|", *rows])


def presets() -> str:
    """Exact figures of every preset from ``model/cost.py``."""
    from model import cost
    from model.presets import PRESETS

    heads = ["preset", "parameters", "of them embedding", "recurrent state, bytes a sequence",
             "KV cache at max_seq_len, bytes (bf16)", "training GFLOP a token"]  # fmt: skip
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, spec in PRESETS.items():
        count = cost.count_parameters(spec)
        state, cache = cost.mixer_state_bytes(spec), cost.kv_cache_bytes(spec, spec.max_seq_len)
        gflop = cost.training_flops_per_token(spec, spec.max_seq_len) / 1e9
        rows.append(f"| `{name}` | {count.total:,} | {count.embedding:,} | {state:,} | {cache:,} | {gflop:.3f} |")
    return "\n".join(rows)


PARTS = {"flags": flags, "presets": presets}


def render(text: str) -> str:
    """``text`` with every marked part written anew."""
    for name, part in PARTS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md must hold {begin} and {end}; add both where the {name} belong")
        body = f"{begin}\n{part()}\n{end}"
        text = pattern.sub(lambda _, body=body: body, text)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
