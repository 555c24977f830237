"""Where and how a benchmark ran, beside what it measured, as one JSON file."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Run as a script, only this folder is on the path.
    sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("torch", "transformers", "tokenizers", "numpy", "gguf", "xllamacpp"),
    *("deepspeed", "triton", "mamba-ssm", "causal-conv1d", "fla-core", "torchao"),
)


def write_result(path: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write ``rows`` with command, date, commit, versions and hardware; host and user stay out of it."""
    from stages.runtime.artifact import git_state, hardware

    content = {
        "benchmark": Path(sys.argv[0]).stem,
        "command": _command(),
        "date": _today(),
        "git": git_state(ROOT),
        "hardware": hardware(),
        "versions": _versions(),
        "settings": settings,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def provenance(commit: str | None = None) -> dict[str, Any]:
    """What a row needs to be told from one of another day: hardware, versions, commit, date, command."""
    from stages.runtime.artifact import git_state, hardware

    return {
        "hardware": hardware(),
        "versions": _versions(),
        "commit": commit or git_state(ROOT).get("commit"),
        "date": _today(),
        "command": _command(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """``rows`` as a Markdown table; the first one's keys are the columns."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows)])


def _command() -> str:
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_short, sys.argv[1:])])


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        # A machine with a GPU lacks llama.cpp, and the other way round.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(argument: str) -> str:
    """A path outside the repository by its last parts: the folders above it say nothing to a reader."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(Path(*path.parts[-3:]))
