"""What every mixer is: a module from (B, T, D) to (B, T, D) with a state for decoding and a core chosen by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from model.boundaries import Layout
from model.cache import MixerState
from model.init import Initialiser
from model.spec import ModelSpec

HALF_PRECISION = (torch.bfloat16, torch.float16)


class Mixer(nn.Module, ABC):
    """Base of all mixers. A subclass is built as ``Subclass(spec, model)`` from its own spec and the model's.

    Whatever the core, documents do not see each other, padding leaves no trace, and a call that goes on from a state
    gives what the whole sequence would have given.
    """

    initialisers: ClassVar[Mapping[str, Initialiser]] = {}
    """Parameters owned directly, each with its initialiser. They are the fp32 islands: no cast to half reaches them."""
    backends: ClassVar[Mapping[str, Callable[..., Any]]]
    """Cores by name: ``torch`` trains on any machine, ``reference`` is the paper's recurrence, token by token."""

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
        """Choose the core by name.

        Raises:
            ValueError: if this mixer has no such core; nothing falls back to another one (TRAPS K2).
        """
        chosen = "torch" if name == "auto" else name
        if chosen not in self.backends:
            raise ValueError(
                f"field backend of {type(self).__name__} must be auto or one of {sorted(self.backends)}; got {name}; "
                "set backend: torch"
            )
        self.backend = chosen

    @property
    def core(self) -> Callable[..., Any]:
        """The chosen core."""
        return self.backends[self.backend]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        owned = [getattr(self, name) for name in self.initialisers]
        kept = {id(tensor) for parameter in owned for tensor in (parameter, parameter.grad)}

        def cast(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            passes_by = id(tensor) in kept and result.dtype in HALF_PRECISION
            return tensor.to(result.device) if passes_by else result

        return super()._apply(cast, recurse)


def island(size: int) -> nn.Parameter:
    """An uninitialised vector that is never half precision: fp32, or fp64 where that is the default."""
    wide = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return nn.Parameter(torch.empty(size, dtype=wide))
