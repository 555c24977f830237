"""Adapters merged into weights two ways, and what each way costs in nats (TRAPS T11).

The adapters were trained on the base as NF4 stores it. Merged into the dequantised base they give the model that was
trained, up to rounding; merged into the parent's own weights they give a model without the quantisation's error, to
which the adapters were never fitted. Which is nearer to the trained model is measured, not assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from stages.runtime import distributed
from stages.runtime.adapters import adapter_state, merged, switched_off
from stages.runtime.qlora_base import copy_dequantised

DEQUANTISED, PARENT = "dequantised_base", "parent"
"""The two ways, by what the adapters are merged into."""
Batch = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Merge:
    """One way's cost over the scored tokens, nats a token: KL(trained || merged), KL(base || merged), and its loss."""

    name: str
    kl_adapter: float
    kl_base: float
    nll: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Both ways, and beside them the trained model's loss, what its adapters changed, and what quantising did."""

    merges: tuple[Merge, Merge]
    adapter_nll: float
    adapter_kl_base: float
    base_kl_parent: float
    tokens: int

    @property
    def kept(self) -> Merge:
        """The way that is nearer to the model as it was trained."""
        return min(self.merges, key=lambda merge: merge.kl_adapter)

    def metrics(self) -> dict[str, float | int | str]:
        """Names and numbers for ``evaluation.json``."""
        found: dict[str, float | int | str] = {"merge_kept": self.kept.name, "merge_scored_tokens": self.tokens}
        for merge in self.merges:
            found[f"merge_kl_adapter_nats_per_token/{merge.name}"] = merge.kl_adapter
            found[f"merge_kl_base_nats_per_token/{merge.name}"] = merge.kl_base
            found[f"merge_nats_per_token/{merge.name}"] = merge.nll
        found["merge_nats_per_token/adapter"] = self.adapter_nll
        found["adapter_kl_base_nats_per_token"] = self.adapter_kl_base
        found["base_kl_parent_nats_per_token"] = self.base_kl_parent
        return found

    def faults(self) -> list[str]:
        """The kept merge must cost less than the adapters give."""
        if self.kept.kl_adapter < self.adapter_kl_base:
            return []
        cost = f"the merge costs {self.kept.kl_adapter:.3g} nats a token against the trained model"
        return [f"{cost}, and the adapters changed no more than {self.adapter_kl_base:.3g}"]


def merge_both(
    adapted: Any, load_parent: Callable[[], Any], config: Any, batches: Iterable[Batch]
) -> tuple[dict[str, Any], MergeReport]:
    """Both merged models in fp32, by name, and the report.

    Args:
        adapted: the model as trained, in evaluation mode.
        load_parent: a fresh parent in full precision, on the same device, at every call.
        config: PEFT's configuration of the adapters.
        batches: this rank's held-out ``input_ids``, ``attention_mask`` and ``labels``; sums are over all ranks.
    """
    state, base = adapter_state(adapted), load_parent()
    copy_dequantised(adapted, base)
    models = {
        DEQUANTISED: merged(base, state, config).eval(),
        PARENT: merged(load_parent(), state, config).eval(),
    }
    return models, _report(adapted, load_parent().eval(), models, batches)


def _report(adapted: Any, parent: Any, models: Mapping[str, Any], batches: Iterable[Batch]) -> MergeReport:
    sums, tokens = torch.zeros(3 + 3 * len(models), dtype=torch.float64), 0
    with torch.no_grad():
        for batch in batches:
            trained, goals = _logprobs(adapted, batch)
            with switched_off(adapted):
                base, _ = _logprobs(adapted, batch)
            found = [_nll(trained, goals), _kl(trained, base), _kl(_logprobs(parent, batch)[0], base)]
            for model in models.values():
                other, _ = _logprobs(model, batch)
                found += [_kl(trained, other), _kl(base, other), _nll(other, goals)]
            sums += torch.tensor(found, dtype=torch.float64)
            tokens += len(goals)
    total = max(1, int(distributed.all_reduce_sum(tokens)))
    adapter_nll, adapter_kl, base_kl, *rest = [distributed.all_reduce_sum(part) / total for part in sums.tolist()]
    costs = [Merge(name, *rest[3 * number : 3 * number + 3]) for number, name in enumerate(models)]
    return MergeReport((costs[0], costs[1]), adapter_nll, adapter_kl, base_kl, total)


def _logprobs(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N, V) in float64 where a label is scored, row by row, and the labels (N,)."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    goals = batch["labels"][:, 1:].to(model.device)
    scored = goals != -100
    logits = model(**inputs, use_cache=False).logits[:, :-1][scored]
    return torch.log_softmax(logits.double(), -1), goals[scored]


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Sum over tokens of KL(p || q); not below zero, which rounding could make of an exact zero."""
    return max(0.0, float((p.exp() * (p - q)).sum()))


def _nll(p: torch.Tensor, goals: torch.Tensor) -> float:
    return -float(p.gather(1, goals[:, None]).sum())
