"""What a recipe says of cleaning beyond its sources: form, content, decontamination, and where the work runs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data.source_config import NAME, Section

EditedRules = Literal["web", "prose", "messages"]
PersonalKind = Literal["email", "phone", "ip", "iban", "card"]
EVALUATION_SETS = ("tasks", "facts", "preferences", "messages", "problems")
"""What text can be kept clean of: inputs of a stage by what they produce."""
PERSONAL: tuple[PersonalKind, ...] = ("email", "phone", "ip", "iban", "card")
EDITED: tuple[EditedRules, ...] = ("web", "prose", "messages")


class FormConfig(Section):
    """Edits of a document's form, by kind of source; ``code`` and ``none`` are never edited (TRAPS T12)."""

    mojibake: list[EditedRules] = Field(list(EDITED))
    """Sources, by their rules, whose text is repaired where UTF-8 was once read in another encoding."""
    boilerplate: list[EditedRules] = Field(["web"])
    """Sources, by their rules, that lose lines of consent banners, menus and copyright footers."""
    repeated_lines: int = Field(0, ge=0, le=1_000_000)
    """In the sources of ``boilerplate``, a line that stands in more documents of its source than this is removed
    too; 0 keeps all, and saves a pass."""
    personal: list[EditedRules] = Field(list(EDITED))
    """Sources, by their rules, in which personal data give way to a placeholder such as ``[EMAIL]``."""
    personal_kinds: list[PersonalKind] = Field(list(PERSONAL))
    """What counts as personal; bank accounts and cards only with a right checksum, addresses only public ones."""


class QualityConfig(Section):
    """A classifier of content that is trained from one's own labels; what it scores below its threshold is dropped."""

    labels: str = Field(json_schema_extra={"operational": True})
    """JSONL file of ``{"text": ..., "label": ...}``; its content enters the key, not where it lies."""
    good: list[str] = Field(["good", "1", "true"], min_length=1)
    """Labels, as text in lower case, of documents to keep; every other label is of one to drop."""
    sources: list[str] = Field(min_length=1)
    """Names of the sources that it judges."""
    aim: Literal["precision", "share"] = "precision"
    """What the threshold is set for: ``precision``, that the share ``target`` of what is kept is good; ``share``, that
    the share ``target`` of the documents is kept; either on labels put aside for it."""
    target: float = Field(0.9, gt=0, lt=1)
    """The share that is aimed at."""
    sample_characters: int = Field(4000, ge=100, le=10_000_000)
    """Only so much of a document's beginning is read."""
    hash_bits: int = Field(18, ge=10, le=24)
    """Words and pairs of words are hashed into 2 to the power of this many features."""
    epochs: int = Field(12, ge=1, le=200)
    """Passes over the labels."""
    l2: float = Field(1e-6, ge=0, le=1e6)
    """Weight of the quadratic penalty."""


class EvaluationFile(Section):
    """One benchmark of one's own, to be kept out of the corpus."""

    name: str = Field(pattern=NAME)
    """Name in the report: dropped documents are counted under ``contaminated_<name>``."""
    path: str = Field(json_schema_extra={"operational": True})
    """JSONL file, possibly compressed; only its content enters the key."""
    fields: list[str] = Field(min_length=1)
    """Dotted fields of a row that hold text; lists and mappings are searched for texts."""


class DecontaminateConfig(Section):
    """Removal of documents that hold a run of words of an evaluation set (Brown et al. 2020, appendix C)."""

    ngram: int = Field(13, ge=5, le=50)
    """Consecutive words that a document must share with an item; case and signs do not count."""
    min_words: int = Field(8, ge=3, le=1000)
    """An item of fewer than ``ngram`` words, but at least these, must be there as a whole; shorter ones, which any
    text may hold by chance, are not looked for: the report counts them."""
    files: list[EvaluationFile] = Field([])
    """Benchmarks that are no stage of the recipe."""
    unchecked: list[str] = Field([], json_schema_extra={"operational": True})
    """Stages whose sets the corpus need not be cleaned of, though a stage of the recipe measures with them: the plan
    says nothing of these."""

    @model_validator(mode="after")
    def _shorter(self) -> DecontaminateConfig:
        if self.min_words > self.ngram:
            raise ValueError(f"must have min_words at most ngram {self.ngram}; got {self.min_words}; set it lower")
        names = [file.name for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError(f"must name each file differently; got {', '.join(names)}; rename one")
        if taken := [name for name in names if name in EVALUATION_SETS]:
            raise ValueError(f"must not name a file like a set of a stage; got {taken[0]}; rename it")
        return self


class LocalExecutor(Section):
    """Processes of this machine."""

    kind: Literal["local"] = "local"
    """On this machine."""


class SlurmExecutor(Section):
    """Array jobs of a SLURM cluster; the runs folder and the program must be on a file system that the nodes share."""

    kind: Literal["slurm"]
    """Through ``sbatch``, waiting for each step."""
    partition: str = Field(min_length=1)
    """Partition of the jobs."""
    time_hours: int = Field(24, ge=1, le=100_000)
    """Limit of a job's time."""
    mem_per_cpu_gb: int = Field(4, ge=1, le=100_000)
    """Memory of a task, in GB; tasks are single processes."""
    tasks_per_job: int = Field(1, ge=1, le=1_000_000)
    """Shards that one job of an array works on in turn."""
    max_array_size: int = Field(1001, ge=1, le=10_000_000)
    """Longest array that the cluster takes."""
    qos: str = ""
    """Quality of service; empty leaves it to the cluster."""
    setup: str = ""
    """Shell command before each job (``module load python``); the program's own environment is set in any case."""
    options: dict[str, str] = Field({})
    """Further ``#SBATCH`` lines by name (``account``)."""


class RayExecutor(Section):
    """Tasks of a Ray cluster; needs the package ``ray``, and a file system that the nodes share."""

    kind: Literal["ray"]
    """Through Ray."""
    memory_gb: float = Field(4, gt=0, le=100_000)
    """Memory of a task, in GB."""
    tasks_per_job: int = Field(1, ge=1, le=1_000_000)
    """Shards that one Ray task works on at the same time."""


Executor = Annotated[LocalExecutor | SlurmExecutor | RayExecutor, Field(discriminator="kind")]


def revision(path: str) -> str:
    """A digest of a file's content."""
    with Path(path).open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"
