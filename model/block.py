"""One layer of the model: x + mixer(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from model.boundaries import Layout
from model.cache import MixerState
from model.layers import RMSNorm, SwiGLU
from model.loss import LMHead
from model.mixers import MIXERS
from model.spec import ModelSpec

COMPILED_VARIANTS = 64
"""Compiled forms of a block that may stand beside each other: kinds of layer times shapes, packed or not, training or
not. Beyond the limit torch gives up, so it lies far above what a run needs."""


class Block(GradientCheckpointingLayer):
    """A pre-norm block; ``mixer_spec`` chooses and sizes its mixer."""

    def __init__(self, mixer_spec: Any, model: ModelSpec) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(model.d_model, model.norm_eps)
        self.mixer = MIXERS[mixer_spec.mixer](mixer_spec, model)
        self.mlp_norm = RMSNorm(model.d_model, model.norm_eps)
        self.mlp = SwiGLU(model.d_model, model.d_ff)

    def forward(self, x: Tensor, layout: Layout, state: MixerState | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); the state, where given, is updated in place."""
        x = x + self.mixer(self.mixer_norm(x), layout, state)
        return x + self.mlp(self.mlp_norm(x))


def compile_parts(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each block and the loss on their own, in place; names of parameters stay.

    Blocks of one kind share their compiled form, so this takes seconds where the whole model would take minutes.
    Kernels stand inside as operators. What layers share is made before the blocks (``Mixer.prepare``).
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(fullgraph=True, dynamic=False, backend=backend)
        elif isinstance(module, LMHead):
            module.compile_loss(backend)
