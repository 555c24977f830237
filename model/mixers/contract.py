"""What every mixer is: a module from (B, T, D) to (B, T, D) with a state for decoding and a backend chosen by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from model.boundaries import Layout
from model.cache import MixerState
from model.init import Initialiser
from model.kernels.limits import KERNELS, absent_packages, limit_faults
from model.spec import ModelSpec

HALF_PRECISION = (torch.bfloat16, torch.float16)


class Mixer(nn.Module, ABC):
    """Base of all mixers. A subclass is built as ``Subclass(spec, model)`` from its own spec and the model's.

    Whatever the backend, documents do not see each other, padding leaves no trace, and a call that goes on from a state
    gives what the whole sequence would have given.

    A backend is a core of ours or another package's kernel. Kernels take half precision on CUDA and start from nothing:
    calls with a state, so prefill into a cache and decoding, go through the ``torch`` core by rule, and so do those
    that a mixer's docstring names. Under ``auto`` so does every call that no kernel takes (CPU, fp32, fp64); where a
    kernel was asked for by name, such a call is an error.
    """

    initialisers: ClassVar[Mapping[str, Initialiser]] = {}
    """Parameters owned directly, each with its initialiser. They are the fp32 islands: no cast to half reaches them."""
    backends: ClassVar[Mapping[str, Callable[..., Any]]]
    """Cores by name: ``torch`` trains on any machine, ``reference`` is the paper's recurrence, token by token."""
    kernels: ClassVar[tuple[str, ...]] = ()
    """Names of kernels, those that ``auto`` prefers first."""
    whole_row_kernels: ClassVar[tuple[str, ...]] = ()
    """Those of them that take rows of one document alone."""

    def __init__(self, spec: Any, model: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.use_backend(spec.backend)

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout, state: MixerState | None = None) -> Tensor:
        """Mix (B, T, D) over time. A state is read and updated in place; without one every row starts afresh."""

    @abstractmethod
    def new_state(self) -> MixerState:
        """An empty state."""

    def use_backend(self, name: str) -> None:
        """Choose the backend by name; ``auto`` takes the kernels that are installed and tested for this machine.

        Raises:
            ValueError: if this mixer has no such backend; nothing falls back to another one (TRAPS K2).
        """
        names = sorted({*self.backends, *self.kernels})
        if name != "auto" and name not in names:
            raise ValueError(
                f"field backend of {type(self).__name__} must be auto or one of {names}; got {name}; set backend: torch"
            )
        self.backend = name
        asked = [name] if name in self.kernels else []
        self.kernels_in_use = [one for one in self.kernels if self._can_use(one)] if name == "auto" else asked
        self.absent = absent_packages(name) if asked else []

    @property
    def core(self) -> Callable[..., Any]:
        """Our core, for the calls that no kernel takes."""
        return self.backends.get(self.backend, self.backends["torch"])

    def backend_on(self, device: torch.device, dtype: torch.dtype) -> str:
        """What computes calls without a state on ``device`` in ``dtype``, by name.

        Raises:
            ValueError: if a kernel was asked for by name and cannot run there.
        """
        given = torch.empty(0, dtype=dtype, device=device)
        taken = [name for name in self.kernels_in_use if self.takes(name, given)]
        return ", ".join(taken) or ("torch" if self.backend == "auto" else self.backend)

    def takes(self, name: str, tensor: Tensor) -> bool:
        """Whether kernel ``name`` is in use and takes what ``tensor`` is.

        Raises:
            ValueError: if it was asked for by name and cannot run here (TRAPS K2).
        """
        if name not in self.kernels_in_use:
            return False
        if self.absent:
            raise ValueError(
                f"field backend of {type(self).__name__} must name what is installed; got {name}, which needs "
                f"{' and '.join(self.absent)}; install the gpu extra, or set backend: auto"
            )
        if tensor.is_cuda and tensor.dtype in HALF_PRECISION:
            return True
        if self.backend != name:
            return False
        raise ValueError(
            f"field backend of {type(self).__name__} must fit device and precision; {name} takes bfloat16 or float16 "
            f"on cuda; got {str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}; set backend: auto"
        )

    def prepare(self, x: Tensor, layout: Layout) -> None:
        """Fill ``layout.memo`` with what layers share in a call on ``x`` (B, T, D) without a state.

        Compiled blocks can neither share what one of them makes nor make what depends on values, such as a list of
        documents.
        """

    def _can_use(self, kernel: str) -> bool:
        fits = not any(limit_faults(kernel, dict(self.spec)))
        if not fits or absent_packages(kernel) or not torch.cuda.is_available():
            return False
        return torch.cuda.get_device_capability() in KERNELS[kernel].capabilities

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        owned = [getattr(self, name) for name in self.initialisers]
        kept = {id(tensor) for parameter in owned for tensor in (parameter, parameter.grad)}

        def cast(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            passes_by = id(tensor) in kept and result.dtype in HALF_PRECISION
            return tensor.to(result.device) if passes_by else result

        return super()._apply(cast, recurse)


def projected(x: Tensor, weight: Tensor) -> Tensor:
    """An empty tensor on ``x``'s device in the dtype that a linear layer with ``weight`` gives there."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        # Packed codes of a quantised weight say nothing of the result.
        dtype = weight.dtype if weight.is_floating_point() else x.dtype
    return torch.empty(0, dtype=dtype, device=x.device)


def island(size: int) -> nn.Parameter:
    """An uninitialised vector that is never half precision: fp32, or fp64 where that is the default."""
    wide = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return nn.Parameter(torch.empty(size, dtype=wide))
