"""Models and engines of a benchmark of several points: made small for a try, counted, and emptied when done."""

from __future__ import annotations

import argparse
from typing import Any


def spec_of(arguments: argparse.Namespace) -> Any:
    """The preset; narrower and with other layers where it is only tried out."""
    from model.presets import preset

    fields = preset(arguments.preset).model_dump()
    if arguments.layers:
        fields["layers"] = arguments.layers.replace("+", " ")
    for name in ("d_model", "d_ff", "vocab_size"):
        fields[name] //= arguments.shrink
    for mixer in fields["mixers"].values():
        for name in ("n_heads", "n_kv_heads"):
            if mixer.get(name):
                mixer[name] = max(1, mixer[name] // arguments.shrink)
    return type(preset(arguments.preset)).model_validate(fields)


def sizes(model: Any, config: dict[str, Any]) -> tuple[int, int]:
    """Parameters, and those among them that ZeRO-3 keeps whole on every rank."""
    numels = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()]
    threshold = config["zero_optimization"].get("stage3_param_persistence_threshold", 100_000)
    return sum(numels), sum(numel for numel in numels if numel < threshold)


def give_back(engine: Any) -> None:
    """Empty the tensors of a point that is done: DeepSpeed's hooks hold on to an engine that nobody else holds."""
    import torch

    zero = engine._engine.optimizer
    held = [getattr(weight, "ds_tensor", weight) for weight in engine.model.parameters()]
    held += list(engine.model.parameters())
    held += [weight for group in engine.optimizer.param_groups for weight in group["params"]]
    for name in ("bit16_groups_flat", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        held += list(getattr(zero, name, ()))
    held += [part for state in engine.optimizer.state.values() for part in state.values()]
    for tensor in held:
        for part in (tensor, getattr(tensor, "grad", None)):
            if isinstance(part, torch.Tensor):
                part.untyped_storage().resize_(0)
