"""DeepSpeed behind one small face: accumulate gradients, take or skip a step, save, load, and prove its precision."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model import fp8
from stages.runtime import distributed, resharding, rng, zero
from stages.runtime.manifest import CheckpointError
from stages.runtime.optimizer_base import GatedAdamW

TAG = "engine"
Judge = Callable[[float], str | None]
"""Given the global gradient norm before clipping: why the step must be skipped, or None."""


DEPENDENCY_WARNINGS = (
    (r"`torch\.jit\.script_method` is deprecated", DeprecationWarning),
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
)
"""What DeepSpeed 0.19 calls that torch 2.13 is about to rename; nothing in this project can change it."""


def prepare_environment() -> None:
    """Settle device and warnings before DeepSpeed is imported."""
    for message, category in DEPENDENCY_WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


class TrainingEngine:
    """A model and its optimizer under DeepSpeed.

    Args:
        model: fp32 parameters, on any device.
        optimizer: over the model's parameters.
        config: from ``ds_config.engine_config``.
    """

    def __init__(self, model: nn.Module, optimizer: GatedAdamW, config: Mapping[str, Any]) -> None:
        prepare_environment()
        import deepspeed

        distributed.init_process_group()
        zero.support(type(optimizer))
        self.model = model
        self.optimizer = optimizer
        self.zero_stage: int = config["zero_optimization"]["stage"]
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
        zero.attach(self._engine, optimizer)
        self.device = torch.device(self._engine.device)

    def forward(self, **inputs: Any) -> Any:
        """The model's output, under the engine's autocast; tensors are moved to its device."""
        moved = {name: self._to_device(value) for name, value in inputs.items()}
        return self._engine(**moved, use_cache=False)

    def accumulate(self, inputs: Mapping[str, torch.Tensor], n_tokens: float) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its NLL sum / ``n_tokens``, detached.

        ``n_tokens`` is the number of scored tokens of the whole step over all ranks. The engine averages gradients over
        ranks, which the factor here undoes, and divides by micro-steps, which is switched off: what reaches the
        optimizer is the gradient of sum(NLL) / n_tokens, however rows were shared out (TRAPS T2).
        """
        if not self._engine.is_gradient_accumulation_boundary() and self.zero_stage < 3:
            # More micro-batches follow, on the same weights.
            fp8.keep_casts(self.model, self._engine.torch_autocast_dtype())
        loss = self.forward(**inputs, num_items_in_batch=n_tokens, return_logits=False).loss
        self._engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)
        # Moves the engine's count of micro-steps; at the boundary ``step`` does this.
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
        return loss.detach()

    def step(self, lr: float, judge: Judge) -> tuple[float, str | None]:
        """Clip and update at ``lr``, unless ``judge`` objects; returns the norm before clipping, and why not.

        Gradients are cleared either way. All ranks see the same norm, so they judge alike.
        """
        fp8.drop_casts(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before_clipping = self._plain_grad_norm() if self.zero_stage == 0 else None
        verdicts: list[tuple[float, str | None]] = []

        def gate() -> bool:
            if not verdicts:
                norm = self._sharded_grad_norm() if before_clipping is None else before_clipping
                verdicts.append((norm, judge(norm)))
            return verdicts[0][1] is None

        self.optimizer.gate = gate
        try:
            self._engine.step()
        finally:
            self.optimizer.gate = lambda: False
        if not verdicts:
            # ZeRO leaves a step with an infinite norm out by itself and never asks.
            verdicts.append((float("inf"), judge(float("inf"))))
        return verdicts[0]

    def save(self, directory: Path) -> None:
        """Write weights, optimizer and this rank's random states; collective."""
        self._engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
        save_file(rng.capture(), directory / random_states_file())

    def load(self, directory: Path) -> None:
        """Read what ``save`` wrote on any number of ranks; collective. The folder was verified before.

        Raises:
            CheckpointError: if the engine finds no checkpoint there.
        """
        saved = len(list(directory.glob("rng-*.safetensors")))
        if saved not in (0, distributed.world_size()) and self.zero_stage:
            resharding.load(self._engine, self.optimizer, directory / TAG, saved)
        else:
            path, _ = self._engine.load_checkpoint(str(directory), tag=TAG, load_lr_scheduler_states=False)
            if path is None:
                raise CheckpointError(f"{directory} holds no engine state; use another checkpoint")
        own = distributed.rank()
        rng.restore(load_file(directory / random_states_file(own % max(saved, 1))))
        if own >= saved:
            rng.part_ways(own)

    def weight_decay_by_parameter(self) -> dict[str, float]:
        """The decay that the optimizer applies to each trainable parameter, read off the engine's own groups."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {names[id(parameter)]: decay for parameters, decay in self._groups_in_use() for parameter in parameters}

    def assert_precision(self, fp32_islands: set[str], undecayed: set[str]) -> None:
        """TRAPS K7, per parameter, after engine start: fp32 storage and communication, and decay groups.

        Raises:
            RuntimeError: naming every parameter that the engine cast, or decays against the stage's will.
        """
        faults = []
        decay = self.weight_decay_by_parameter()
        for name, parameter in self.model.named_parameters():
            if not parameter.is_floating_point():
                continue  # Packed codes of a quantised weight, which is frozen.
            stored = getattr(parameter, "ds_tensor", parameter).dtype
            carried = getattr(parameter, "comm_dtype", stored)
            if {stored, carried} != {torch.float32}:
                island = " (an fp32 island)" if name in fp32_islands else ""
                faults.append(f"{name}{island} must stay float32; the engine holds {stored} and sends {carried}")
            if parameter.requires_grad and name not in decay:
                faults.append(f"{name} is in no optimizer group")
            if name in undecayed and decay.get(name, 0.0) != 0.0:
                faults.append(f"{name} must not be decayed; the engine decays it by {decay[name]}")
        missing = sorted(fp32_islands - {name for name, _ in self.model.named_parameters()})
        faults += [f"{name} is an fp32 island but no parameter" for name in missing]
        if faults:
            raise RuntimeError("; ".join(faults) + "; set another deepspeed config")

    def fingerprint(self) -> list[float]:
        """One float64 sum of squares a parameter (this rank's shard under ZeRO-3), to see whether weights changed."""
        with torch.no_grad():
            shards = [getattr(parameter, "ds_tensor", parameter) for parameter in self.model.parameters()]
            return [float(shard.detach().double().square().sum()) for shard in shards]

    def _groups_in_use(self) -> list[tuple[list[nn.Parameter], float]]:
        groups = self.optimizer.param_groups
        if self.zero_stage == 0:
            return [(group["params"], group["weight_decay"]) for group in groups]
        sharded = self._engine.optimizer
        if self.zero_stage == 3:
            owners = [sharded.sub_group_to_group_id[number] for number in range(len(sharded.fp16_groups))]
            pairs = zip(sharded.fp16_groups, owners, strict=True)
            return [(list(part), groups[owner]["weight_decay"]) for part, owner in pairs]
        return [(list(part), group["weight_decay"]) for part, group in zip(sharded.bit16_groups, groups, strict=True)]

    def _plain_grad_norm(self) -> float:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _sharded_grad_norm(self) -> float:
        return float(self._engine.optimizer._global_grad_norm)

    def _to_device(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def random_states_file(rank: int | None = None) -> str:
    """Name of the file in which the random states of ``rank``, by default this one, are kept."""
    return f"rng-{distributed.rank() if rank is None else rank:05d}.safetensors"
