"""Every initial value of every parameter, in one file, and which parameters are exempt from decay or from bf16.

A mixer names the initialiser of each parameter that it owns directly (``Mixer.initialisers``); linear layers,
convolutions, embeddings and norms go by their type. Drawing uses torch's global generator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.layers import CausalConv, GatedRMSNorm, ResidualProjection, RMSNorm

Initialiser = Callable[..., Tensor]
"""Called as ``initialiser(parameter, spec=...)`` with the mixer's spec; gives the values in the parameter's shape."""

DECAY_RANGE = (1.0, 16.0)
"""Mamba-2's A = -exp(A_log), drawn uniformly (reference implementation of arXiv:2405.21060)."""
DT_RANGE = (1e-3, 1e-1)
"""Mamba's step sizes, drawn log-uniformly (arXiv:2312.00752, section 3.6)."""
GATE_MEMORY_TOKENS = (8.0, 1024.0)
"""Tokens after which a GLA key channel has decayed to 1/e at zero input, drawn log-uniformly: short and long."""


def ones(parameter: Tensor, spec: Any) -> Tensor:
    """All ones."""
    return torch.ones_like(parameter)


def log_decay(parameter: Tensor, spec: Any) -> Tensor:
    """``A_log``: the logarithm of a decay rate drawn uniformly from ``DECAY_RANGE``."""
    return torch.empty_like(parameter).uniform_(*DECAY_RANGE).log()


def step_bias(parameter: Tensor, spec: Any) -> Tensor:
    """``dt_bias``: softplus(dt_bias) is log-uniform in ``DT_RANGE``."""
    step = _log_uniform(parameter, *DT_RANGE)
    return step + torch.log(-torch.expm1(-step))


def gate_bias(parameter: Tensor, spec: Any) -> Tensor:
    """GLA's gate bias: logsigmoid(bias) / tau = -1 / L with L log-uniform in ``GATE_MEMORY_TOKENS``."""
    memory = _log_uniform(parameter, *GATE_MEMORY_TOKENS)
    return -torch.log(torch.expm1(spec.gate_normalizer / memory))


def initialise(module: nn.Module, std: float, n_layers: int) -> None:
    """Set the parameters that ``module`` owns directly, except those that a checkpoint has already filled.

    Linear and embedding weights are normal with ``std``, the residual projections' with
    ``std / sqrt(2 n_layers)`` (Radford et al. 2019); norms are one; the convolution is uniform within 1 / sqrt(taps).
    """
    if isinstance(module, nn.Linear):
        own_std = std / math.sqrt(2 * n_layers) if isinstance(module, ResidualProjection) else std
        _fill(module.weight, lambda weight: torch.empty_like(weight).normal_(0.0, own_std))
        if module.bias is not None:
            _fill(module.bias, torch.zeros_like)
    elif isinstance(module, nn.Embedding):
        _fill(module.weight, lambda weight: torch.empty_like(weight).normal_(0.0, std))
    elif isinstance(module, RMSNorm | GatedRMSNorm):
        _fill(module.weight, torch.ones_like)
    elif isinstance(module, CausalConv):
        bound = 1.0 / math.sqrt(module.weight.shape[-1])
        _fill(module.weight, lambda weight: torch.empty_like(weight).uniform_(-bound, bound))
        _fill(module.bias, lambda bias: torch.empty_like(bias).uniform_(-bound, bound))
    initialisers: dict[str, Initialiser] = getattr(module, "initialisers", {})
    for name, initialiser in initialisers.items():
        _fill(getattr(module, name), functools.partial(initialiser, spec=module.spec))


def fp32_islands(model: nn.Module) -> set[str]:
    """Names of the parameters that stay fp32 whatever the rest is cast to: decay rates, step and gate biases, skips."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "initialisers", {})
    }


def no_decay(name: str, parameter: Tensor) -> bool:
    """Whether weight decay must leave ``parameter`` alone: vectors (norms, biases) and every fp32 island.

    ``name`` is the parameter's full name in its model; an island is known by it, whatever its shape.
    """
    # The mixers import this file.
    from model.mixers import MIXERS

    islands = {own for mixer in MIXERS.values() for own in mixer.initialisers}
    # ZeRO-3 flattens what it partitions and keeps the true shape beside it.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) < 2 or name.rsplit(".", 1)[-1] in islands


def _fill(parameter: Tensor, make: Callable[[Tensor], Tensor]) -> None:
    # transformers marks what came from a checkpoint; overwriting it would lose trained weights.
    if getattr(parameter, "_is_hf_initialized", False):
        return
    with torch.no_grad():
        parameter.copy_(make(parameter))


def _log_uniform(parameter: Tensor, low: float, high: float) -> Tensor:
    return torch.empty_like(parameter).uniform_(math.log(low), math.log(high)).exp()
