"""The DeepSpeed engine that the trainer's library built, behind the same face as pretraining's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.runtime import rng, zero
from stages.runtime.engine import TAG, TrainingEngine, random_states_file
from stages.runtime.manifest import CheckpointError
from stages.runtime.optimizer_base import GatedAdamW


class AdoptedEngine(TrainingEngine):
    """A DeepSpeed engine made elsewhere over ``model`` and ``optimizer``.

    Frozen parameters, where there are any, stay out of checkpoints: they are the parent's.
    """

    def __init__(self, engine: Any, model: nn.Module, optimizer: GatedAdamW) -> None:
        self.model = model
        self.optimizer = optimizer
        self.zero_stage: int = engine.zero_optimization_stage()
        self._engine = engine
        zero.attach(engine, optimizer)
        self.device = torch.device(engine.device)
        self._has_frozen = any(not parameter.requires_grad for parameter in model.parameters())

    def backward(self, loss: torch.Tensor, *, is_last: bool, **kwargs: Any) -> None:
        """Backward of one micro-batch; ``is_last`` of a step makes the engine bring the ranks' gradients together."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        self._engine.backward(loss, **kwargs)

    def save(self, directory: Path) -> None:
        """Write trained weights, optimizer and this rank's random states; collective."""
        self._engine.save_checkpoint(
            str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=self._has_frozen
        )
        save_file(rng.capture(), directory / random_states_file())

    def load(self, directory: Path) -> None:
        """Read what ``save`` wrote, random states left out (``restore_random``); collective.

        Raises:
            CheckpointError: if the engine finds no checkpoint there.
        """
        path, _ = self._engine.load_checkpoint(
            str(directory), tag=TAG, load_lr_scheduler_states=False, load_module_strict=not self._has_frozen
        )
        if path is None:
            raise CheckpointError(f"{directory} holds no engine state; use another checkpoint")

    @staticmethod
    def restore_random(directory: Path) -> None:
        """Put this rank's random generators where ``save`` found them."""
        rng.restore(load_file(directory / random_states_file()))
