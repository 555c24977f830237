"""The random states of one process, captured, restored, and kept still while something is measured."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed torch (all devices), numpy and Python alike."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> dict[str, torch.Tensor]:
    """States of torch, this process's GPU, numpy and Python, as tensors, so that they can be kept in safetensors.

    ``numpy`` holds the keys, the position and whether a normal draw waits in ``numpy_gauss``. ``python`` holds the
    version and the internal state; ``python_gauss`` is NaN where no draw waits.
    """
    _, keys, position, has_gauss, waiting = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    gpu = {"cuda0": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {
        "torch": torch.get_rng_state(),
        **gpu,
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([waiting], dtype=torch.float64),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
    }


def restore(state: dict[str, torch.Tensor]) -> None:
    """Put every generator back where ``capture`` found it."""
    torch.set_rng_state(state["torch"])
    gpus = [state[name] for name in sorted(state) if name.startswith("cuda")]
    if gpus and torch.cuda.is_available():
        # Older checkpoints hold the states of all GPUs that the process saw.
        torch.cuda.set_rng_state(gpus[torch.cuda.current_device() % len(gpus)])
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    version, *internal = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(internal), None if math.isnan(gauss) else gauss))


def part_ways(number: int) -> None:
    """Seed every generator anew from torch's present state and ``number``: a rank that took up another one's states."""
    seed_all((int(torch.randint(2**62, ())) + number) % 2**63)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave every generator as it was found, whatever happens inside (TRAPS M2)."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
