"""A mixin that leaves TRL's trainers their losses and takes from them everything that decides when and how to step.

``class Owned(OwnedTrainer, trl.SFTTrainer)``: the mixin goes first, so that its methods win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from stages.runtime import distributed

if TYPE_CHECKING:
    from stages.runtime.finetune import Finetuning


class AlreadyTrained(Exception):  # noqa: N818 - a fact, not an error
    """The checkpoint that the run went on from is that of its last step."""


class RowOrder(torch.utils.data.Sampler):
    """Indices of ``rows`` rows of a data set of ``size``: permutation after permutation, from row ``first()`` on.

    A pure function of ``seed`` and the row's number, so that a resumed run sees what the uninterrupted one would. The
    length is always the whole run's: the library counts its steps by it.
    """

    def __init__(self, size: int, *, rows: int, seed: int, first: Callable[[], int] = lambda: 0) -> None:
        self.size, self.rows, self.seed, self.first = size, rows, seed, first

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        row, order, epoch = self.first(), [], -1
        while row < self.rows:
            if row // self.size != epoch:
                epoch = row // self.size
                order = self.permutation(epoch)
            yield order[row % self.size]
            row += 1

    def permutation(self, epoch: int) -> list[int]:
        """The order of pass ``epoch`` over the data."""
        # Consecutive seeds give unrelated streams: the generator hashes its seed.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.size, generator=generator).tolist()


class OwnedTrainer:
    """Optimizer, learning rate, step guard, order of rows, logging and checkpoints are the stage's.

    Args:
        finetuning: the run that this trainer works for; the other arguments are the TRL trainer's.
    """

    if TYPE_CHECKING:
        optimizer: Any
        lr_scheduler: Any
        train_dataset: Any
        model: Any

    def __init__(self, *args: Any, finetuning: Finetuning, **kwargs: Any) -> None:
        self.finetuning = finetuning
        super().__init__(*args, **kwargs)
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)  # type: ignore[attr-defined]

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW over our groups, which takes a step only when the guard lets it."""
        if self.optimizer is None:
            self.optimizer = self.finetuning.make_optimizer()
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A schedule that only answers: the rate is set with every step."""
        self.lr_scheduler = _Rate(self.finetuning)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        finetuning = self.finetuning
        batch = finetuning.config.global_batch_size
        return RowOrder(
            len(self.train_dataset if train_dataset is None else train_dataset),
            rows=finetuning.config.max_steps * batch,
            seed=finetuning.context.seed,
            first=lambda: finetuning.state.step * batch,
        )

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The library's loss; tokens of training batches are counted."""
        if self.model.training:
            self.finetuning.loop.count(*self.count_tokens(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def count_tokens(self, inputs: Any) -> tuple[Any, Any]:
        """Tokens of a micro-batch and those of them that are scored, as numbers or tensors."""
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        if "labels" in inputs:
            # The model shifts labels, so what stands at t = 0 is never predicted.
            return tokens, (inputs["labels"][:, 1:] != -100).sum()
        return tokens, inputs["completion_mask"].sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Nothing: rows go to the stage's tracker, from ``drain_metrics``."""

    def drain_metrics(self) -> dict[str, float]:
        """Means of what TRL gathered in training since the last call, where they are numbers."""
        gathered = getattr(self, "_metrics", {}).get("train", {})
        # The library's own count of tokens does not survive a resume; the run has one that does.
        means = {name: _mean(values) for name, values in gathered.items() if name != "num_tokens"}
        gathered.clear()
        return {name: value for name, value in means.items() if value is not None}

    def gathered_metrics(self) -> dict[str, list[float]]:
        """What ``drain_metrics`` would take the means of, for a checkpoint."""
        gathered = getattr(self, "_metrics", {}).get("train", {})
        return {name: list(values) for name, values in gathered.items() if _mean(values) is not None}

    def restore_metrics(self, gathered: dict[str, list[float]]) -> None:
        """Take up what ``gathered_metrics`` gave."""
        if gathered:
            self._metrics["train"].update(gathered)  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        self.finetuning.loop.save()

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""


class _Rate:
    """What the library asks of a schedule."""

    def __init__(self, finetuning: Finetuning) -> None:
        self._finetuning = finetuning

    def step(self) -> None:
        """Nothing: the rate belongs to the step's number."""

    def get_last_lr(self) -> list[float]:
        """The rate of the last step."""
        loop = self._finetuning.loop
        return [loop.lr(max(0, loop.state.step - 1))]

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}


class Boundaries(TrainerCallback):
    """Hands the moments of the library's loop to the run's own."""

    def __init__(self, finetuning: Finetuning) -> None:
        self.finetuning = finetuning

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine stands: take it over, and go on from a checkpoint or begin."""
        self.finetuning.begin()
        state.global_step = self.finetuning.state.step
        if state.global_step >= self.finetuning.config.max_steps:
            raise AlreadyTrained

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batches of the step are there, no random number was drawn for them yet."""
        self.finetuning.loop.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is taken or left out."""
        self.finetuning.loop.end_step()


class OwnedBackward:
    """Stands where accelerate keeps its wrapper of the engine, so that the step is taken by the run's own loop."""

    def __init__(self, finetuning: Finetuning, engine: Any) -> None:
        self._finetuning = finetuning
        self.engine = engine

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Backward; the step with the last micro-batch."""
        self._finetuning.loop.backward(loss, is_last=sync_gradients, **kwargs)

    def get_global_grad_norm(self) -> float:
        """The last step's gradient norm before clipping."""
        return self._finetuning.loop.grad_norm


def take_over(trainer: Any, finetuning: Finetuning) -> Any:
    """Put the run's backward in the place of accelerate's; returns the DeepSpeed engine."""
    engine = trainer.model_wrapped
    assert trainer.accelerator.deepspeed_engine_wrapped is not None, "the trainer runs under DeepSpeed"
    trainer.accelerator.deepspeed_engine_wrapped = OwnedBackward(finetuning, engine)
    return engine


def accumulation(config: Any) -> int:
    """Micro-steps of an optimizer step on this rank."""
    return config.global_batch_size // (config.micro_batch_size * distributed.world_size())


def _mean(values: list[Any]) -> float | None:
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
