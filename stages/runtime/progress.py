"""One tidy line of progress: step, loss, lr, tokens a second, MFU on a known GPU, time left, age of the checkpoint."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TextIO

PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 peak FLOP/s by a part of the device's name, longest first (vendor data sheets); no MFU for others."""

WORTH_SAYING = 0.02
"""Share of the time spent waiting for data from which on the line of progress names it."""


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known."""
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in device_name), None)


@dataclasses.dataclass
class Progress:
    """Measures speed between lines and prints them on one rank.

    ``flops_per_token`` counts forward and backward; ``peak`` is one device's FLOP/s, None where MFU means nothing.
    """

    max_steps: int
    tokens_per_step: int
    flops_per_token: float
    world_size: int
    peak: float | None
    quiet: bool
    stream: TextIO | None = None
    checkpoint_every_steps: int = 0
    """Steps between saves, for the line that has none to tell of yet; 0 where only the end is saved."""

    def __post_init__(self) -> None:
        self._since = time.monotonic()
        self._tokens = 0
        self._steps = 0
        self._waited = 0.0
        self._saved_at: float | None = None
        self.seconds = 0.0
        """Seconds spent in training steps in this process, evaluations and saves left out."""

    def resume_clock(self) -> None:
        """Start measuring anew, after something that was not training."""
        self._since, self._tokens, self._steps, self._waited = time.monotonic(), 0, 0, 0.0

    def count(self, seconds: float) -> None:
        """Note one optimizer step that took ``seconds``."""
        self.seconds += seconds
        self._tokens += self.tokens_per_step
        self._steps += 1

    def waited(self, seconds: float) -> None:
        """Note that a step stood still for so long until its batches were there."""
        self._waited += seconds

    def saved(self, age_s: float = 0.0) -> None:
        """Note that a checkpoint was written ``age_s`` seconds ago."""
        self._saved_at = time.monotonic() - age_s

    def figures(self, step: int) -> dict[str, float]:
        """Figures since the last call, where they are known.

        ``tokens_per_s``, ``data_wait_share`` (of the time, waiting for batches), ``eta_s``, ``checkpoint_age_s``,
        ``mfu``.
        """
        elapsed = max(time.monotonic() - self._since, 1e-9)
        speed = self._tokens / elapsed
        figures = {"tokens_per_s": speed, "data_wait_share": self._waited / elapsed}
        if self._steps:
            figures["eta_s"] = (self.max_steps - step) * elapsed / self._steps
        if self._saved_at is not None:
            figures["checkpoint_age_s"] = time.monotonic() - self._saved_at
        if self.peak:
            figures["mfu"] = speed * self.flops_per_token / (self.peak * self.world_size)
        self.resume_clock()
        return figures

    def line(self, step: int, loss: float, lr: float, figures: dict[str, float], skipped: int) -> str:
        """The line for ``step`` optimizer steps done."""
        width = len(str(self.max_steps))
        parts = [f"step {step:>{width}}/{self.max_steps}", f"loss {loss:.4f}", f"lr {lr:.2e}"]
        parts.append(f"{figures['tokens_per_s']:,.0f} tok/s")
        if "mfu" in figures:
            parts.append(f"MFU {figures['mfu']:.1%}")
        if figures.get("data_wait_share", 0.0) >= WORTH_SAYING:
            parts.append(f"{figures['data_wait_share']:.0%} waiting for data")
        if "eta_s" in figures:
            parts.append(f"ETA {duration(figures['eta_s'])}")
        if saved := self._saved(step, figures.get("checkpoint_age_s")):
            parts.append(saved)
        if skipped:
            parts.append(f"{skipped} skipped")
        return "  ".join(parts)

    def _saved(self, step: int, age_s: float | None) -> str:
        """The age of the checkpoint, or when the first one is due; nothing where the run saves at its end alone."""
        if age_s is not None:
            return f"saved {duration(age_s)} ago"
        every = self.checkpoint_every_steps
        due = -(-step // every) * every if every else self.max_steps
        return f"first checkpoint at step {due}" if due < self.max_steps else ""

    def say(self, text: str) -> None:
        """Print ``text``, on the rank that speaks."""
        if not self.quiet:
            print(text, file=self.stream or sys.stdout, flush=True)


@dataclasses.dataclass
class EvaluationProgress:
    """A line every ``every_s`` seconds of an evaluation over ``documents``; a short one says nothing."""

    documents: int
    quiet: bool
    every_s: float = 5.0

    def __post_init__(self) -> None:
        self._started = self._said = time.monotonic()

    def at(self, documents: int) -> None:
        """Note that so many documents have been begun."""
        now = time.monotonic()
        if self.quiet or now - self._said < self.every_s or not documents:
            return
        self._said = now
        left = (now - self._started) * (self.documents - documents) / documents
        print(f"  evaluating: {documents:,} of {self.documents:,} documents, ETA {duration(left)}", flush=True)


def count_of(number: int, what: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def duration(seconds: float) -> str:
    """``42s``, ``3m05s``, ``2h07m`` or ``3d04h``."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole}s"
    if hours < 1:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{hours}h{minutes % 60:02d}m" if days < 1 else f"{days}d{hours % 24:02d}h"
