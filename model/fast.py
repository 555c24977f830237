"""Which layers of a model would train on something slower than a kernel that was tested for the device, and why."""

from __future__ import annotations

import torch

from model.kernels.limits import KERNELS, absent_packages, limit_faults
from model.mixers import MIXERS, Mixer
from model.spec import MixerSpec, ModelSpec


def slow_layers(spec: ModelSpec, precision: str) -> dict[str, str]:
    """By the word of each mixer without a fast kernel for packed rows: its layers, and what is missing."""
    found = {}
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for word, mixer in spec.mixers.items():
        names = _candidates(MIXERS[mixer.mixer], mixer)
        reasons = [_reason(name, mixer, precision, capability) for name in names]
        if None not in reasons:
            layers = ", ".join(str(index) for index, one in enumerate(spec.layer_words) if one == word)
            why = "; ".join(filter(None, reasons)) or f"{mixer.backend} is none for packed rows; set auto"
            found[word] = f"must be a kernel tested for the device in layers {layers} ({mixer.mixer}); {why}"
    return found


def _candidates(kind: type[Mixer], mixer: MixerSpec) -> list[str]:
    """Kernels that the layer could take for packed rows."""
    general = [name for name in kind.kernels if name not in kind.whole_row_kernels]
    return general if mixer.backend == "auto" else [name for name in general if name == mixer.backend]


def _reason(name: str, mixer: MixerSpec, precision: str, capability: tuple[int, int] | None) -> str | None:
    """Why kernel ``name`` cannot be had; None where it can."""
    if capability is None:
        return f"{name} needs a GPU, and this machine has none"
    if precision == "fp32":
        return f"{name} takes half precision, and precision is fp32"
    if absent := absent_packages(name):
        return f"{name} needs {' and '.join(absent)}, not installed"
    for field, message, _ in limit_faults(name, dict(mixer)):
        return f"{field} {message}"
    if capability not in KERNELS[name].capabilities:
        return f"{name} is not tested on compute capability {'.'.join(map(str, capability))}"
    return None
