"""What a recipe says of each suite. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import Section

NEEDS: dict[str, tuple[str, ...]] = {
    "bpb": ("data",),
    "margins": ("facts",),
    "reasoning": ("tasks",),
    "safety": ("preferences",),
    "format": ("messages",),
    "samples": (),
    "harness": (),
}
"""Inputs of the stage that a suite cannot do without, by the suite's name."""
DEFAULT_NEW_TOKENS = 256
"""Longest reply to a task of the harness that names none."""
LOCAL_NEEDS = {"facts_local": "facts", "tasks_local": "tasks"}
"""Inputs that the harness's own local tasks are made from."""

DEFAULT_PROMPTS = {
    "en-hello": ("en", "Hello! Who are you?"),
    "en-tell": ("en", "Tell me about the city of Berlin."),
    "en-sum": ("en", "What is 3 + 4?"),
    "de-hello": ("de", "Guten Morgen, wie geht es dir?"),
    "hi-hello": (
        "hi",
        "\u0928\u092e\u0938\u094d\u0924\u0947, \u0906\u092a \u0915\u0948\u0938\u0947 \u0939\u0948\u0902?",
    ),
}
"""Prompts of the suite ``samples`` where the recipe names none: id to language and text."""


class BpbConfig(Section):
    """Bits per byte on held-out documents, by language."""

    seq_len: int = Field(256, ge=16)
    """Tokens a window; a longer document is scored in windows that overlap by one token."""
    documents: int | None = Field(40, ge=2)
    """Held-out documents of each source, those with the lowest ids; none takes all."""
    document_tokens: int | None = Field(512, ge=16)
    """Only so many first tokens of a document are scored; none scores it whole."""


class MarginsConfig(Section):
    """Contrastive facts: how much likelier the right ending is than wrong ones."""

    facts: int | None = Field(None, ge=1)
    """Facts a domain and language, in the order of the set; none takes all."""


class ReasoningConfig(Section):
    """Exact answers to held-out questions, decoded greedily."""

    questions: int | None = Field(None, ge=1)
    """Questions a task, in the order of the held-out set; none takes all."""
    max_new_tokens: int = Field(32, ge=1)
    """Longest reply."""


class SafetyConfig(Section):
    """Refusals of harmful prompts, and of benign ones that look alike."""

    prompts: int | None = Field(None, ge=1)
    """Prompts a category and language, those with the lowest ids; none takes all."""
    max_new_tokens: int = Field(32, ge=1)
    """Longest reply; a refusal shows in its first words."""


class FormatConfig(Section):
    """Whether replies keep to the template and end by themselves."""

    conversations: int | None = Field(32, ge=1)
    """Held-out conversations a language, those with the lowest ids; none takes all."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest reply; one that has not ended by then has not stopped."""


class SamplesConfig(Section):
    """Replies to fixed prompts, to be read."""

    prompts: dict[str, str] | None = None
    """User messages by id; none takes a few of ours in English, German and Hindi."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest reply."""
    temperature: float = Field(0.8, gt=0)
    """Temperature of the sampled replies; the others are greedy."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Probability mass from which the sampled replies are drawn."""
    seed: int = Field(0, ge=0)
    """Seed of the sampled replies."""


class HarnessConfig(Section):
    """lm-evaluation-harness through its Python API."""

    local: list[Literal["facts_local", "tasks_local"]] = Field(["facts_local"])
    """Tasks made from this recipe's own sets: ``facts_local`` (multiple choice), ``tasks_local`` (generation)."""
    tasks: list[str] = Field([])
    """Tasks of the harness by name; they are fetched from the hub."""
    limit: int | None = Field(None, ge=1)
    """Only so many first questions a task; none takes all."""
    max_new_tokens: int = Field(32, ge=1)
    """Longest generated answer of ``tasks_local``."""


class Suites(Section):
    """The suites to run, in this order; a suite that is absent is not run."""

    bpb: BpbConfig | None = None
    """Bits per byte, by language; reads ``data``."""
    margins: MarginsConfig | None = None
    """Contrastive facts; reads ``facts``."""
    reasoning: ReasoningConfig | None = None
    """Exact answers; reads ``tasks``."""
    safety: SafetyConfig | None = None
    """Refusal and over-refusal; reads ``preferences``."""
    format: FormatConfig | None = None
    """Template and stop; reads ``messages``."""
    samples: SamplesConfig | None = None
    """Replies to fixed prompts; reads nothing."""
    harness: HarnessConfig | None = None
    """lm-evaluation-harness; reads ``facts`` or ``tasks`` for its local tasks."""

    def chosen(self) -> dict[str, Section]:
        """The suites that are to be run, by name."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: config for name, config in found.items() if config is not None}


def needed_inputs(suites: Suites) -> dict[str, str]:
    """Inputs that the chosen suites read, each with the first suite that does."""
    found: dict[str, str] = {}
    for name in suites.chosen():
        for field in NEEDS[name]:
            found.setdefault(field, name)
    for task in suites.harness.local if suites.harness else ():
        found.setdefault(LOCAL_NEEDS[task], "harness")
    return found
