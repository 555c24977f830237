"""A run of preference optimisation: pairs in ids, the parent's log-probabilities, margins on held-out pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data import preferences
from data.tokenizer import INFO_FILE
from stages.base import ConfigError, Fault
from stages.runtime.dpo_data import TokenisedPairs, TokenPair, collator, columns, tokenise
from stages.runtime.dpo_reference import ReferenceCache
from stages.runtime.dpo_scores import scores
from stages.runtime.finetune import Finetuning
from stages.runtime.finetune_scoring import batches, scored
from stages.runtime.manifest import verify_manifest

MEASURED = (
    "margin_nats",
    "margin_nats_low",
    "margin_nats_high",
    "accuracy",
    "preference_accuracy",
    "chosen_change_nats_per_token",
    "n_pairs",
)
"""What a line of progress shows; ``extra_metrics`` has the rest."""


class DpoTraining(Finetuning):
    """See ``stages.dpo.Dpo``."""

    headline = "margin_nats"
    better = "higher"
    loss_name = "loss_nats"

    def prepare(self) -> None:
        """Both sides in ids; refuses pairs that cannot be told apart, and a side without any."""
        folder, length = self.context.parent_output("data"), self.config.max_length
        rows = {side: preferences.read_split(folder, side) for side in preferences.SPLITS}
        _check_rows(rows)
        self.sides: dict[str, TokenisedPairs] = {
            side: tokenise(self.tokenizer, rows[side], length) for side in preferences.SPLITS
        }
        empty = [side for side, found in self.sides.items() if not found.pairs]
        if empty:
            lost = "; ".join(f"of {side} {_words(self.sides[side].counts)}" for side in empty)
            message = f"must leave pairs with room for an answer; got {length}, which leaves none ({lost}); set more"
            raise ConfigError(Fault("max_length", message))
        # Of the ids, not of the file: what a limit of length leaves is another set (TRAPS M3).
        self.heldout_hash = self.sides["heldout"].digest
        self.collate = collator(self.tokenizer.pad_token_id)

    def make_trainer(self, model: Any, arguments: dict[str, Any], callbacks: list[Any]) -> Any:
        """TRL's trainer over the training side; the reference is computed or read while it is built."""
        from datasets import Dataset
        from trl import DPOConfig

        from stages.runtime.dpo_trainer import OwnedDpoTrainer

        config = self.config
        smoothing = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
        return OwnedDpoTrainer(
            finetuning=self,
            model=model,
            args=DPOConfig(
                **arguments,
                loss_type=[config.loss],
                beta=config.beta,
                max_length=None,
                precompute_ref_log_probs=True,
                **smoothing,
            ),
            data_collator=self.collate,
            processing_class=self.tokenizer,
            train_dataset=Dataset.from_dict(columns(self.sides["train"].pairs)),
            callbacks=callbacks,
        )

    def with_reference(self, trainer: Any, dataset: Any) -> Any:
        """``dataset`` with the columns ``ref_chosen_logps`` and ``ref_rejected_logps``, in nats.

        Called before the engine stands, when ``trainer.model`` still holds the parent's weights.
        """
        from datasets import Dataset

        train, heldout = self.sides["train"].pairs, self.sides["heldout"].pairs
        device = trainer.accelerator.device
        trainer.model.to(device)
        found = self._cache().fetch(
            [*train, *heldout], lambda pairs: self._score(trainer.model, pairs, device), self.between_batches
        )
        self.heldout_reference = found[len(train) :]
        chosen, rejected = found[: len(train)].T.tolist()
        return Dataset.from_dict(dataset.to_dict() | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected})

    def measure(self) -> dict[str, Any]:
        """Margins on held-out pairs; before the first step the policy is the reference."""
        pairs = self.sides["heldout"].pairs
        policy = self.heldout_reference if self.state.step == 0 else self._policy(pairs)
        self.details = scores(pairs, policy, self.heldout_reference)
        found = {name: self.details[name] for name in MEASURED if name in self.details}
        return found | {"heldout_hash": self.heldout_hash}

    def extra_metrics(self) -> dict[str, Any]:
        """All intervals, also by category and language, before as well, and what was truncated or left out."""
        pairs = self.sides["heldout"].pairs
        before = scores(pairs, self.heldout_reference, self.heldout_reference)
        kept = {name: value for name, value in before.items() if name.startswith("preference_")}
        return {
            **{name: value for name, value in self.details.items() if name not in MEASURED},
            **{f"before/{name}": value for name, value in kept.items()},
            **{f"{side}_{name}": count for side, found in self.sides.items() for name, count in found.counts.items()},
            "train_pairs": len(self.sides["train"].pairs),
        }

    def audit_faults(self, metrics: dict[str, Any]) -> list[str]:
        """A run after which not one held-out pair stands otherwise than before has not trained."""
        moved = metrics["chosen_change_nats_per_token"], metrics["rejected_change_nats_per_token"]
        return ["no held-out answer changed its probability"] if moved == (0.0, 0.0) else []

    def announcement(self) -> list[str]:
        """Pairs of both sides and what was done to them."""
        lines = []
        for side, found in self.sides.items():
            done = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.counts.items() if count)
            lines.append(f"{side}: {len(found.pairs)} pairs; {done or 'none truncated or left out'}")
        return lines

    def summary(self, metrics: dict[str, Any]) -> list[str]:
        """The shared screen's head, and a line for each category and language."""
        lines = [line for line in super().summary(metrics) if "_low" not in line and "_high" not in line]
        lines.append(f"{'group':<14}{'n':>5}  {'margin, nats [95%]':<28}{'accuracy [95%]':<24}{'chosen/token':>18}")
        groups = sorted({name.partition("/")[2] for name in self.details})
        return lines + [_group_line(metrics, group) for group in groups]

    def _cache(self) -> ReferenceCache:
        tokenizer = json.loads((self.parent / INFO_FILE).read_bytes())["digest"]
        key = {
            "parent": verify_manifest(self.parent),
            **{side: found.digest for side, found in self.sides.items()},
            "tokenizer": tokenizer,
            "max_length": self.config.max_length,
            "precision": self.config.precision,
        }
        return ReferenceCache(self.context.work, key)

    def _score(self, model: Any, pairs: Sequence[TokenPair], device: torch.device) -> np.ndarray:
        """(n, 2) float32 under a model that is not in an engine yet."""
        was_training = model.training
        model.eval()
        found = []
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            for rows in batches(pairs, self.config.micro_batch_size):
                found.append(self._answers(model, rows, device))
        model.train(was_training)
        return torch.cat(found).cpu().numpy()

    def _policy(self, pairs: Sequence[TokenPair]) -> np.ndarray:
        """(n, 2) under the engine; collective."""
        device = self.engine.device
        dealt = batches(pairs, self.config.eval_batch_size)
        score = scored(
            dealt,
            lambda rows: self._answers(self.forward, rows, device),
            columns=2,
            device=device,
            between=self.between_batches,
        )
        return score.float().numpy()

    def _answers(self, forward: Any, rows: Sequence[TokenPair], device: torch.device) -> torch.Tensor:
        from stages.runtime.dpo_trainer import answer_logprobs

        parts = columns(rows)
        examples = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        return answer_logprobs(forward, {name: tensor.to(device) for name, tensor in self.collate(examples).items()})


