"""QLoRA: supervised fine-tuning of adapters on a base that is stored in four bits, and the merge afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.packing import IGNORE_INDEX
from model.projections import projections
from stages.runtime import adapters, distributed, rng
from stages.runtime.audit import AuditError
from stages.runtime.checkpoint import save_weights
from stages.runtime.finetune_report import summary_lines
from stages.runtime.finetune_scoring import batches
from stages.runtime.qlora_base import BaseBytes, quantise
from stages.runtime.qlora_merge import MergeReport, merge_both
from stages.runtime.sft_tuning import COLUMNS, SupervisedTuning
from stages.runtime.suites.intervals import ratio_interval, share_interval

ADAPTER_FOLDER = "adapter"
PROBE_TOKENS = 64
NATS, TOKENS, CORRECT = (COLUMNS.index(name) for name in ("nats", "tokens", "correct"))


class AdapterProbeError(AuditError):
    """Adapters that could not train, found before the first step; exit code 1."""


class QLoRATuning(SupervisedTuning):
    """One QLoRA run; the config is a ``QLoRAConfig``.

    ``model`` is PEFT's wrapper; the frozen base is quantised anew from the parent at every start, and checkpoints hold
    adapters alone.
    """

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.nats_before: list[float] = []
        self.adapter_bytes = 0
        self.base_bytes: BaseBytes
        self.merged: dict[str, Any]
        self.report: MergeReport

    def load_model(self) -> Any:
        """The parent quantised and frozen, with untrained adapters that were proven to matter.

        Raises:
            AdapterProbeError: naming every adapter that has no effect or no gradient (TRAPS K8, T11).
        """
        config = self.config
        model = self._parent()
        self.base_bytes = quantise(
            model,
            list(projections(self.spec)),
            blocksize=config.quantisation.blocksize,
            double_quant=config.quantisation.double_quant,
        )
        self.peft_config = adapters.peft_config(self.spec, config.adapter)
        ids = torch.tensor([self.train[0].ids[:PROBE_TOKENS]], device=model.device)
        model.eval()
        with torch.no_grad():
            base = model(ids).logits
        # The first A of every rank and every start.
        rng.seed_all(self.context.seed)
        wrapped = adapters.attach(model, self.peft_config).eval()
        faults = adapters.probe(wrapped, base, lambda: wrapped(ids).logits, lambda: wrapped(ids, labels=ids).loss)
        if faults:
            raise AdapterProbeError("; ".join(faults) + "; choose other adapter.targets")
        return wrapped.train()

    def checkpoint_bytes(self) -> int | None:
        """Unknown beforehand, and small: the base is not in it."""
        return None

    def extra_state(self) -> dict[str, Any]:
        """What each held-out conversation cost before the first step."""
        return {"nats_before": self.nats_before}

    def load_extra(self, state: dict[str, Any], folder: Path) -> None:
        """Take up ``extra_state``."""
        self.nats_before = state["nats_before"]

    def check_precision(self, fp32_islands: set[str], undecayed: set[str]) -> None:
        """Nothing but adapters may be trained, and they must be fp32 whatever the base."""
        super().check_precision(fp32_islands, undecayed)
        marks = (".lora_", ".modules_to_save.")
        strange = [name for name in adapters.trainable(self.model) if not any(mark in name for mark in marks)]
        if strange:
            raise RuntimeError(f"the base must be frozen; {', '.join(strange)} would be trained; report this")

    def measure(self) -> dict[str, Any]:
        """What supervised fine-tuning measures, and how many held-out answers are right at every token."""
        values = super().measure()
        if not self.nats_before:
            self.nats_before = self.table[:, NATS].tolist()
        right = (self.table[:, CORRECT] == self.table[:, TOKENS]).double()
        low, high = share_interval(right.tolist(), self._families())
        share = float(right.mean())
        return {**values, "exact_answers": share, "exact_answers_low": low, "exact_answers_high": high}

    def extra_metrics(self) -> dict[str, Any]:
        """Intervals of the held-out loss and of its change, sizes, and both merges."""
        with rng.undisturbed():
            self.merged, self.report = merge_both(
                self.model.eval(), self._parent, self.peft_config, self._merge_batches()
            )
        trained = sum(parameter.numel() for parameter in adapters.trainable(self.model).values())
        state = adapters.adapter_state(self.model)
        self.adapter_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        return {
            **super().extra_metrics(),
            **self._intervals(),
            "trainable_parameters": trained,
            "adapter_bytes": self.adapter_bytes,
            "base_bytes": self.base_bytes.held,
            "base_fp32_bytes": self.base_bytes.fp32,
            **self.report.metrics(),
        }

    def audit_faults(self, metrics: dict[str, Any]) -> list[str]:
        """Frozen or empty adapters (T4), a merge that costs more than they give (T11), a stop that is not learnt."""
        state = adapters.adapter_state(self.model)
        still = [name for name, tensor in state.items() if "lora_B" in name and not bool(tensor.any())]
        faults = [f"{len(still)} adapters never left zero: {', '.join(still[:4])}"] if still or not state else []
        return faults + self.report.faults() + super().audit_faults(metrics)

    def save(self, output: Path) -> None:
        """The kept merge as every stage's model, and the adapters beside it; collective."""
        save_weights(output, self.merged[self.report.kept.name], self.parent)
        parent = self.context.parents["from_"].name
        distributed.on_rank_zero(lambda: adapters.save_adapter(output / ADAPTER_FOLDER, self.model, base=parent))

    def announcement(self) -> list[str]:
        """Conversations, what is adapted, and what the base takes."""
        trained = sum(parameter.numel() for parameter in adapters.trainable(self.model).values())
        adapter, held = self.config.adapter, self.base_bytes
        return [
            *super().announcement(),
            f"{adapter.method} of rank {adapter.rank} on {len(self.peft_config.target_modules)} projections: "
            f"{trained:,} parameters to train; base {held.held:,} bytes with NF4, {held.fp32:,} in fp32",
        ]

    def summary(self, metrics: dict[str, Any]) -> list[str]:
        """The run, the loss with its interval, and the two merges."""
        change = "change_nats_per_token"
        bounds = "no interval of one document"
        if f"{change}_low" in metrics:
            bounds = f"95% interval {metrics[f'{change}_low']:+.4f} to {metrics[f'{change}_high']:+.4f}"
        lines = [
            f"held-out change {metrics[change]:+.4f} nats/token, {bounds}; exact answers "
            f"{metrics['exact_answers']:.1%}",
            f"trained {metrics['trainable_parameters']:,} parameters, {metrics['adapter_bytes']:,} bytes; "
            f"the adapters moved the base by {self.report.adapter_kl_base:.3g} nats/token",
        ]
        for merge in self.report.merges:
            kept = ", kept" if merge.name == self.report.kept.name else ""
            lines.append(
                f"  merged into {merge.name}: KL to the trained model {merge.kl_adapter:.3g}, to the base "
                f"{merge.kl_base:.3g} nats/token{kept}"
            )
        return [*summary_lines(metrics, self.state.before, self.start_line, self.loss_name), *lines]

    def _parent(self) -> Any:
        return super().load_model().to(_device()).requires_grad_(False).eval()

    def _intervals(self) -> dict[str, float]:
        """95% intervals over documents of held-out conversations, and how many these are; the change is paired."""
        tokens, after = self.table[:, TOKENS].tolist(), self.table[:, NATS]
        before = torch.tensor(self.nats_before, dtype=torch.float64)
        ids = [str(number) for number in range(len(tokens))]
        columns = {"nats_per_token": after, "before/nats_per_token": before, "change_nats_per_token": after - before}
        families = self._families()
        change = float((after - before).sum()) / max(sum(tokens), 1.0)
        found: dict[str, float] = {"change_nats_per_token": change, "heldout_families": len(set(families))}
        for name, column in columns.items():
            interval = ratio_interval(ids, column.tolist(), tokens, families)
            if interval is not None:
                found[f"{name}_low"], found[f"{name}_high"] = interval
        return found

    def _families(self) -> list[str]:
        return [conversation.family for conversation in self.heldout]

    def _merge_batches(self) -> list[dict[str, torch.Tensor]]:
        # Evenly, since the file may go source by source.
        rows = self.heldout[:: -(-len(self.heldout) // self.config.merge_conversations)]
        groups = list(batches(rows, self.config.eval_batch_size))
        return [_padded(group) for group in groups[distributed.rank() :: distributed.world_size()]]


def _padded(rows: Any) -> dict[str, torch.Tensor]:
    width = max(len(row.ids) for row in rows)
    filler = [width - len(row.ids) for row in rows]
    pairs = list(zip(rows, filler, strict=True))
    return {
        "input_ids": torch.tensor([row.ids + [0] * pad for row, pad in pairs]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * pad for row, pad in pairs]),
        "labels": torch.tensor([row.labels + [IGNORE_INDEX] * pad for row, pad in pairs]),
    }


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
