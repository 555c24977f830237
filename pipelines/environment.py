"""Whether this Python has what the commands need; nothing here needs anything but Python itself."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
NEEDED = ("pydantic", "yaml", "numpy", "torch", "transformers", "safetensors", "deepspeed", "jinja2")
"""Modules without which no command goes far; the others that stages need come with them."""


def fault(argv: Sequence[str]) -> str | None:
    """What is missing and what to do about it, in one line; None where nothing is, or only help is asked for."""
    if {"-h", "--help"} & set(argv[1:]):
        return None
    if sys.version_info < MIN_PYTHON:
        lacks = f"is {sys.version_info.major}.{sys.version_info.minor}, older than {'.'.join(map(str, MIN_PYTHON))}"
    elif missing := [name for name in NEEDED if not _is_there(name)]:
        lacks = f"has no {', '.join(missing)}"
    else:
        return None
    script = Path(argv[0])
    name = str(script.relative_to(ROOT)) if script.is_absolute() and script.is_relative_to(ROOT) else str(script)
    there = (ROOT / ".venv" / ".installed").exists()
    # What follows the script is not repeated: it may hold a secret, and the person has just typed it.
    again = shlex.join([".venv/bin/python", name])
    way = f"start it with {again}" if there else f"run `make env` in {ROOT} once, then start it with {again}"
    return f"this Python ({sys.executable}) {lacks}: {way}"


def _is_there(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ValueError:
        return False
