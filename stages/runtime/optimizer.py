"""AdamW with the right decay groups, built here so that DeepSpeed compiles nothing, and able to leave a step out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class GatedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) that takes a step only while ``gate()`` is true.

    The engine clips and calls ``step``, once for each of its groups; by then the gradient's norm is known, so this is
    where a bad step can still be left out. Shut until the loop opens it: no engine start-up counts as a step.
    """

    gate: Callable[[], bool] = staticmethod(lambda: False)

    def step(self, closure: Any = None) -> Any:
        """One AdamW step, or nothing."""
        return super().step(closure) if self.gate() else None


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


def embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the input embedding and, where it is not tied, of the head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    weights = {id(module.weight): module.weight for module in modules if module is not None}
    return list(weights.values())


def adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> GatedAdamW:
    """The fused optimizer over ``groups``; lr is 0 until the loop sets it, before every step."""
    return GatedAdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
