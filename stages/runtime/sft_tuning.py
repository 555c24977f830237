"""Supervised fine-tuning: conversations packed without padding, the assistant's tokens scored, its stop learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from data import tokenizer as tokenizers
from data.conversations import Conversation, Counts, read_conversations, scored_hash
from data.errors import DataError
from data.packing import IGNORE_INDEX
from stages.base import ConfigError, Fault
from stages.runtime.finetune import Finetuning
from stages.runtime.finetune_scoring import batches, scored

COLUMNS = ("nats", "tokens", "correct", "stop_probability", "stop_first", "ends", "early_stop_probability", "inside")
"""What is summed over a held-out conversation; see ``SupervisedTuning.measure``."""


class SupervisedTuning(Finetuning):
    """One supervised run; the config is a ``SupervisedConfig``."""

    headline = "nats_per_token"

    def prepare(self) -> None:
        """Render and count both sets; see ``Finetuning.prepare``."""
        self.stop_id = tokenizers.special_ids(self.parent)[tokenizers.IM_END]
        self.train, self.train_counts = self._read("train.jsonl")
        self.heldout, self.heldout_counts = self._read("heldout.jsonl")
        self.heldout_hash = scored_hash(self.heldout)
        stops = sum(conversation.labels.count(self.stop_id) for conversation in self.train)
        if not stops:
            message = "must let the assistant end a turn with <|im_end|> at least once; got none within max_length"
            raise ConfigError(Fault("data", f"{message} {self.config.max_length}; raise it"))

    def _read(self, name: str) -> tuple[list[Conversation], Counts]:
        config = self.config
        try:
            return read_conversations(
                self.context.parent_output("data") / name,
                self.tokenizer,
                max_length=config.max_length,
                over_length=config.over_length,
            )
        except DataError as error:
            raise ConfigError([Fault(field or "data", message) for field, message in error.faults]) from error

    def make_trainer(self, model: Any, arguments: dict[str, Any], callbacks: list[Any]) -> Any:
        """TRL's SFTTrainer; its padding-free collator lays a micro-batch's conversations end to end in one row."""
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        from stages.runtime.finetune_trainer import OwnedTrainer

        class OwnedSFTTrainer(OwnedTrainer, SFTTrainer):
            """TRL's loss and collator under our loop."""

        rows = {
            "input_ids": [conversation.ids for conversation in self.train],
            "labels": [conversation.labels for conversation in self.train],
        }
        # Rows are rendered already: the library's own preparation would make a special of a literal <|im_end|>.
        settings = SFTConfig(
            **arguments,
            packing=False,
            padding_free=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        return OwnedSFTTrainer(
            finetuning=self,
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict(rows),
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )

    def measure(self) -> dict[str, Any]:
        """Figures of the assistant's tokens in held-out conversations.

        ``nats_per_token`` and ``token_accuracy`` over all of them, by language too; ``stop_probability``, the mean
        probability of ``<|im_end|>`` where a turn ends, and ``stop_rate``, how often it is the likeliest there;
        ``early_stop_probability``, its mean where the turn goes on.
        """
        self.table = table = scored(
            batches(self.heldout, self.config.eval_batch_size),
            self._score,
            columns=len(COLUMNS),
            device=self.engine.device,
            between=self.between_batches,
        )
        languages = sorted({conversation.language for conversation in self.heldout} - {""})
        values = _figures(table.sum(0).tolist())
        for language in languages if len(languages) > 1 else []:
            rows = [number for number, row in enumerate(self.heldout) if row.language == language]
            values[f"nats_per_token/{language}"] = _figures(table[rows].sum(0).tolist())["nats_per_token"]
        return {**values, "heldout_conversations": len(self.heldout), "heldout_hash": self.heldout_hash}

    def _score(self, rows: Sequence[Conversation]) -> torch.Tensor:
        """(R, columns): sums over the scored tokens of each conversation."""
        width = max(len(row.ids) for row in rows)
        filler = [width - len(row.ids) for row in rows]
        ids = torch.tensor([row.ids + [0] * pad for row, pad in zip(rows, filler, strict=True)])
        mask = torch.tensor([[1] * len(row.ids) + [0] * pad for row, pad in zip(rows, filler, strict=True)])
        labels = torch.tensor([row.labels + [IGNORE_INDEX] * pad for row, pad in zip(rows, filler, strict=True)])
        logits = self.forward(input_ids=ids, attention_mask=mask).logits
        return torch.stack(
            [
                _sums(row[:-1], label[1:], self.stop_id)
                for row, label in zip(logits, labels.to(logits.device), strict=True)
            ]
        )

    def audit_faults(self, metrics: dict[str, Any]) -> list[str]:
        """An answer that does not end: ``<|im_end|>`` not learnt where turns end (TRAPS T4, T8)."""
        least, found = self.config.min_stop_probability, metrics["stop_probability"]
        faults = []
        if found < least:
            faults.append(
                f"<|im_end|> has mean probability {found:.3g} where held-out answers end, below min_stop_probability "
                f"{least:g}; train longer, or lower it"
            )
        if least and found <= metrics["early_stop_probability"]:
            faults.append("<|im_end|> is no likelier where held-out answers end than inside them")
        return faults

    def extra_metrics(self) -> dict[str, Any]:
        """What became of the conversations."""
        counts, steps = self.train_counts, self.config.max_steps
        return {
            "conversations": counts.conversations,
            "conversations_over_length": counts.over_length,
            "conversations_unsupervised": counts.unsupervised,
            "epochs": steps * self.config.global_batch_size / counts.conversations,
        }

    def announcement(self) -> list[str]:
        """What is trained on."""
        epochs = self.config.max_steps * self.config.global_batch_size / len(self.train)
        policy = {"drop": "dropped", "truncate": "truncated"}[self.config.over_length]
        return [
            f"conversations to train on: {self.train_counts.line} ({policy}); {epochs:.2f} epochs",
            f"conversations held out: {self.heldout_counts.line}",
        ]


def _sums(logits: torch.Tensor, labels: torch.Tensor, stop_id: int) -> torch.Tensor:
    """One conversation's sums, as ``COLUMNS`` names them: ``logits`` (T, V) predict ``labels`` (T,)."""
    chosen = labels != IGNORE_INDEX
    # Only what is scored is widened: the fp32 copy of all logits would be the largest tensor of the run.
    logprobs = torch.log_softmax(logits[chosen].float(), -1)
    goals = labels[chosen]
    nats = -logprobs.gather(1, goals[:, None])[:, 0].double()
    first = logprobs.argmax(-1)
    stop = logprobs[:, stop_id].exp().double()
    ends = goals == stop_id
    return torch.stack(
        [
            nats.sum(),
            chosen.sum().double(),
            (first == goals).sum().double(),
            stop[ends].sum(),
            (first[ends] == stop_id).sum().double(),
            ends.sum().double(),
            stop[~ends].sum(),
            (~ends).sum().double(),
        ]
    )


def _figures(sums: list[float]) -> dict[str, Any]:
    named = dict(zip(COLUMNS, sums, strict=True))
    tokens, ends, inside = max(named["tokens"], 1.0), max(named["ends"], 1.0), max(named["inside"], 1.0)
    return {
        "nats_per_token": named["nats"] / tokens,
        "token_accuracy": named["correct"] / tokens,
        "stop_probability": named["stop_probability"] / ends,
        "stop_rate": named["stop_first"] / ends,
        "early_stop_probability": named["early_stop_probability"] / inside,
        "scored_tokens": int(named["tokens"]),
        "scored_turn_ends": int(named["ends"]),
    }
