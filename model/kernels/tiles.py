"""How our scans' Triton kernels are cut."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Channels of a head a program at most, warps, and loads in flight."""

    width: int = 64
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """As Triton's launch takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}
