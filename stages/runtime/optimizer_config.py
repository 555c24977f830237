"""Which optimizer trains, as a recipe says it, and under which engines it works. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from stages.base import Fault, Section
from stages.runtime import ds_config


class AdamWOptimizer(Section):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), fused, both moments in fp32."""

    kind: Literal["adamw"]
    """AdamW: eight bytes of state a parameter."""


class AdamW8bitOptimizer(Section):
    """AdamW whose moments of the blocks' projections are kept in eight bits (Dettmers et al. 2022, arXiv:2110.02861).

    Embedding, head, convolutions, norms, biases, decay rates and projections below 4,096 weights keep fp32 moments.
    """

    kind: Literal["adamw_8bit"]
    """Block-wise dynamic quantisation by bitsandbytes: two bytes of state a projection's weight, and a 128th."""


class MuonOptimizer(Section):
    """Muon (Jordan et al. 2024) for the blocks' projections, AdamW for everything else.

    Updates are scaled by 0.2 sqrt(max(rows, columns)), which gives them the size of AdamW's (Liu et al. 2025,
    arXiv:2502.16982, section 2.2), so ``lr`` and ``weight_decay`` mean the same for both.
    """

    kind: Literal["muon"]
    """Orthogonalised Nesterov momentum: four bytes of state a projection's weight."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Share of the old momentum that stays at each step."""


Optimizer = Annotated[AdamWOptimizer | AdamW8bitOptimizer | MuonOptimizer, Field(discriminator="kind")]
ADAMW = AdamWOptimizer(kind="adamw")


def engine_faults(optimizer: Any, facts: Mapping[str, Any], name: str) -> list[Fault]:
    """An engine under which ``optimizer`` cannot work; ``facts`` are those of ``ds_configs/name.json``.

    ZeRO-3 cuts every matrix into as many parts as there are ranks, and an off-loaded step runs on the host.
    """
    if optimizer.kind == "adamw":
        return []
    if ds_config.zero_stage(facts) == 3:
        message = f"{optimizer.kind} needs whole matrices, which ZeRO-3 cuts up"
    elif ds_config.offloads(facts):
        message = f"{optimizer.kind} steps where the weights are; an off-loaded optimizer steps on the host"
    else:
        return []
    return [Fault("optimizer", f"{message}; got {name}; set deepspeed to zero1 or zero2, or optimizer to adamw")]
