"""What training in fp8 asks of a model and a device. No torch here."""

from __future__ import annotations

import importlib.util

from model.projections import FP8_ALIGNMENT, FP8_SMALLEST, fp8_fits, fp8_projections, projections
from model.spec import ModelSpec
from stages.base import Fault

FP8_CAPABILITY = (8, 9)
"""The first compute capability with fp8 matrix products (Ada; Hopper is 9.0)."""
WAY_OUT = "set precision to bf16"


def fp8_model_faults(precision: str, model: ModelSpec | None, seq_len: int) -> list[Fault]:
    """Rows or widths that fp8 products do not take, and a model that has no projection large enough to gain."""
    if precision != "fp8" or model is None:
        return []
    # d_model and d_ff are in most products; where another size does not fit, that one is left in bf16, and said.
    sizes = {"model.d_model": model.d_model, "model.d_ff": model.d_ff, "seq_len": seq_len}
    found = [
        f"takes a multiple of {FP8_ALIGNMENT} as {name}; got {size}; set {name} to {_next(size)}, or precision to bf16"
        for name, size in sizes.items()
        if size % FP8_ALIGNMENT
    ]
    if not found and not fp8_projections(projections(model)):
        found = [f"gains nothing on a model without a projection of 1024 x 1024 or more; {WAY_OUT}"]
    return [Fault("precision", f"fp8 {message}") for message in found]


def fp8_machine_faults(precision: str, has_gpu: bool | None) -> list[Fault]:
    """A machine without a GPU, or without what the fp8 kernels are written in; None does not ask."""
    if precision != "fp8" or has_gpu is None:
        return []
    if not has_gpu:
        return [Fault("precision", f"fp8 needs a GPU; this machine has none; {WAY_OUT}")]
    if importlib.util.find_spec("triton") is None:
        return [Fault("precision", f"fp8 needs the package triton, which is not installed; install it, or {WAY_OUT}")]
    return []


def fp8_device_faults(precision: str, capability: tuple[int, int] | None) -> list[Fault]:
    """A device of ``capability`` (None: no GPU) that has no fp8 products."""
    faults = fp8_machine_faults(precision, capability is not None)
    if precision == "fp8" and capability is not None and capability < FP8_CAPABILITY:
        least, got = (".".join(map(str, pair)) for pair in (FP8_CAPABILITY, capability))
        faults.append(Fault("precision", f"fp8 needs compute capability {least} or more; got {got}; {WAY_OUT}"))
    return faults


def fp8_lines(model: ModelSpec, precision: str) -> list[str]:
    """For a run's start: which projections train in fp8, and which large ones stay in bf16 because of their sizes."""
    if precision != "fp8":
        return []
    sizes = projections(model)
    taken = set(fp8_projections(sizes))
    left: dict[str, tuple[int, int]] = {
        name.split(".", 3)[3]: size for name, size in sizes.items() if name not in taken and min(size) >= FP8_SMALLEST
    }
    head = "the head's gradients too; its logits and" if fp8_fits(model.d_model, model.vocab_size) else "the head and"
    lines = [f"fp8: {len(taken)} of {len(sizes)} projections, {head} the rest in bf16"]
    return lines + [
        f"fp8: {name} ({inputs} x {outputs}) stays in bf16: inputs must be a multiple of {FP8_ALIGNMENT}"
        for name, (inputs, outputs) in left.items()
    ]


def _next(size: int) -> int:
    return -(-size // FP8_ALIGNMENT) * FP8_ALIGNMENT
