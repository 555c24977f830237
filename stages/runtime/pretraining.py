"""How a pretraining run is put together: data, model, engine, loop, final evaluation, audit, output."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import transformers

from data import baselines
from data.heldout import HeldoutSet
from model import cost
from stages.base import ConfigError, Fault, StageContext, StageResult, StopRequested
from stages.runtime import distributed, ds_config, rng, settings, warm_start
from stages.runtime.alarms import Alarms
from stages.runtime.audit import TrainingRecord, audit
from stages.runtime.checkpoint import CheckpointStore, save_weights
from stages.runtime.engine import prepare_environment
from stages.runtime.evaluation import evaluate
from stages.runtime.faults import faults_of
from stages.runtime.fp8_limits import fp8_lines
from stages.runtime.guards import StepGuard
from stages.runtime.kernel_cache import kernel_cache
from stages.runtime.loop import LoopSettings, TrainLoop
from stages.runtime.manifest import MANIFEST
from stages.runtime.patience import patience
from stages.runtime.pretraining_engine import backend_lines, build_engine, checked_engine_config
from stages.runtime.progress import EvaluationProgress, Progress, count_of, peak_flops
from stages.runtime.schedule import lr_at, same_path
from stages.runtime.training_data import TrainingData

CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation.json"
OF_THE_COURSE = frozenset({"tokens_per_s", "best_bpb", "best_step", "alarms"})
"""Metrics that depend on how the run went along; ``stage.json`` has them, the sealed output does not."""


class Pretraining:
    """One run; the parts are built in the order in which they can fail, cheapest first."""

    def __init__(self, context: StageContext) -> None:
        assert context.model is not None, "check() refuses a recipe without a model"
        self.context, self.config, self.spec = context, context.config, context.model
        parent = context.parents.get("from_")
        self.start_line = warm_start.start_line(context.config, parent)
        self.parent_metrics = warm_start.parent_metrics(parent) if parent else {}

    def run(self) -> StageResult:
        """See ``stages.pretrain.Pretrain.run``."""
        prepare_environment()
        transformers.utils.logging.disable_progress_bar()
        distributed.init_process_group()
        with distributed.StopWatch(self.context.directory) as self.watch:
            self.watch.then = "ending before the first step"
            # Data and engine take minutes at full size, so a request is honoured between them too.
            self._stop_if_asked()
            with faults_of(self.context.name):
                self.engine_config = checked_engine_config(self.config)
                self._open_data()
            self._stop_if_asked()
            self._build()
            loop = self._loop(self.watch)
            self._stop_if_asked()
            with faults_of(self.context.name):
                self._resume(loop)
            try:
                loop.run()
            finally:
                self.data.close()
            return self._finish(loop)

    def _stop_if_asked(self) -> None:
        """Where nothing is to be saved, since all that was done is to read; collective."""
        if self.watch.agreed():
            raise StopRequested(f"before the first step of this attempt, asked to stop by {self.watch.reason}")

    def _open_data(self) -> None:
        folder = self.context.parent_output("data")
        self.data = TrainingData(self.context)
        try:
            self.heldout = HeldoutSet(folder)
        except ValueError as error:
            raise ConfigError(Fault("data", str(error))) from error
        self.unigram = np.load(folder / "unigram.npy")
        self.tokenizer_dir = folder / "tokenizer"

    def _build(self) -> None:
        info = self.data.info
        rng.seed_all(self.context.seed)
        self.model, self.engine = build_engine(
            self.config,
            self.spec,
            self.engine_config,
            eos_id=info.eos_id,
            pad_id=info.pad_id,
            weights=self.context.parent_output("from_") if "from_" in self.context.parents else None,
            digest=self.context.parent_digest("from_"),
        )

    def _loop(self, watch: Any) -> TrainLoop:
        config = self.config
        loop_settings = LoopSettings(
            max_steps=config.max_steps,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            lr_at=self._lr,
            eval_every_steps=config.eval_every_steps,
            checkpoint_every_steps=config.checkpoint_every_steps,
            pin_at_step=settings.pin_step(config),
            log_every_steps=config.log_every_steps,
            checkpoint_bytes=cost.checkpoint_bytes(
                self.spec, zero_stage=self.engine.zero_stage, optimizer=config.optimizer.kind
            ),
        )
        return TrainLoop(
            loop_settings,
            engine=self.engine,
            batch=self.data.batch,
            evaluate=self._evaluate,
            guard=StepGuard(config.guards),
            alarms=Alarms(config.alarms, score="bpb"),
            store=CheckpointStore(self.context.directory / CHECKPOINTS, keep=config.keep_checkpoints),
            tracker=self.context.tracker,
            watch=watch,
            progress=self._progress(),
            facts=self.data.facts(self._run_facts()),
            first_step=self._first_step(),
        )

    def _first_step(self) -> AbstractContextManager[None] | None:
        """Tells what the wait is where kernels are compiled and tuned."""
        if not (self.config.compile or torch.cuda.is_available()) or distributed.rank() != 0:
            return None
        what = "compiling and autotuning kernels: the first step can take minutes; later starts read"
        return patience(_say, f"{what} {kernel_cache()}", "first step done")

    def _lr(self, step: int) -> float:
        config = self.config
        return lr_at(step, config.schedule, lr=config.lr, max_steps=config.max_steps, min_lr_ratio=config.min_lr_ratio)

    def _progress(self) -> Progress:
        gpu = torch.cuda.is_available()
        return Progress(
            max_steps=self.config.max_steps,
            tokens_per_step=self.config.global_batch_size * self.config.seq_len,
            flops_per_token=cost.training_flops_per_token(self.spec, self.config.seq_len),
            world_size=distributed.world_size(),
            peak=peak_flops(torch.cuda.get_device_name()) if gpu and self.config.precision != "fp32" else None,
            quiet=distributed.rank() != 0,
            checkpoint_every_steps=self.config.checkpoint_every_steps,
        )

    def _run_facts(self) -> dict[str, Any]:
        return {
            "max_steps": self.config.max_steps,
            "world_size": distributed.world_size(),
            "zero_stage": self.engine.zero_stage,
        }

    def _resume(self, loop: TrainLoop) -> None:
        """Go on from the newest checkpoint on this course, or announce a start from step 0."""
        self._announce(loop.progress)
        found = loop.store.newest(self._is_on_course)
        if found is None:
            loop.store.set_aside_after(-1)
            # A run killed before its first save leaves rows of a future that never came.
            self.context.tracker.resume(0)
            loop.state.weights_before = self.engine.fingerprint()
            if "from_" in self.context.parents:
                values = loop.log_evaluation()
                warm_start.check_baseline(self.context, values, "bpb")
            return
        step, folder, saved = found
        self._check_shape(step, saved)
        loop.store.set_aside_after(step)
        self.engine.load(folder)
        loop.restore(saved, self.config.guards)
        self.data.restore(saved)
        loop.progress.saved(max(0.0, time.time() - (folder / MANIFEST).stat().st_mtime))
        self.context.tracker.resume(step)
        ranks = count_of(saved["world_size"], "rank")
        dealt = "" if saved["world_size"] == distributed.world_size() else f", which {ranks} saved"
        loop.progress.say(f"resumed from step {step}{dealt}")

    def _is_on_course(self, step: int, saved: dict[str, Any]) -> bool:
        """Whether the steps up to ``step`` had the learning rates that this config gives them."""
        return same_path(
            step, self.config.schedule, max_steps=self.config.max_steps, other_max_steps=saved["max_steps"]
        )

    def _check_shape(self, step: int, saved: dict[str, Any]) -> None:
        faults = []
        if saved["world_size"] != distributed.world_size() and ds_config.offloads(self.engine_config):
            wanted = count_of(saved["world_size"], "rank")
            message = f"was saved by {wanted}, off-loaded, and loads on as many; got {distributed.world_size()}"
            faults.append(Fault("", f"the checkpoint of step {step} {message}; start {wanted}"))
        if saved["zero_stage"] != self.engine.zero_stage:
            stage = f"was saved under ZeRO-{saved['zero_stage']}; got {self.config.deepspeed}"
            faults.append(
                Fault("deepspeed", f"the checkpoint of step {step} {stage}; go on with zero{saved['zero_stage']}")
            )
        if faults:
            raise ConfigError(faults)

    def _announce(self, progress: Progress) -> None:
        config = self.config
        count = cost.count_parameters(self.spec)
        tokens = config.max_steps * config.global_batch_size * config.seq_len
        ranks = count_of(distributed.world_size(), "rank")
        progress.say(
            f"{count.total:,} parameters, {tokens:,} tokens in {config.max_steps:,} steps of "
            f"{config.global_batch_size} x {config.seq_len}, {ranks}, {config.deepspeed}, {config.precision}; "
            f"{self.start_line}"
        )
        for line in self.data.lines():
            progress.say(line)
        for line in [*backend_lines(self.model, config.precision), *fp8_lines(self.spec, config.precision)]:
            progress.say(f"  {line}")

    def _evaluate(self) -> dict[str, Any]:
        """Measure the model; raises ``StopRequested`` on all ranks when asked to stop between two windows."""
        progress = EvaluationProgress(self.heldout.n_documents, quiet=distributed.rank() != 0)

        def between(documents: int) -> None:
            progress.at(documents)
            if self.watch.agreed():
                raise StopRequested(f"in an evaluation, asked to stop by {self.watch.reason}")

        self.model.eval()
        try:
            result = evaluate(
                lambda **batch: self.engine.forward(**batch).logits,
                self.heldout,
                seq_len=self.config.seq_len,
                rows=self.config.eval_batch_size,
                device=self.engine.device,
                between=between,
            )
        finally:
            self.model.train()
        return result.metrics()

    def _finish(self, loop: TrainLoop) -> StageResult:
        started = time.monotonic()
        self.watch.then = "ending between two windows of the final evaluation; training is saved"
        evaluation = loop.log_evaluation()
        record = TrainingRecord(
            steps_applied=loop.guard.taken,
            supervised_tokens=loop.state.supervised_tokens,
            loss=loop.state.final_loss,
            weights_before=loop.state.weights_before,
            weights_after=self.engine.fingerprint(),
            evaluation=evaluation,
        )
        # Fingerprints under ZeRO-3 are of one rank's shards, and the checkpoint keeps rank 0's.
        distributed.on_rank_zero(lambda: audit(record))
        save_weights(self.context.output, self.model, self.tokenizer_dir)
        metrics = self._metrics(loop, evaluation, record)
        distributed.on_rank_zero(lambda: self._write_evaluation(metrics))
        loop.progress.say(f"final evaluation and output took {time.monotonic() - started:.1f}s")
        return StageResult(metrics, self._summary(metrics))

    def _metrics(self, loop: TrainLoop, evaluation: dict[str, Any], record: TrainingRecord) -> dict[str, Any]:
        """``tokens`` are those of applied steps; ``tokens_per_s`` counts skipped ones too, which cost as much."""
        state, guard, config = loop.state, loop.guard, self.config
        step_tokens = config.global_batch_size * config.seq_len
        return {
            "final_loss_nats_per_token": state.final_loss,
            "final_lr": self._lr(config.max_steps - 1),
            **evaluation,
            **distributed.on_rank_zero(self._yardsticks),
            "best_bpb": state.best_bpb,
            "best_step": state.best_step,
            "steps": state.step,
            "tokens": guard.taken * step_tokens,
            "supervised_tokens": state.supervised_tokens,
            "tokens_per_s": state.step * step_tokens / state.seconds if state.seconds else 0.0,
            "skipped_steps": guard.skipped,
            "skipped_nonfinite": guard.skipped_nonfinite,
            "skipped_spike": guard.skipped_spike,
            "alarms": loop.alarms.raised,
            "unchanged_parameters": record.unchanged_parameters,
            "parameters": cost.count_parameters(self.spec).total,
        }

    def _yardsticks(self) -> dict[str, float]:
        """What a unigram model and ``xz`` need for the same held-out text, by language."""
        unigram = baselines.unigram_bits_per_byte(self.unigram, self.heldout)
        found = {}
        for language in [None, *self.heldout.languages]:
            suffix = "" if language is None else f"/{language}"
            found[f"bpb_unigram{suffix}"] = unigram[language or baselines.ALL]
            found[f"bpb_xz{suffix}"] = baselines.xz_bits_per_byte(self.heldout.texts(language))
        return found

    def _write_evaluation(self, metrics: dict[str, Any]) -> None:
        # Speed, and the best of the evaluations asked for, are no property of the weights: runs that differ in
        # operational fields alone must have one digest.
        metrics = {name: value for name, value in metrics.items() if name not in OF_THE_COURSE}
        text = json.dumps({"heldout_hash": self.heldout.hash, "metrics": metrics}, indent=1, allow_nan=False)
        (self.context.output / EVALUATION).write_text(text + "\n", encoding="utf-8")

    def _summary(self, metrics: dict[str, Any]) -> list[str]:
        parent = self.parent_metrics
        same_set = parent.get("heldout_hash") == metrics["heldout_hash"]
        lines = [
            f"{metrics['parameters']:,} parameters, {metrics['steps']:,} steps, {metrics['tokens']:,} tokens at "
            f"{metrics['tokens_per_s']:,.0f} tok/s, {metrics['skipped_steps']} steps skipped; {self.start_line}",
            f"final loss {metrics['final_loss_nats_per_token']:.4f} nats/token, final lr {metrics['final_lr']:.3g}",
            "held-out bits/byte      model   unigram        xz    parent",
        ]
        for language in [None, *self.heldout.languages]:
            suffix = "" if language is None else f"/{language}"
            theirs = parent.get(f"bpb{suffix}") if same_set else None
            lines.append(
                f"  {language or 'all':<18} {metrics[f'bpb{suffix}']:>8.4f}  {metrics[f'bpb_unigram{suffix}']:>8.4f}  "
                f"{metrics[f'bpb_xz{suffix}']:>8.4f}  {f'{theirs:8.4f}' if theirs is not None else '       -'}"
            )
        if parent and not same_set:
            lines.append("  the parent was measured on another held-out set: not compared")
        return lines + self.data.ending()


def _say(text: str) -> None:
    print(text, flush=True)
