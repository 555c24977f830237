"""Training batches from token shards: a pure function of the step, so that any run can seek, resume and reshard.

Each source's stream is read as a circle. Epoch e of a source starts at a phase drawn for it and cuts the circle into
floor(tokens / seq_len) windows, visited in a keyed order; what is left over (less than one window, elsewhere in every
epoch) waits for the next epoch. Rows are whole windows: nothing is padded.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.errors import DataError
from data.mix import SourceSchedule, hash64, permute
from data.packing import pack
from data.shards import TRAIN, open_shard, read_info

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_EPOCHS = 4.0
"""Repeating data up to about four times costs little against fresh data (Muennighoff et al. 2023, arXiv:2305.16264)."""


class Batch(NamedTuple):
    """Packed rows (R, T); see ``data.packing.pack`` for a worked row."""

    input_ids: torch.Tensor
    """(R, T) int64."""
    labels: torch.Tensor
    """(R, T) int64, not shifted; -100 where a document begins."""
    position_ids: torch.Tensor
    """(R, T) int64, from 0 in each document."""
    seq_idx: torch.Tensor
    """(R, T) int32, number of the document within its row."""


class MixtureLoader:
    """Rows of ``seq_len`` tokens from several sources at fixed shares.

    Args:
        tokens_dir: output folder of ``tokenize``.
        seq_len: T, tokens a row.
        global_batch_size: rows an optimizer step, over all ranks and micro-steps.
        seed: of phases and orders.
        weights: share of each source, any positive scale, 0 leaves a source out; none means by tokens.
        max_epochs: most passes over any one source that ``plan`` accepts.

    Raises:
        ValueError: naming the field that does not fit; a ``DataError`` for the weights.
    """

    def __init__(
        self,
        tokens_dir: Path | str,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        weights: dict[str, float] | None = None,
        max_epochs: float = DEFAULT_MAX_EPOCHS,
    ) -> None:
        for name, value, least in (("seq_len", seq_len, 2), ("global_batch_size", global_batch_size, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}; set {name}={least} or more")
        self.info = read_info(tokens_dir)
        self.seq_len, self.global_batch_size, self.max_epochs = seq_len, global_batch_size, max_epochs
        self.seed, self.weighted = seed, weights is not None
        tokens = {source["name"]: source[TRAIN]["tokens"] for source in self.info.sources}
        self.shares = _shares(tokens, weights)
        self._shards = [open_shard(self.info, TRAIN, name) for name in self.shares]
        self._schedule = SourceSchedule(np.array(list(self.shares.values())))

    def batch(self, step: int, rows: slice) -> Batch:
        """Rows ``rows`` of step ``step`` (from 0): the same whatever was read before and however ranks share the step.

        Raises:
            ValueError: if ``step`` is negative or ``rows`` leaves the global batch.
        """
        import torch

        first, last = rows.start or 0, self.global_batch_size if rows.stop is None else rows.stop
        if step < 0 or not 0 <= first < last <= self.global_batch_size or rows.step not in (None, 1):
            raise ValueError(
                f"rows must be a part of 0..{self.global_batch_size} of a step from 0; got step {step}, {rows}"
            )
        input_ids = self._windows(step * self.global_batch_size + np.arange(first, last, dtype=np.int64))
        packed = pack(input_ids, self.info.eos_id)
        return Batch(torch.from_numpy(input_ids), *(torch.from_numpy(array) for array in packed))

    def plan(self, max_steps: int) -> dict[str, dict[str, float]]:
        """What ``max_steps`` steps read of each source: shares asked and realised (of rows), tokens, epochs.

        Raises:
            DataError: if a source would be read more than ``max_epochs`` times, or a source with a weight not at all.
        """
        counts = self._schedule.counts(max_steps * self.global_batch_size)
        total = max(1, int(counts.sum()))
        plan = {}
        for (name, share), shard, count in zip(self.shares.items(), self._shards, counts.tolist(), strict=True):
            tokens = count * self.seq_len
            plan[name] = {
                "share_asked": share,
                "share_realised": count / total,
                "tokens": tokens,
                "epochs": tokens / len(shard.tokens),
            }
        self._check_plan(plan, max_steps)
        return plan

    def _check_plan(self, plan: dict[str, dict[str, float]], max_steps: int) -> None:
        faults = []
        for name, figures in plan.items():
            if figures["epochs"] > self.max_epochs:
                enough = math.ceil(figures["epochs"] * 10) / 10
                message = (
                    f"must cover the {figures['epochs']:.2f} times that {max_steps} steps read source {name}; got "
                    f"{self.max_epochs:g}; lower mixture.{name} or max_steps, add data, or set max_epochs={enough:g}"
                )
                faults.append(("max_epochs", message))
            if self.weighted and max_steps and not figures["tokens"]:
                message = (
                    f"must give a row in {max_steps} steps or be 0; got the share {figures['share_asked']:.2g}, which "
                    f"gives none; raise it or max_steps, or set mixture.{name}=0"
                )
                faults.append((f"mixture.{name}", message))
        if faults:
            raise DataError(faults)

    def _windows(self, rows: np.ndarray) -> np.ndarray:
        """(R, T) int64 ids of global row numbers (R,)."""
        owners, numbers = self._schedule.locate(rows)
        result = np.empty((len(rows), self.seq_len), dtype=np.int64)
        for owner in np.unique(owners):
            mine = owners == owner
            tokens = self._shards[owner].tokens
            starts = self._starts(self._shards[owner].name, len(tokens), numbers[mine])
            places = starts[:, None] + np.arange(self.seq_len)
            result[mine] = np.take(tokens, places, mode="wrap")
        return result

    def _starts(self, name: str, n_tokens: int, numbers: np.ndarray) -> np.ndarray:
        """Where in a source's circle its windows ``numbers`` start.

        A source shorter than one window has one window an epoch, which goes round the circle as often as it must;
        ``plan`` counts such repeats by tokens.
        """
        n_windows = max(1, n_tokens // self.seq_len)
        epochs, slots = np.divmod(numbers, n_windows)
        starts = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            phase = hash64("phase", self.seed, name, epoch) % n_tokens
            order = permute(slots[mine], n_windows, hash64("order", self.seed, name, epoch))
            starts[mine] = (phase + order * self.seq_len) % n_tokens
        return starts


def _shares(tokens: dict[str, int], weights: dict[str, float] | None) -> dict[str, float]:
    """Share of each source that is read, summing to one."""
    weights = {name: float(count) for name, count in tokens.items()} if weights is None else weights
    faults: list[tuple[str, str]] = []
    for name, weight in weights.items():
        if name not in tokens:
            near = difflib.get_close_matches(name, tokens, n=1, cutoff=0) or ["-"]
            faults.append((f"mixture.{name}", f"must name a source of {sorted(tokens)}; did you mean {near[0]}?"))
        elif not (math.isfinite(weight) and weight >= 0):
            faults.append((f"mixture.{name}", f"must be 0 or a positive number; got {weight}; set its share"))
        elif weight and not tokens[name]:
            message = f"must be 0, since the source holds no training token; got {weight}; set 0"
            faults.append((f"mixture.{name}", message))
    faults += [
        (f"mixture.{name}", "must give every source its weight; got none; set it, 0 leaves it out")
        for name in tokens
        if name not in weights
    ]
    if not faults and not any(weights.values()):
        faults.append(("mixture", "must leave at least one source with training tokens; got none; raise one weight"))
    if faults:
        raise DataError(faults)
    total = sum(weights.values())
    return {name: weights[name] / total for name in tokens if weights[name]}
