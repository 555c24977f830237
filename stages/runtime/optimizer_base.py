"""AdamW that can leave a step out, and what optimizers of another kind for some groups have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stages.runtime import adamw
from stages.runtime.flat import Layout, whole


class GatedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) that takes a step only while ``gate()`` is true.

    The engine clips and calls ``step``, once for each of its groups; by then the gradient's norm is known, so this is
    where a bad step can still be left out. Shut until the loop opens it: no engine start-up counts as a step.
    """

    gate: Callable[[], bool] = staticmethod(lambda: False)
    layouts: dict[int, Layout]
    """By the id of a flat tensor that stands in a group for several parameters: what lies where in it."""
    pieces: dict[int, adamw.Pieces]
    """During a step, by the id of a flat tensor without ``grad``: its gradient in pieces."""
    factor: float
    """What ``pieces`` must be multiplied by."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layouts, self.pieces, self.factor = {}, {}, 1.0

    def step(self, closure: Any = None) -> Any:
        """One AdamW step, or nothing."""
        if not self.gate():
            return None
        return self._step_by_pieces() if self.pieces else super().step(closure)

    @torch.no_grad()
    def _step_by_pieces(self) -> None:
        """The same, without one flat gradient, which would be a copy of all of them."""
        members = [(group, flat) for group in self.param_groups for flat in group["params"]]
        for _, flat in members:
            if not self.state[flat]:
                self.state[flat].update(adamw.empty_state(flat))
            self.state[flat]["step"] += 1
        # All are read before any work is started, for which a later read would wait.
        counts = [float(self.state[flat]["step"]) for _, flat in members]
        for (group, flat), count in zip(members, counts, strict=True):
            beta1, beta2 = group["betas"]
            rule = adamw.Rule(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], count, self.factor)
            adamw.update(flat, self.state[flat], self.layouts[id(flat)], self.pieces[id(flat)], rule)


class SplitOptimizer(GatedAdamW):
    """AdamW for all groups but those with ``"own": True``, which a subclass updates by ``update``.

    Its state is saved and loaded as it stands: tensors keep their dtypes.
    """

    def step(self, closure: Any = None) -> Any:
        """One step of both parts, or nothing."""
        if not self.gate():
            return None
        groups = self.param_groups
        plain = [group for group in groups if not group["own"]]
        if plain:
            self.param_groups = plain
            try:
                super().step(closure)
            finally:
                self.param_groups = groups
        with torch.no_grad():
            for group in groups:
                if group["own"]:
                    for parameter in group["params"]:
                        self._update_parameter(group, parameter)
        return None

    def update(
        self,
        group: dict[str, Any],
        state: dict[str, Any],
        flat: torch.Tensor,
        gradients: list[torch.Tensor],
        layout: Layout,
    ) -> None:
        """Update ``flat`` (1-D, what of the group lies on this rank), already decayed.

        ``gradients`` of ``layout``'s pieces, 1-D, may be used up.
        """
        raise NotImplementedError

    def load_state_dict(self, state_dict: Any) -> None:
        """Take up what ``state_dict`` gave; torch would cast every tensor to its parameter's dtype."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, _parameters(self.param_groups), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
                    self.state[parameter][name] = value.to(parameter.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's own looks for the step count of every state, which ours need not have, to mend old checkpoints.
        torch.optim.Optimizer.__setstate__(self, state)

    def _update_parameter(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        layout = self.layouts.get(id(parameter)) or whole(parameter)
        if pieces := self.pieces.get(id(parameter)):
            gradients = pieces.rows()
            if self.factor != 1.0:
                torch._foreach_mul_(gradients, self.factor)
        elif parameter.grad is not None:
            gradients = layout.split(parameter.grad.reshape(-1))
        else:
            return
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        self.update(group, self.state[parameter], parameter.view(-1), gradients, layout)


def _parameters(groups: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [parameter for group in groups for parameter in group["params"]]
