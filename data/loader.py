"""Training batches from token shards: a pure function of the step, so that any run can seek, resume and reshard.

Which source a row comes from follows from its number (``data.mix``), which tokens of the source from the source's own
running number (``data.windows``). No state is kept: whatever ranks share a step read the same rows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.errors import DataError
from data.mixture import Mixture, cell_of
from data.packing import pack
from data.shards import TRAIN, open_shard, read_info
from data.windows import Packing, open_rows

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_EPOCHS = 4.0
"""Repeating data up to about four times costs little against fresh data (Muennighoff et al. 2023, arXiv:2305.16264)."""
SHARE_TOKENS = 10_000_000
"""Tokens over any of which shares are to hold within half a percent (TRAPS T5)."""


class Batch(NamedTuple):
    """Packed rows (R, T); see ``data.packing.pack`` for a worked row."""

    input_ids: torch.Tensor
    """(R, T) int64."""
    labels: torch.Tensor
    """(R, T) int64, not shifted; -100 where a document begins, and on padding."""
    position_ids: torch.Tensor
    """(R, T) int64, from 0 in each document."""
    seq_idx: torch.Tensor
    """(R, T) int32, number of the document within its row."""


def make_batch(input_ids: np.ndarray, eos_id: int, pad_id: int | None) -> Batch:
    """Tensors of packed rows (R, T) of ids."""
    import torch

    packed = pack(input_ids, eos_id, pad_id)
    return Batch(torch.from_numpy(input_ids), *(torch.from_numpy(array) for array in packed))


def check_rows(step: int, rows: slice, global_batch_size: int) -> tuple[int, int]:
    """First and last (exclusive) row that ``rows`` names.

    Raises:
        ValueError: if ``step`` is negative or ``rows`` leaves the global batch.
    """
    first, last = rows.start or 0, global_batch_size if rows.stop is None else rows.stop
    if step < 0 or not 0 <= first < last <= global_batch_size or rows.step not in (None, 1):
        raise ValueError(f"rows must be a part of 0..{global_batch_size} of a step from 0; got step {step}, {rows}")
    return first, last


def check_sizes(seq_len: int, global_batch_size: int) -> None:
    """Refuse rows or batches that hold nothing to predict."""
    for name, value, least in (("seq_len", seq_len, 2), ("global_batch_size", global_batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}; set {name}={least} or more")


class MixtureLoader:
    """Rows of ``seq_len`` tokens from several sources at given shares of the tokens.

    Args:
        tokens_dir: output folder of ``tokenize``.
        seq_len: T, tokens a row.
        global_batch_size: rows an optimizer step, over all ranks and micro-steps.
        seed: of phases and orders.
        mixture: what shares are asked for, step by step.
        max_epochs: most passes over any one source that ``plan`` accepts; a mixture's own cap takes its place.
        packing: ``cut`` the stream into rows, or keep documents ``whole``.

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
        mixture: Mixture | None = None,
        max_epochs: float = DEFAULT_MAX_EPOCHS,
        packing: Packing = "cut",
    ) -> None:
        check_sizes(seq_len, global_batch_size)
        self.info = read_info(tokens_dir)
        self.seq_len, self.global_batch_size, self.max_epochs = seq_len, global_batch_size, max_epochs
        self.mixture, self.pads = mixture or Mixture(), packing == "whole"
        tokens = {source["name"]: source[TRAIN]["tokens"] for source in self.info.sources}
        self.phase_shares = self.mixture.shares(self.info.sources, tokens, seq_len * global_batch_size)
        read = [name for name in tokens if any(phase[name] for phase in self.phase_shares)]
        self._rows = {
            name: open_rows(
                packing, open_shard(self.info, TRAIN, name), seq_len=seq_len, seed=seed, pad_id=self.info.pad_id
            )
            for name in read
        }
        fill = {name: rows.fill for name, rows in self._rows.items()}
        self._schedule = self.mixture.schedule(self.phase_shares, fill, global_batch_size)

    def batch(self, step: int, rows: slice) -> Batch:
        """Rows ``rows`` of step ``step`` (from 0): the same whatever was read before and however ranks share the step.

        Raises:
            ValueError: if ``step`` is negative or ``rows`` leaves the global batch.
        """
        first, last = check_rows(step, rows, self.global_batch_size)
        numbers = step * self.global_batch_size + np.arange(first, last, dtype=np.int64)
        return make_batch(self._read(numbers), self.info.eos_id, self.info.pad_id if self.pads else None)

    def plan(self, max_steps: int) -> dict[str, dict[str, float]]:
        """What ``max_steps`` steps read of each source: shares asked and realised (of tokens), tokens, epochs, and
        ``padding``, the share of its rows that packing leaves open.

        Raises:
            DataError: if a source would be read more than ``max_epochs`` times, or a source with a weight not at all.
        """
        asked = asked_shares(self.mixture, self.phase_shares, max_steps)
        counts = self._schedule.counts(max_steps * self.global_batch_size).tolist()
        tokens = [count * self.seq_len * rows.fill for count, rows in zip(counts, self._rows.values(), strict=True)]
        total = max(1.0, math.fsum(tokens))
        plan = {
            name: {
                "share_asked": asked[name],
                "share_realised": read / total,
                "tokens": read,
                "epochs": rows.epochs(count),
                "padding": 1 - rows.fill,
            }
            for (name, rows), count, read in zip(self._rows.items(), counts, tokens, strict=True)
        }
        self._check_plan(plan, max_steps)
        return plan

    def worst_share_error(self, tokens: int = SHARE_TOKENS) -> float:
        """Largest distance of any source's share of rows from the one asked, over any ``tokens`` in a row."""
        return self._schedule.worst_error(max(1, tokens // self.seq_len))

    def _check_plan(self, plan: dict[str, dict[str, float]], max_steps: int) -> None:
        faults = []
        cells = {source["name"]: cell_of(source, self.mixture.by) for source in self.info.sources}
        for name, figures in plan.items():
            if self.mixture.cap_epochs is None and figures["epochs"] > self.max_epochs:
                enough = math.ceil(figures["epochs"] * 10) / 10
                message = (
                    f"must cover the {figures['epochs']:.2f} times that {max_steps} steps read source {name}; got "
                    f"{self.max_epochs:g}; lower mixture.{cells[name]} or max_steps, add data, set cap_epochs, or set "
                    f"max_epochs={enough:g}"
                )
                faults.append(("max_epochs", message))
            if self.mixture.weights is not None and max_steps and figures["share_asked"] and not figures["tokens"]:
                faults.append(no_row(cells[name], figures["share_asked"], max_steps))
        if faults:
            raise DataError(faults)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """(R, T) int64 ids of global row numbers (R,)."""
        owners, numbers = self._schedule.locate(rows)
        result = np.empty((len(rows), self.seq_len), dtype=np.int64)
        readers = list(self._rows.values())
        for owner in np.unique(owners).tolist():
            mine = owners == owner
            result[mine] = readers[owner].read(numbers[mine])
        return result


def no_row(word: str, share: float, max_steps: int) -> tuple[str, str]:
    """The fault of a weight that gives no row (TRAPS T5)."""
    message = (
        f"must give a row in {max_steps} steps or be 0; got the share {share:.2g}, which gives none; raise it or "
        f"max_steps, or set mixture.{word}=0"
    )
    return f"mixture.{word}", message


def asked_shares(mixture: Mixture, shares: list[dict[str, float]], max_steps: int) -> dict[str, float]:
    """Share of every source over a whole run: its phases' shares by their lengths."""
    edges = [min(phase.from_step, max_steps) for phase in mixture.phases] + [max(1, max_steps)]
    lengths = np.diff(edges) if max_steps else np.eye(len(shares), dtype=np.int64)[0]
    return {
        name: math.fsum(phase[name] * length for phase, length in zip(shares, lengths.tolist(), strict=True))
        / int(lengths.sum())
        for name in shares[0]
    }
