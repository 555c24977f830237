"""AdamW that can leave a step out, and what optimizers of another kind for some groups have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stages.runtime.flat import Layout, whole


class GatedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) that takes a step only while ``gate()`` is true.

    The engine clips and calls ``step``, once for each of its groups; by then the gradient's norm is known, so this is
    where a bad step can still be left out. Shut until the loop opens it: no engine start-up counts as a step.
    """

    gate: Callable[[], bool] = staticmethod(lambda: False)
    layouts: dict[int, Layout]
    """By the id of a flat tensor that stands in a group for several parameters: what lies where in it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layouts = {}

    def step(self, closure: Any = None) -> Any:
        """One AdamW step, or nothing."""
        return super().step(closure) if self.gate() else None


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
        self, group: dict[str, Any], state: dict[str, Any], flat: torch.Tensor, gradient: torch.Tensor, layout: Layout
    ) -> None:
        """Update ``flat`` (1-D, what of the group lies on this rank), already decayed; ``gradient`` may be used up."""
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
        if parameter.grad is None:
            return
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        layout = self.layouts.get(id(parameter)) or whole(parameter)
        self.update(group, self.state[parameter], parameter.view(-1), parameter.grad.reshape(-1), layout)


def _parameters(groups: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [parameter for group in groups for parameter in group["params"]]
