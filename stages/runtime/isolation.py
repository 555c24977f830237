"""Several stages in one process: what one of them, or a library that it imported, sets for all of it ends with it.

Imports are shared, which is why stages share a process at all; settings are not. No torch is imported here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Put back afterwards: environment, working directory, warning filters, random states, switches of NumPy and torch.

    What was imported inside gets the settings that it has in a new process.
    """
    environment, folder, state, disabled = (
        dict(os.environ),
        os.getcwd(),
        random.getstate(),
        logging.root.manager.disable,
    )
    numpy, torch = _numpy_settings(), _torch_settings()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        random.setstate(state)
        logging.disable(disabled)
        _restore_numpy(numpy)
        _restore_torch(torch)


def _numpy_settings() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else (numpy.random.get_state(), numpy.geterr())


def _restore_numpy(settings: Any) -> None:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return
    if settings is None:
        numpy.random.seed()
        numpy.seterr(divide="warn", over="warn", under="ignore", invalid="warn")
    else:
        numpy.random.set_state(settings[0])
        numpy.seterr(**settings[1])


def _torch_settings() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state(),
    }


def _restore_torch(settings: dict[str, Any] | None) -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    kept = settings or {}
    torch.set_default_dtype(kept.get("dtype", torch.float32))
    torch.set_grad_enabled(kept.get("grad", True))
    torch.use_deterministic_algorithms(kept.get("deterministic", False))
    torch.set_float32_matmul_precision(kept.get("matmul", "highest"))
    # As libgomp reads it; ``settle_threads`` has set it before anything is imported.
    torch.set_num_threads(kept.get("threads") or int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if settings is None:
        torch.seed()
    else:
        torch.set_rng_state(kept["random"])
