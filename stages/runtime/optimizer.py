"""The optimizer of a run, with groups built here, so that DeepSpeed neither compiles anything nor chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from stages.runtime.optimizer_8bit import LEAST_ELEMENTS, AdamW8bit
from stages.runtime.optimizer_base import GatedAdamW
from stages.runtime.optimizer_muon import Muon


def make_optimizer(
    model: nn.Module, config: Any, *, decay_embeddings: bool, exempt: Callable[[str, nn.Parameter], bool]
) -> GatedAdamW:
    """The optimizer that ``config.optimizer`` names over ``model``'s trainable parameters; lr is 0 until it is set.

    ``exempt`` and ``decay_embeddings`` are ``parameter_groups``'s.

    Raises:
        ValueError: if nothing can be trained.
    """
    groups = parameter_groups(model, weight_decay=config.weight_decay, decay_embeddings=decay_embeddings, exempt=exempt)
    if config.optimizer.kind == "adamw":
        return adamw(groups, betas=config.betas, eps=config.eps)
    common = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "fused": True}
    projections = projection_weights(model)
    if config.optimizer.kind == "muon":
        return Muon(with_own(groups, projections), momentum=config.optimizer.momentum, **common)
    large = {id(weight) for weight in model.parameters() if weight.numel() >= LEAST_ELEMENTS}
    return AdamW8bit(with_own(groups, projections & large), **common)


def adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> GatedAdamW:
    """The fused optimizer over ``groups``; lr is 0 until the loop sets it, before every step."""
    return GatedAdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    decay_embeddings: bool,
    exempt: Callable[[str, nn.Parameter], bool],
) -> list[dict[str, Any]]:
    """Two groups: what AdamW decays, and what it does not.

    ``exempt(name, parameter)`` says what is never decayed (norms, biases, A_log, D, dt_bias). Embedding and head are
    exempt too unless ``decay_embeddings``. A tied head is one parameter, listed once.

    Raises:
        ValueError: if nothing can be trained.
    """
    embeddings = {id(parameter) for parameter in embedding_parameters(model)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_kept = (not decay_embeddings) if id(parameter) in embeddings else exempt(name, parameter)
            (kept if is_kept else decayed).append(parameter)
    if not decayed and not kept:
        raise ValueError("model must have a trainable parameter; got none; unfreeze some")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def with_own(groups: list[dict[str, Any]], chosen: set[int]) -> list[dict[str, Any]]:
    """``groups`` with every one parted in two: parameters whose id is in ``chosen`` get ``"own": True``."""
    parted = []
    for group in groups:
        for own in (True, False):
            members = [parameter for parameter in group["params"] if (id(parameter) in chosen) is own]
            parted += [{**group, "params": members, "own": own}] if members else []
    return parted


def projection_weights(model: nn.Module) -> set[int]:
    """Ids of the weights of the blocks' linear projections: ``nn.Linear`` but for the head.

    Convolutions, which are matrices by their dimensions alone, are none (DeepSpeed's rule for Muon takes them).
    """
    embeddings = {id(weight) for weight in embedding_parameters(model)}
    weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return weights - embeddings


def embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the input embedding and, where it is not tied, of the head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    weights = {id(module.weight): module.weight for module in modules if module is not None}
    return list(weights.values())
