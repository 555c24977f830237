"""TRL's GRPO trainer with our rollouts: questions, sampling, rewards and filtering are ours, the loss is TRL's.

Imported inside a run only: TRL takes seconds to import.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from stages.runtime import distributed
from stages.runtime.audit import AuditError
from stages.runtime.finetune_trainer import OwnedTrainer
from stages.runtime.rollouts import Rollout, gathered, is_informative

if TYPE_CHECKING:
    from stages.runtime.grpo_finetuning import GRPOFinetuning

NAMES = {
    "entropy": "entropy_nats",
    "kl": "kl_nats",
    "completions/mean_length": "completion_length_tokens",
    "clip_ratio/region_mean": "clip_ratio",
}
"""What TRL measures and we report, under names with units."""


class RolloutMismatchError(AuditError):
    """Rollouts were drawn from another distribution than the one that is trained (TRAPS T10)."""


class OwnedGRPOTrainer(OwnedTrainer, GRPOTrainer):
    """The loss of TRL on groups that we sample, score and filter.

    The loader only counts micro-steps: which questions are asked is a function of the generation's number
    (``GRPOFinetuning.questions``), so that a resumed run asks and draws what the uninterrupted one would (T6). TRL
    keeps its rollouts in memory alone; checkpoints are therefore taken between generations (``may_save``).
    """

    finetuning: GRPOFinetuning
    _gaps: list[torch.Tensor]

    def get_train_dataloader(self) -> Any:
        """One batch a micro-step, in the place of TRL's, which reads a generation's rows again with each."""
        return self._get_dataloader(
            dataset=cast(Any, self.train_dataset),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return OwnedTrainer._get_train_sampler(self, dataset)

    def count_tokens(self, inputs: Any) -> tuple[Any, Any]:
        """Tokens of prompts and completions, and those of completions that were not filtered."""
        completion = inputs["completion_mask"]
        return inputs["prompt_mask"].sum() + completion.sum(), (completion * inputs["tool_mask"]).sum()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        started = time.monotonic()
        candidates, chosen = self.finetuning.roll_out()
        self._note_rollouts(candidates, chosen, time.monotonic() - started)
        self._rollouts = [rollout for _, group in chosen for rollout in group]
        rows = [dict(row) for row, group in chosen for _ in group]
        with warnings.catch_warnings():
            # TRL asks the model by a name that newer versions of transformers have replaced.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            output = super()._generate_and_score_completions(rows)
        # A group whose completions all earned the same has no advantage: it leaves the sums and their normaliser.
        kept = torch.tensor(
            [is_informative(group) for _, group in chosen for _ in group], device=self.accelerator.device
        )
        completion_mask = output["completion_mask"]
        output["tool_mask"] = kept[:, None].to(completion_mask.dtype).expand_as(completion_mask).contiguous()
        output["num_items_in_batch"] = self.accelerator.gather((completion_mask * output["tool_mask"]).sum()).sum()
        return output

    def rollouts_for(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's hook: the completions that were sampled already."""
        return {
            "prompt_ids": [rollout.prompt_ids for rollout in self._rollouts],
            "completion_ids": [rollout.completion_ids for rollout in self._rollouts],
            "logprobs": [rollout.logprobs for rollout in self._rollouts],
        }

    def reward(self, **columns: Any) -> list[float]:
        """TRL's hook: what the completions earned."""
        return [rollout.reward for rollout in self._rollouts]

    def _note_rollouts(self, candidates: Any, chosen: Any, seconds: float) -> None:
        """Figures of one generation over all ranks."""
        facts = gathered([_figures(group) for _, group in candidates])
        tokens = distributed.all_reduce_sum(sum(len(r.completion_ids) for _, group in candidates for r in group))
        kept = int(distributed.all_reduce_sum(sum(is_informative(group) for _, group in chosen)))
        used = int(distributed.all_reduce_sum(len(chosen)))
        rewards = torch.tensor([reward for fact in facts for reward in fact["rewards"]], dtype=torch.float64)
        correct = [sum(fact["correct"]) for fact in facts]
        size = self.finetuning.config.num_generations
        figures = {
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "accuracy": sum(correct) / (size * len(facts)),
            "stop_rate": sum(fact["finished"] for fact in facts) / (size * len(facts)),
            "groups": len(facts),
            "groups_all_zero": sum(count == 0 for count in correct),
            "groups_all_one": sum(count == size for count in correct),
            "groups_filtered": used - kept,
            "groups_trained": kept,
            "rollout_tokens_per_s": tokens / seconds,
        }
        self.finetuning.count_groups(figures)
        for name, value in figures.items():
            self._metrics["train"][name].append(float(value))

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        # The reference, and the policy as TRL scores its rollouts, are run beside the engine and its autocast.
        with self.finetuning.autocast():
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if model is not self.ref_model:
            self._logprobs = result[0].detach()
        return result

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        entropies = self._metrics["train"]["entropy"]
        if entropies and entropies[-1] == 0.0:
            # Nothing was left of the batch on any rank: no entropy was measured.
            entropies.pop()
        # Off-policy passes compare the policy that sampled, which TRL scored right after the rollouts.
        scored = inputs.get("old_per_token_logps", self._logprobs)
        gap = (scored - inputs["sampling_per_token_logps"]).abs() * inputs["completion_mask"]
        self._gaps.append(torch.stack([gap.sum(), inputs["completion_mask"].sum(), gap.max()]).double())
        if self.accelerator.sync_gradients:
            self._check_gap()
        return loss

    def _check_gap(self) -> None:
        """Compare rollout and trainer over the step's tokens of all ranks (T10)."""
        local, self._gaps = torch.stack(self._gaps), []
        total, count = (distributed.all_reduce_sum(float(value)) for value in local[:, :2].sum(0))
        largest = max(gathered([float(local[:, 2].max())]))
        mean, bound = total / max(count, 1.0), self.finetuning.config.max_logprob_gap
        self._metrics["train"]["logprob_gap_mean_nats"].append(mean)
        self._metrics["train"]["logprob_gap_max_nats"].append(largest)
        if not mean <= bound:
            raise RolloutMismatchError(
                f"rollout and trainer give a token's log-probability {mean:.4g} nats apart on average (at most "
                f"{largest:.4g}); max_logprob_gap is {bound:g}; set precision: fp32 to see whether it is rounding, and "
                "raise the bound only if it is"
            )

    def drain_metrics(self) -> dict[str, float]:
        """What was gathered since the last call: our figures, and TRL's under our names."""
        largest = max(self._metrics["train"].get("logprob_gap_max_nats", [0.0]))
        found = super().drain_metrics()
        ours = {name: value for name, value in found.items() if name in OURS}
        theirs = {own: found[name] for name, own in NAMES.items() if name in found}
        return ours | theirs | {"logprob_gap_max_nats": largest}


