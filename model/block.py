"""One layer of the model: x + mixer(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from model.boundaries import Layout
from model.cache import MixerState
from model.layers import RMSNorm, SwiGLU
from model.mixers import MIXERS
from model.spec import ModelSpec


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
