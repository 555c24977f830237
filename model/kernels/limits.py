"""What each kernel takes, as data: checked when a recipe is read, and when ``auto`` chooses. No torch here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

HOPPER = (9, 0)
"""Compute capability of H100 and H200."""


@dataclass(frozen=True)
class KernelFacts:
    """One kernel family: the packages that it needs, and the values of a mixer's fields that it was tested with.

    ``rooms`` are files of ours beside this one that the family needs; a model that was flattened into one file has
    left them behind. ``capabilities`` are the GPUs on which it passed the parity tests: ``auto`` takes it there alone.
    """

    packages: tuple[str, ...] = ()
    fields: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rooms: tuple[str, ...] = ()
    capabilities: tuple[tuple[int, int], ...] = (HOPPER,)


KERNELS: dict[str, KernelFacts] = {
    # Ours: every part of Mamba-2 between its projections (mamba2_core.py), and GLA's scan (gla_core.py).
    "triton": KernelFacts(
        ("triton",),
        {
            "head_dim": (64, 128),
            "d_state": (64, 128),
            "d_conv": (2, 3, 4),
            "head_k_dim": (64, 128),
            "head_v_dim": (64, 128),
        },
        rooms=("conv_triton", "gated_norm_triton", "gla_triton", "ssd_triton", "steps_triton"),
    ),
    "mamba_ssm": KernelFacts(
        ("mamba_ssm", "causal_conv1d"),
        {"head_dim": (64, 128), "d_state": (64, 128), "d_conv": (2, 3, 4), "chunk_size": (64, 128, 256)},
    ),
    # chunk_size: fla's chunked form cuts into 64 tokens, whatever one asks for.
    "fla": KernelFacts(("fla",), {"head_k_dim": (64, 128), "head_v_dim": (64, 128), "chunk_size": (64,)}),
    "sdpa_cudnn": KernelFacts((), {"head_dim": (64, 128)}),
    "varlen": KernelFacts((), {"head_dim": (64, 128), "global_tokens": (0,)}),
    "flex": KernelFacts((), {"head_dim": (64, 128)}),
    # Passed on Hopper in bf16 at head_dim 128, in a build for those alone; others are untested. Never by auto: cuDNN's
    # and torch's kernels take the same calls without a build.
    "flash_attn": KernelFacts(("flash_attn",), {"head_dim": (64, 128), "global_tokens": (0,)}, capabilities=()),
}
"""Kernels by the name that a mixer's ``backend`` has for them."""


def limit_faults(name: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Fields of a mixer that kernel ``name`` does not take: the field, how to mend it, its value.

    A field that ``fields`` does not hold takes no part; nor does a name that is no kernel's.
    """
    limits = KERNELS[name].fields if name in KERNELS else {}
    for own, allowed in limits.items():
        value = fields.get(own, allowed[0])
        if value not in allowed:
            nearest = " or ".join(map(str, _nearest(value, allowed)))
            message = f"must be one of {list(allowed)} for backend {name}; got {value}; set {nearest}, or backend torch"
            yield own, message, value


def absent_packages(name: str) -> list[str]:
    """Packages, and files of ours, that kernel ``name`` needs and this interpreter does not find."""
    facts = KERNELS[name]
    absent = [package for package in facts.packages if importlib.util.find_spec(package) is None]
    return absent + [room for room in facts.rooms if not _stands_beside(room)]


def _stands_beside(room: str) -> bool:
    return bool(__package__) and importlib.util.find_spec(f".{room}", __package__) is not None


def _nearest(value: int, allowed: tuple[int, ...]) -> list[int]:
    """The allowed values next to ``value``, below and above."""
    below, above = [one for one in allowed if one < value], [one for one in allowed if one > value]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]
