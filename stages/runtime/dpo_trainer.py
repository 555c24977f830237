"""TRL's DPOTrainer with our data, our cached reference and a term that keeps the chosen answers likely."""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer

from stages.runtime.finetune_trainer import OwnedTrainer


class OwnedDpoTrainer(OwnedTrainer, DPOTrainer):
    """Losses and their metrics are TRL's; ids, reference log-probabilities and steps are the stage's."""

    finetuning: Any

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The data set is in ids already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The columns come from the stage's cache: TRL's own knows neither kills nor damage."""
        return self.finetuning.with_reference(self, dataset)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        """TRL's loss of the pairs, and ``nll_weight`` times the chosen answers' NLL."""
        recorded = _Recorded(model)
        loss = super()._compute_loss(recorded, inputs, return_outputs)
        weight = self.finetuning.config.nll_weight
        if weight and not return_outputs:
            nll = chosen_nll(recorded.outputs[0].log_probs, inputs["completion_mask"])
            self._metrics["train"]["chosen_nll_nats_per_token"].append(float(nll.detach()))
            loss = loss + weight * nll
        return loss


class _Recorded:
    """A model whose outputs are kept: TRL's loss gives only a number back."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.outputs: list[Any] = []

    def __call__(self, **inputs: Any) -> Any:
        self.outputs.append(self._model(**inputs))
        return self.outputs[-1]


def chosen_nll(log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of the chosen answer's nats a token: sum(-log p) / tokens in each, so that no batch shows (T2).

    ``log_probs`` (2P, T-1) are 0 outside answers; ``completion_mask`` (2P, T); chosen rows come first.
    """
    n_pairs = len(log_probs) // 2
    lengths = completion_mask[:n_pairs, 1:].sum(1)
    return (-log_probs[:n_pairs].sum(1) / lengths).mean()


def answer_logprobs(forward: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(P, 2) sums of an answer's log-probabilities, chosen and rejected, as TRL's loss forms them.

    ``forward`` is a model with TRL's fused head, or its engine; ``batch`` comes from the collator of pairs.
    """
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    outputs = forward(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        fused_lm_head=True,
    )
    return torch.stack(outputs.log_probs.float().sum(1).chunk(2), dim=1)