OURS = frozenset(
    "reward_mean reward_std accuracy stop_rate groups groups_all_zero groups_all_one groups_filtered groups_trained "
    "rollout_tokens_per_s logprob_gap_mean_nats".split()
)
"""Our own figures among those that the trainer gathers."""


def build_trainer(finetuning: GRPOFinetuning, model: Any, arguments: dict[str, Any], callbacks: list[Any]) -> Any:
    """The trainer of one run; a reference model is made only where the loss has a KL term."""
    questions = Dataset.from_list([{"prompt": row["prompt"]} for row in finetuning.train_rows])
    with warnings.catch_warnings(), _experimental_accepted():
        trainer = OwnedGRPOTrainer(
            finetuning=finetuning,
            model=model,
            reward_funcs=[_placeholder],
            args=_trl_config(finetuning.config, arguments),
            train_dataset=questions,
            processing_class=finetuning.tokenizer,
            rollout_func=_placeholder,
            callbacks=callbacks,
        )
    trainer.rollout_func, trainer.reward_funcs = trainer.rollouts_for, cast(Any, [trainer.reward])
    trainer._gaps = []
    if finetuning.config.beta > 0:
        _add_reference(trainer, finetuning)
    return trainer


def _trl_config(config: Any, arguments: dict[str, Any]) -> GRPOConfig:
    local = config.micro_batch_size * distributed.world_size()
    return GRPOConfig(
        **arguments,
        num_generations=config.num_generations,
        steps_per_generation=config.completions_per_generation // local,
        num_iterations=config.num_iterations,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=1.0,
        top_k=0,
        loss_type=config.loss_type,
        importance_sampling_level=config.importance_sampling_level,
        scale_rewards=config.advantage_scale,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        beta=0.0,
        remove_unused_columns=False,
    )


def _add_reference(trainer: OwnedGRPOTrainer, finetuning: GRPOFinetuning) -> None:
    """A frozen copy of the parent: TRL would look for one by the name of a hub's repository."""
    from trl.trainer.utils import add_fused_lm_head

    reference = finetuning.load_model().eval().requires_grad_(False).to(trainer.accelerator.device)
    add_fused_lm_head(reference, temperature=finetuning.config.temperature)
    trainer.ref_model, trainer.beta = reference, finetuning.config.beta


def _placeholder(*args: Any, **kwargs: Any) -> Any:
    """Stands for the trainer's own methods until it exists."""
    raise AssertionError("the trainer's own hooks take this one's place")


class _experimental_accepted:  # noqa: N801 - reads as a statement
    """TRL warns of its rollout hook unless this variable is set."""

    NAME = "TRL_EXPERIMENTAL_SILENCE"

    def __enter__(self) -> None:
        self._before = os.environ.get(self.NAME)
        os.environ[self.NAME] = "1"

    def __exit__(self, *exception: Any) -> None:
        if self._before is None:
            del os.environ[self.NAME]
        else:
            os.environ[self.NAME] = self._before


def _figures(group: list[Rollout]) -> dict[str, Any]:
    return {
        "rewards": [rollout.reward for rollout in group],
        "correct": [rollout.correct for rollout in group],
        "finished": sum(rollout.finished for rollout in group),
    }
