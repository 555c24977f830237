"""Bits per byte on the frozen held-out set: the same number on one rank or many, today or tomorrow (TRAPS M1 to M3)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from stages.runtime import distributed, rng

ALL = "all"
Forward = Callable[..., torch.Tensor]
"""``(input_ids, position_ids, seq_idx)``, each (R, T), to logits (R, T, V)."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over the scored tokens, by language and for ``"all"``, and the hash of the set that they belong to."""

    heldout_hash: str
    nats: dict[str, float]
    tokens: dict[str, int]
    n_bytes: dict[str, int]

    def bpb(self, language: str = ALL) -> float:
        """Bits spent on the scored tokens over the UTF-8 bytes that those very tokens decode to."""
        return self.nats[language] / math.log(2) / self.n_bytes[language]

    def metrics(self) -> dict[str, float | int | str]:
        """``bpb`` and ``bpb/<language>``, ``nats_per_token``, counts, and the set's hash."""
        by_language = {f"bpb/{name}": self.bpb(name) for name in self.nats if name != ALL}
        return {
            "bpb": self.bpb(),
            **by_language,
            "nats_per_token": self.nats[ALL] / self.tokens[ALL],
            "scored_tokens": self.tokens[ALL],
            "scored_bytes": self.n_bytes[ALL],
            "heldout_hash": self.heldout_hash,
        }


def evaluate(
    forward: Forward,
    heldout: Any,
    *,
    seq_len: int,
    rows: int,
    device: torch.device,
    between: Callable[[int], None] = lambda documents: None,
) -> Evaluation:
    """Score every held-out window; collective, since under ZeRO-3 each forward is.

    Batches are dealt out to the ranks in turn and every window's sum is brought together before any of them are added
    up, in one fixed order, so that the number of ranks does not show in the last bit.

    Args:
        forward: the model without dropout; no gradient is taken.
        heldout: a ``data.heldout.HeldoutSet``.
        seq_len: T, longest window in tokens.
        rows: R, windows a forward.
        device: where the ranks' sums are exchanged.
        between: called on all ranks after each hand of batches with the number of documents begun so far; what it
            raises ends the evaluation.
    """
    languages: list[str] = []
    sums: list[torch.Tensor] = []
    begun: set[int] = set()
    with rng.undisturbed(), torch.no_grad():
        for dealt in _deal(heldout.batches(seq_len, rows)):
            mine = distributed.rank() if distributed.rank() < len(dealt) else 0
            scored = _score(forward, dealt[mine])
            for number, batch in enumerate(dealt):
                languages += batch.language
                is_mine = number == distributed.rank()
                sums.append(scored if is_mine else torch.zeros(len(batch.language), 3, dtype=torch.float64))
                begun.update(batch.document)
            between(len(begun))
    return _evaluation(heldout.hash, languages, _combined(torch.cat(sums), device))


def _deal(batches: Iterator[Any]) -> Iterator[Sequence[Any]]:
    """Batches, as many at a time as there are ranks; the last hand may be short."""
    while hand := list(itertools.islice(batches, distributed.world_size())):
        yield hand


def _score(forward: Forward, batch: Any) -> torch.Tensor:
    """(R, 3) float64 on the host: nats, scored tokens and their bytes, a row each."""
    logits = forward(input_ids=batch.input_ids, position_ids=batch.position_ids, seq_idx=batch.seq_idx)
    labels = batch.labels.to(logits.device)
    # Row by row, so that the fp32 copy of the logits is one row's.
    nats = [
        cross_entropy(row[:-1].float(), label[1:], ignore_index=-100, reduction="none").double().sum()
        for row, label in zip(logits, labels, strict=True)
    ]
    tokens, n_bytes = batch.scored.sum(1).double(), batch.token_bytes.sum(1).double()
    return torch.stack([torch.stack(nats).cpu(), tokens, n_bytes], dim=1)


def _combined(sums: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Every rank's rows: each row is zero but on one rank, so the sum is exact."""
    if distributed.world_size() > 1:
        shared = sums.to(device)
        torch.distributed.all_reduce(shared)
        sums = shared.cpu()
    return sums


def _evaluation(heldout_hash: str, languages: list[str], sums: torch.Tensor) -> Evaluation:
    columns: list[dict[str, float]] = [dict.fromkeys([*sorted(set(languages)), ALL], 0.0) for _ in range(3)]
    for language, row in zip(languages, sums.tolist(), strict=True):
        for column, value in zip(columns, row, strict=True):
            column[language] += value
            column[ALL] += value
    nats, tokens, n_bytes = columns
    return Evaluation(
        heldout_hash,
        nats,
        {name: int(value) for name, value in tokens.items()},
        {name: int(value) for name, value in n_bytes.items()},
    )