def _words(counts: dict[str, int]) -> str:
    """``336 long prompts, 2 equal answers``: what pairs were lost to."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)


def _check_rows(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse what no stage of ours writes, but an artifact from elsewhere may hold."""
    faults = []
    for side, found in rows.items():
        if not found:
            faults.append(Fault("data", f"must hold pairs on both sides; {side}.jsonl has none; run preferences again"))
        faults += [
            Fault("data", f"pair {row['id']} of {side} has equal answers; leave it out")
            for row in found
            if row["chosen"] == row["rejected"]
        ]
    both = {row["template"] for row in rows["train"]} & {row["template"] for row in rows["heldout"]}
    if both:
        faults.append(Fault("data", f"templates {sorted(both)[:5]} stand on both sides; run preferences again"))
    if faults:
        raise ConfigError(faults)


def _group_line(metrics: dict[str, Any], group: str) -> str:
    suffix = f"/{group}" if group else ""

    def shown(name: str, form: str) -> str:
        value = format(metrics[f"{name}{suffix}"], form)
        if f"{name}_low{suffix}" not in metrics:
            return f"{value} [one template]"
        low, high = (format(metrics[f"{name}{end}{suffix}"], form) for end in ("_low", "_high"))
        return f"{value} [{low}, {high}]"

    change = metrics[f"chosen_change_nats_per_token{suffix}"]
    figures = f"{shown('margin_nats', '+.3f'):<28}{shown('accuracy', '.3f'):<24}{change:>+18.3f}"
    return f"{group or 'all':<14}{metrics[f'n_pairs{suffix}']:>5}  {figures}"
