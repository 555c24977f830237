"""The linear projections of a model's blocks, by their full names: what can be quantised and adapted. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from model.mixer_cost import MIXER_COSTS
from model.spec import ModelSpec

Sizes = Mapping[str, tuple[int, int]]
"""Inputs and outputs of each projection by its full name."""
FP8_SMALLEST, FP8_ALIGNMENT = 1024, 16
"""Inputs and outputs from which 8-bit products gain more than their casts cost; inputs must be multiples of the second.
"""


def projections(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """``(inputs, outputs)`` of every linear projection of the blocks: ``{"model.layers.0.mixer.in_proj": (...)}``.

    All go through ``nn.Linear`` and its ``forward``, so an adapter or a quantised layer may take their place; embedding
    and head are not among them.
    """
    found = {}
    for index, mixer in enumerate(spec.layer_mixers):
        block = f"model.layers.{index}"
        for name, size in MIXER_COSTS[mixer.mixer].projections(mixer, spec.d_model).items():
            found[f"{block}.mixer.{name}"] = size
        wide, narrow = (spec.d_model, spec.d_ff), (spec.d_ff, spec.d_model)
        found |= {f"{block}.mlp.gate_proj": wide, f"{block}.mlp.up_proj": wide, f"{block}.mlp.down_proj": narrow}
    return found


def fp8_fits(inputs: int, outputs: int) -> bool:
    """Whether a projection, or a head, of these sizes trains in 8 bits."""
    return min(inputs, outputs) >= FP8_SMALLEST and inputs % FP8_ALIGNMENT == 0


def fp8_projections(sizes: Sizes) -> list[str]:
    """The names of those that ``model.fp8`` trains in 8 bits; the others stay in bf16."""
    return [name for name, (inputs, outputs) in sizes.items() if fp8_fits(inputs, outputs)]


def matching(names: Iterable[str], part: str) -> list[str]:
    """The full names that ``part`` stands for: its dotted words follow one another in the name.

    ``in_proj``, ``mixer``, ``layers.3`` and ``layers.3.mlp.up_proj`` are parts of ``model.layers.3.mlp.up_proj`` or its
    neighbours; ``proj`` is not.
    """
    return [name for name in names if f".{part}." in f".{name}."] if part else []


def nearest(names: Iterable[str], part: str) -> list[str]:
    """Up to three last words of ``names`` that look most like ``part``."""
    words = sorted({word for name in names for word in (_last_word(name),)})
    return difflib.get_close_matches(part.rpartition(".")[2], words, n=3, cutoff=0)


def _last_word(name: str) -> str:
    """``gk_proj`` for ``...gk_proj.1``: a number is no name."""
    return next(word for word in reversed(name.split(".")) if not word.isdigit())
