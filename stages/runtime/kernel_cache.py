"""Where compiled and tuned kernels are kept from one start to the next. No torch here.

Triton and torch's compiler read their cache directories from the environment when they first compile. What the operator
has set there goes before ours.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

TRITON, INDUCTOR = "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"
KEPT_TUNING = "TRITON_CACHE_AUTOTUNING"


def use_kernel_cache(directory: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let kernels be kept below ``directory``, what autotuning chose included."""
    environment.setdefault(TRITON, str(directory / "triton"))
    environment.setdefault(INDUCTOR, str(directory / "inductor"))
    environment.setdefault(KEPT_TUNING, "1")


def kernel_cache(environment: MutableMapping[str, str] = os.environ) -> str:
    """Where kernels are kept, for a person."""
    found = dict.fromkeys(environment[name] for name in (TRITON, INDUCTOR) if name in environment)
    if not found:
        return "the libraries' own cache directories"
    parents = {str(Path(path).parent) for path in found}
    return parents.pop() if len(parents) == 1 else " and ".join(found)
