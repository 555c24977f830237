"""How many tokens a model of some size wants, by published laws, and what repeated tokens are worth. No torch here.

The laws were fitted on Transformers and web text in English; for a hybrid and other text they are a yardstick, no
promise. A parametric law says that the loss is ``E + A / N**alpha + B / D**beta`` for N parameters (embeddings counted)
and D tokens, none seen twice; with 6 N D floating-point operations to spend, it is least where
``alpha A / N**alpha = beta B / D**beta``, which gives D for N.
"""

from __future__ import annotations

import dataclasses
import math

REPETITION_SCALE = 15.387756
"""R*_D of Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv:2305.16264, appendix A."""
NEARLY_FREE_EPOCHS = 4
"""Passes up to which Muennighoff et al. 2023 found repeated text nearly as good as new."""


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A fixed number of tokens a parameter."""

    name: str
    source: str
    tokens_per_parameter: float

    def tokens(self, parameters: float) -> float:
        """Compute-optimal tokens for a model of so many parameters."""
        return self.tokens_per_parameter * parameters


@dataclasses.dataclass(frozen=True)
class Parametric:
    """A fitted loss; ``E`` does not move the optimum and is left out."""

    name: str
    source: str
    A: float
    B: float
    alpha: float
    beta: float

    def tokens(self, parameters: float) -> float:
        """Compute-optimal tokens for a model of so many parameters."""
        logarithm = math.log(self.beta * self.B / (self.alpha * self.A)) + self.alpha * math.log(parameters)
        return math.exp(logarithm / self.beta)


_HOFFMANN = "Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, arXiv:2203.15556"
LAWS: tuple[Ratio | Parametric, ...] = (
    Ratio("20 a parameter", f"{_HOFFMANN}: Chinchilla's own ratio, approaches 1 and 2", 20.0),
    # The exponents of the paper's source text: those printed are rounded, which moves the optimum by half.
    Parametric("Hoffmann 2022, fit", f"{_HOFFMANN}: approach 3", A=406.4, B=410.7, alpha=0.3392, beta=0.2849),
    Parametric(
        "Besiroglu 2024",
        "Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt, arXiv:2404.10102: approach 3 fitted again",
        A=482.01, B=2085.43, alpha=0.3478, beta=0.3658,
    ),
)  # fmt: skip


def wanted_tokens(parameters: int) -> dict[str, int]:
    """Compute-optimal tokens by law."""
    return {law.name: round(law.tokens(parameters)) for law in LAWS}


def effective_tokens(unique: float, trained: float) -> float:
    """Fresh tokens that ``trained`` tokens are worth where only ``unique`` different ones are there.

    ``D' = U + U R* (1 - exp(-R / R*))`` with ``R = trained / U - 1`` repetitions (Muennighoff et al. 2023, eq. 5); up
    to one pass, every token counts whole.
    """
    if trained <= unique:
        return trained
    repetitions = trained / unique - 1
    return unique + unique * REPETITION_SCALE * (1 - math.exp(-repetitions / REPETITION_SCALE))
