"""What a recipe says of the suite ``code``. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.base import Section, operational
from stages.runtime.sandbox_levels import Limits

SandboxChoice = Literal["auto", "bubblewrap", "landlock", "landlock-own-uid"]


class CodeConfig(Section):
    """Programs that the model writes, executed in the sandbox against the problems' tests."""

    problems: int | None = Field(None, ge=1, le=1_000_000_000)
    """Problems a source, in the order of the set; none takes all."""
    samples: int = Field(1, ge=1, le=10_000)
    """Programs a problem: n of pass@k."""
    k: list[Annotated[int, Field(ge=1, le=10_000)]] = Field([1], min_length=1)
    """k of the scores ``pass_at_<k>``, each at most ``samples``."""
    temperature: float = Field(0.0, ge=0, le=100)
    """Temperature of the programs; 0 takes the likeliest token, and so needs one sample."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Probability mass from which sampled programs are drawn."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of sampled programs."""
    max_new_tokens: int = Field(256, ge=1, le=2**20)
    """Longest program, its prompt not counted."""
    style: Literal["continue", "chat"] = "continue"
    """``continue``: the model goes on with the prompt, as after pretraining; ``chat``: it is asked for the code."""
    sandbox: SandboxChoice = "auto"
    """The wall: ``auto`` takes bubblewrap or, without it, Landlock; a weaker one is taken only where it is named."""
    cpu_s: int = Field(4, ge=1, le=3600)
    """Processor seconds a program."""
    memory_bytes: int = Field(512 << 20, ge=64 << 20, le=2**40)
    """Address space a program."""
    workers: int = operational(2, ge=1, le=2**12)
    """Programs at a time."""

    @model_validator(mode="after")
    def _draws_enough(self) -> CodeConfig:
        if max(self.k) > self.samples:
            raise ValueError(f"k must be at most samples {self.samples}; got {max(self.k)}; set samples to it or more")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"temperature must be above 0 for {self.samples} samples, which would be alike; set 0.8")
        return self

    def limits(self) -> Limits:
        """Of one program; its time on the clock leaves room for a machine with other work to do."""
        return Limits(cpu_s=self.cpu_s, wall_s=5.0 * self.cpu_s + 10, memory_bytes=self.memory_bytes)
