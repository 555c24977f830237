"""Our Triton kernels on a CPU: Triton's interpreter runs them in numpy, so they are tested without a GPU."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def kernels(name: str) -> Any:
    """The file ``name`` of ``model.kernels`` with its kernels interpreted; the test is skipped where that cannot be.

    Triton decides when it is first imported, so the variable stands for the whole process (tests/conftest.py).
    """
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here, for a GPU: pytest -m gpu")
    _let_numbers_be_indices()
    return importlib.import_module(f"model.kernels.{name}")


def _let_numbers_be_indices() -> None:
    """The interpreter holds a number as an array of one, which numpy 2.4 no longer takes for ``range``'s end."""
    from triton.runtime import interpreter

    def patch(tensor: Any, scope: Any) -> None:
        interpreter_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: int(number.handle.data.item()))

    interpreter_patch = interpreter._patch_lang_tensor
    if interpreter_patch.__module__ != __name__:
        interpreter._patch_lang_tensor = patch
