"""Steps that fill the kernel cache: the model and engine of a pretraining run at its shapes, on random tokens."""

from __future__ import annotations

import time
from typing import Any

import torch

from model.spec import ModelSpec
from stages.runtime import distributed, rng
from stages.runtime.engine import TrainingEngine, prepare_environment
from stages.runtime.kernel_cache import kernel_cache
from stages.runtime.patience import patience
from stages.runtime.pretraining_engine import backend_lines, build_engine, checked_engine_config
from stages.runtime.progress import duration

DOCUMENT_TOKENS = 256
"""Tokens a document of the packed rows."""


def warm_up(config: Any, spec: ModelSpec, seed: int) -> None:
    """Two steps on rows of one document and on packed ones, and a forward pass as evaluations do; keeps nothing.

    Raises:
        ConfigError: for what does not fit the devices.
    """
    started = time.monotonic()
    prepare_environment()
    distributed.init_process_group()
    engine_config = checked_engine_config(config)
    rng.seed_all(seed)
    model, engine = build_engine(config, spec, engine_config, eos_id=0, pad_id=1)
    for line in backend_lines(model, config.precision):
        _say(f"  {line}")
    steps = engine_config["gradient_accumulation_steps"]
    for name, packed in (("rows of one document", False), ("packed rows", True)):
        batch = random_batch(spec.vocab_size, config.micro_batch_size, config.seq_len, packed=packed)
        with patience(_say, f"compiling and autotuning kernels for {name}", f"{name}: two steps done"):
            for _ in range(2):
                _step(engine, batch, steps)
    with patience(_say, "compiling for evaluations", "evaluations: done"):
        _evaluate(model, engine, spec, config)
    _say(f"warm after {duration(time.monotonic() - started)}; kernels are kept in {kernel_cache()}")
    distributed.close_process_group()


def random_batch(vocab_size: int, rows: int, length: int, *, packed: bool) -> dict[str, torch.Tensor]:
    """Tokens and labels (rows, length), and where ``packed`` the positions and document numbers of a loader."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab_size, (rows, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    if packed:
        place = torch.arange(length).expand(rows, length)
        batch |= {"position_ids": place % DOCUMENT_TOKENS, "seq_idx": (place // DOCUMENT_TOKENS).int()}
    return batch


def _step(engine: TrainingEngine, batch: dict[str, torch.Tensor], micro_steps: int) -> None:
    for _ in range(micro_steps):
        engine.accumulate(batch, float(batch["labels"].numel() * micro_steps))
    # Skipped steps leave the optimizer's kernels cold: a rate of zero moves nothing either.
    engine.step(0.0, lambda norm: None)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _evaluate(model: Any, engine: TrainingEngine, spec: ModelSpec, config: Any) -> None:
    batch = random_batch(spec.vocab_size, config.eval_batch_size, config.seq_len, packed=True)
    model.eval()
    with torch.no_grad():
        engine.forward(**{name: tensor for name, tensor in batch.items() if name != "labels"})


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, flush=True)
