"""How a fine-tuning run is put together: the parent's model, a TRL trainer under our loop, audit, output."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from data import tokenizer as tokenizers
from model import cost, init
from model.config import HybridConfig
from model.lm import HybridForCausalLM, model_backends
from stages.base import ConfigError, Fault, StageContext, StageResult, StopRequested
from stages.runtime import distributed, ds_config, rng, warm_start
from stages.runtime.alarms import Better
from stages.runtime.audit import TrainingRecord, audit
from stages.runtime.checkpoint import load_weights, save_weights
from stages.runtime.engine import prepare_environment
from stages.runtime.faults import faults_of
from stages.runtime.finetune_engine import AdoptedEngine
from stages.runtime.finetune_library import borrowed_libraries, training_arguments
from stages.runtime.finetune_loop import FinetuneLoop, FinetuneState
from stages.runtime.finetune_report import OF_THE_COURSE, summary_lines
from stages.runtime.finetune_trainer import AlreadyTrained, Boundaries, take_over
from stages.runtime.optimizer import embedding_parameters, make_optimizer
from stages.runtime.optimizer_base import GatedAdamW
from stages.runtime.progress import Progress, peak_flops

EVALUATION = "evaluation.json"


class Finetuning(ABC):
    """One run of a stage that trains a finished model further; a stage fills in the hooks below.

    ``tokenizer`` and ``parent`` (its output folder) stand from the start; ``model`` and ``trainer`` once built;
    ``engine`` and ``loop`` once the trainer has begun.
    """

    headline: str = "nats_per_token"
    """The main figure of ``measure``: without it, or not finite, the run is not done."""
    better: Better = "lower"
    """Which direction of ``headline`` is good; alarms watch the other."""
    loss_falls: bool = True
    """Whether the level of the training loss says how well it goes."""
    loss_name: str = "loss_nats_per_token"
    """What the training loss is called in rows and metrics, with its unit."""

    def __init__(self, context: StageContext) -> None:
        assert context.model is not None, "check() refuses a recipe without a model"
        self.context, self.config, self.spec = context, context.config, context.model
        self.parent: Path = context.parent_output("from_")
        self.start_line = warm_start.start_line(context.config, context.parents["from_"])
        self.heldout_hash = ""
        self.loop: FinetuneLoop
        self.engine: AdoptedEngine
        self.model: Any
        self.trainer: Any

    @property
    def state(self) -> FinetuneState:
        """What has been trained so far; its ``step`` is the number of steps done."""
        return self.loop.state

    @abstractmethod
    def prepare(self) -> None:
        """Read, check and tokenise the data, and set ``heldout_hash``; before any model is built.

        Raises:
            ConfigError: for what does not fit.
        """

    @abstractmethod
    def make_trainer(self, model: Any, arguments: dict[str, Any], callbacks: list[Any]) -> Any:
        """The trainer: a class of ``OwnedTrainer`` and TRL's, with TRL's config made from ``arguments`` and more."""

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """Figures of the model as it is on held-out data, ``headline`` and ``heldout_hash`` among them.

        Collective. Runs in evaluation mode, without gradients, and may draw random numbers: they are put back.
        """

    def load_model(self) -> Any:
        """The parent's model in fp32."""
        ids = tokenizers.special_ids(self.parent)
        end, pad = ids[tokenizers.END_OF_TEXT], ids[tokenizers.PAD]
        model = HybridForCausalLM(HybridConfig.from_spec(self.spec, eos_token_id=end, pad_token_id=pad)).float()
        load_weights(self.parent, model, self.context.parent_digest("from_"))
        # A turn's end stops an answer, wherever the model goes from here.
        model.generation_config.eos_token_id = [ids[tokenizers.IM_END], end]
        return model

    def may_save(self, step: int) -> bool:
        """Whether the state after ``step`` can be resumed from; saves and stops wait until it can."""
        return True

    def extra_state(self) -> dict[str, Any]:
        """The stage's own content of a checkpoint, plain JSON data; rank 0's is kept."""
        return {}

    def write_extra(self, folder: Path) -> None:
        """The stage's own files of a checkpoint; every rank is asked, names must tell them apart."""
        return None

    def load_extra(self, state: dict[str, Any], folder: Path) -> None:
        """Take up what ``extra_state`` and ``write_extra`` saved; the folder was verified."""
        return None

    def check_precision(self, fp32_islands: set[str], undecayed: set[str]) -> None:
        """TRAPS K7, per parameter, after engine start."""
        self.engine.assert_precision(fp32_islands, undecayed)

    def audit_faults(self, metrics: dict[str, Any]) -> list[str]:
        """Reasons of the stage's own why the run must not be called done (TRAPS T4)."""
        return []

    def extra_metrics(self) -> dict[str, Any]:
        """Figures of the stage's own for ``stage.json`` and ``evaluation.json``."""
        return {}

    def save(self, output: Path) -> None:
        """Write the model with the parent's tokenizer; collective."""
        save_weights(output, self.model, self.parent)

    def announcement(self) -> list[str]:
        """Lines of the stage's own before the first step."""
        return []

    def summary(self, metrics: dict[str, Any]) -> list[str]:
        """A screen about the run, the parent's figures beside its own."""
        return summary_lines(metrics, self.state.before, self.start_line, self.loss_name)

    def run(self) -> StageResult:
        """Train, measure, audit and write the output.

        Raises:
            ConfigError: for what does not fit the devices, the data or the parent.
            StopRequested: after a save, on all ranks together.
            AuditError: when nothing was trained (TRAPS T4).
        """
        prepare_environment()
        distributed.init_process_group()
        # Data and engine take minutes at full size: a request meanwhile is honoured before the first step.
        with distributed.StopWatch(self.context.directory) as self.watch, borrowed_libraries():
            self.watch.then = "ending before the first step"
            with faults_of(self.context.name):
                self.engine_config = self._engine_config()
                self._open_parent()
                self.prepare()
            self._build()
            try:
                self.trainer.train()
            except AlreadyTrained:
                self.progress.say("every step was done before; the end is written again")
            self.loop.save()
            return self._finish()

    def forward(self, **inputs: Any) -> Any:
        """The model's output under the engine's precision; every rank must call it equally often (ZeRO-3)."""
        return self.engine.forward(**inputs)

    def make_optimizer(self) -> GatedAdamW:
        """Our optimizer over what is trainable; names are taken here, since ZeRO-3 flattens what it partitions."""
        config, exempt = self.config, init.no_decay
        embeddings = {id(weight) for weight in embedding_parameters(self.model)}
        named = dict(self.model.named_parameters())
        self._undecayed = {name for name, weight in named.items() if id(weight) in embeddings or exempt(name, weight)}
        self._islands = init.fp32_islands(self.model)
        self.optimizer = make_optimizer(self.model, config, decay_embeddings=False, exempt=exempt)
        return self.optimizer

    def begin(self) -> None:
        """Called by the trainer when its engine stands: take it over, then go on from a checkpoint or measure."""
        self.engine = AdoptedEngine(take_over(self.trainer, self), self.model, self.optimizer)
        self.check_precision(self._islands, self._undecayed)
        self.loop = FinetuneLoop(
            self.config,
            engine=self.engine,
            host=self,
            directory=self.context.directory,
            tracker=self.context.tracker,
            watch=self.watch,
            progress=self.progress,
            checkpoint_bytes=self.checkpoint_bytes(),
        )
        self._announce()
        with faults_of(self.context.name):
            resumed = self.loop.resume()
        self.loop.stop_if_asked()
        if not resumed:
            self.state.before = self.loop.measure()
            warm_start.check_baseline(self.context, self.state.before, self.headline)
        self.loop.catch_up()
        self.progress.resume_clock()
        self.watch.then = "saving after this step"

    def checkpoint_bytes(self) -> int | None:
        """Size of a checkpoint, all ranks together; None where only a part of the model is trained."""
        kind = self.config.optimizer.kind
        return cost.checkpoint_bytes(self.spec, zero_stage=self.engine.zero_stage, optimizer=kind)

    def measured(self) -> dict[str, Any]:
        """``measure`` in evaluation mode, every random generator left as it was (TRAPS M2)."""
        self.model.eval()
        try:
            with rng.undisturbed(), torch.no_grad():
                return self.measure()
        finally:
            self.model.train()

    def between_batches(self) -> None:
        """Asked by ``measure`` and whatever else takes long, on all ranks equally often.

        Raises:
            StopRequested: on all ranks, when the run was asked to stop and what stands can be resumed from.
        """
        step = self.state.step if hasattr(self, "loop") else 0
        if self.may_save(step) and self.watch.agreed():
            raise StopRequested(f"in a measurement, asked to stop by {self.watch.reason}")

    def drain_metrics(self) -> dict[str, float]:
        """What TRL gathered in training since the last call."""
        return self.trainer.drain_metrics()

    def checkpoint_state(self) -> dict[str, Any]:
        """Content of a checkpoint beside the loop's."""
        return {"library": self.trainer.gathered_metrics(), "stage": self.extra_state()}

    def restore_state(self, state: dict[str, Any], folder: Path) -> None:
        """Take up what ``checkpoint_state`` gave."""
        self.trainer.restore_metrics(state["library"])
        self.load_extra(state["stage"], folder)

    def _engine_config(self) -> dict[str, Any]:
        config = self.config
        facts = ds_config.engine_facts(config.deepspeed)
        has_gpu = torch.cuda.is_available()
        faults = ds_config.combination_faults(facts, name=config.deepspeed, compile_model=False, has_gpu=has_gpu)
        if faults:
            raise ConfigError(faults)
        return ds_config.engine_config(
            facts,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            world_size=distributed.world_size(),
            max_grad_norm=config.max_grad_norm,
            precision=config.precision,
        )

    def _open_parent(self) -> None:
        try:
            self.tokenizer = tokenizers.load(self.parent)
        except ValueError as error:
            raise ConfigError(Fault("from", str(error))) from error

    def _build(self) -> None:
        rng.seed_all(self.context.seed)
        gpu = torch.cuda.is_available()
        model = self.load_model()
        use_cache = model.config.use_cache
        self.progress = Progress(
            max_steps=self.config.max_steps,
            tokens_per_step=0,
            flops_per_token=cost.training_flops_per_token(self.spec, self.config.max_length),
            world_size=distributed.world_size(),
            peak=peak_flops(torch.cuda.get_device_name()) if gpu and self.config.precision == "bf16" else None,
            quiet=distributed.rank() != 0,
            checkpoint_every_steps=self.config.checkpoint_every_steps,
        )
        arguments = training_arguments(self.config, self.context, self.engine_config)
        self.trainer = self.make_trainer(model, arguments, [Boundaries(self)])
        self.model = self.trainer.model
        # The library switches the cache off for training and would leave it so in the output.
        self.model.config.use_cache = use_cache

    def _announce(self) -> None:
        config, say = self.config, self.progress.say
        say(
            f"{cost.count_parameters(self.spec).total:,} parameters, {config.max_steps:,} steps of "
            f"{config.global_batch_size}, {distributed.world_size()} ranks, {config.deepspeed}, {config.precision}; "
            f"{self.start_line}"
        )
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        for line in [*self.announcement(), *model_backends(self.model, dtype)]:
            say(f"  {line}")

    def _finish(self) -> StageResult:
        started = time.monotonic()
        values = self.loop.measure()
        record = TrainingRecord(
            steps_applied=self.loop.guard.taken,
            supervised_tokens=self.state.supervised_tokens,
            loss=self.state.final_loss,
            weights_before=self.state.weights_before,
            weights_after=self.engine.fingerprint(),
            evaluation=values,
            score=self.headline,
        )
        metrics = self._metrics(values, record)
        faults = self.audit_faults(metrics)
        if self.state.step != self.config.max_steps:
            # When its loop ends is the library's decision.
            faults.append(f"{self.state.step} of max_steps {self.config.max_steps} were trained")
        # Fingerprints under ZeRO-3 are of one rank's shards, and the checkpoint keeps rank 0's.
        distributed.on_rank_zero(lambda: audit(record, faults))
        self.save(self.context.output)
        distributed.on_rank_zero(lambda: self._write_evaluation(metrics))
        self.progress.say(f"final measurement and output took {time.monotonic() - started:.1f}s")
        return StageResult(metrics, self.summary(metrics))

    def _metrics(self, values: dict[str, Any], record: TrainingRecord) -> dict[str, Any]:
        state, guard, config = self.state, self.loop.guard, self.config
        # In the order of the measurement: what a checkpoint gave back has another.
        before = {name: state.before[name] for name in values if isinstance(state.before.get(name), float)}
        return {
            f"final_{self.loss_name}": state.final_loss,
            "final_lr": self.loop.lr(config.max_steps - 1),
            **values,
            **{f"before/{name}": value for name, value in before.items()},
            **self.extra_metrics(),
            "steps": state.step,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
            "tokens_per_s": state.tokens / state.seconds if state.seconds else 0.0,
            "skipped_steps": guard.skipped,
            "skipped_nonfinite": guard.skipped_nonfinite,
            "skipped_spike": guard.skipped_spike,
            "alarms": self.loop.alarms.raised,
            "unchanged_parameters": record.unchanged_parameters,
            "parameters": cost.count_parameters(self.spec).total,
        }

    def _write_evaluation(self, metrics: dict[str, Any]) -> None:
        # Speed is no property of the weights: runs that differ in operational fields alone must have one digest.
        metrics = {name: value for name, value in metrics.items() if name not in OF_THE_COURSE}
        text = json.dumps({"heldout_hash": self.heldout_hash, "metrics": metrics}, indent=1, allow_nan=False)
        (self.context.output / EVALUATION).write_text(text + "\n", encoding="utf-8")
