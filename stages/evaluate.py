"""The evaluate stage: chosen suites on a finished model, every score with n, unit, interval and the hash of its set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from model.spec import ModelSpec
from stages.base import Fault, Input, Stage, StageConfig, StageContext, StageResult
from stages.runtime.suites.config import NEEDS, Suites, needed_inputs


class EvaluateConfig(StageConfig):
    """Which model, on which sets, by which suites."""

    kind: Literal["evaluate"]
    """Measurement of a model."""
    from_: str = Field(alias="from")
    """Training stage (or artifact path) whose model is measured."""
    suites: Suites
    """The suites to run."""
    data: str | None = None
    """``tokenize`` stage whose held-out documents ``bpb`` scores."""
    messages: str | None = None
    """``messages`` stage whose held-out conversations ``format`` has answered."""
    tasks: str | None = None
    """``tasks`` stage whose held-out questions ``reasoning`` asks."""
    preferences: str | None = None
    """``preferences`` stage whose held-out prompts ``safety`` puts."""
    facts: str | None = None
    """``facts`` stage whose facts ``margins`` scores."""
    batch_size: int = Field(32, ge=1)
    """Rows a forward. Part of the key: another one can move a token's nats by rounding (below 1e-4 of it in fp32)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products; weights and recurrent states are fp32 in either."""


class Evaluate(Stage):
    """Measures a model; the output is ``scores.json``, ``items.json`` (for paired intervals) and ``samples.json``."""

    kind: ClassVar[str] = "evaluate"
    Config: ClassVar[type[StageConfig]] = EvaluateConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "scores"
    inputs: ClassVar[dict[str, Input]] = {
        "from_": Input("model"),
        "data": Input("tokens", optional=True),
        "messages": Input("messages", optional=True),
        "tasks": Input("tasks", optional=True),
        "preferences": Input("preferences", optional=True),
        "facts": Input("facts", optional=True),
    }

    @classmethod
    def check(cls, config: Any, model: ModelSpec | None) -> list[Fault]:
        """No suite at all, a suite without its set, and a set that no suite reads (TRAPS T7)."""
        if not config.suites.chosen():
            return [Fault("suites", f"must name a suite; got none; set one of {', '.join(NEEDS)}, such as bpb: {{}}")]
        needed = needed_inputs(config.suites)
        # A model from elsewhere is known when its artifact is opened: check_parents.
        faults = [] if model is None or "/" in config.from_ else length_faults(config, model)
        faults += [
            Fault(field, f"must name a stage, since suite {suite} reads it; got none; set {field}")
            for field, suite in needed.items()
            if getattr(config, field) is None
        ]
        optional = [field for field, given in cls.inputs.items() if given.optional]
        for field in optional:
            if getattr(config, field) is not None and field not in needed:
                readers = ", ".join(suite for suite, fields in NEEDS.items() if field in fields)
                message = (
                    f"must be left out where no suite reads it; got {getattr(config, field)!r}; add suite {readers}"
                )
                faults.append(Fault(field, message))
        return faults

    @classmethod
    def check_parents(cls, config: Any, model: ModelSpec | None, parents: Mapping[str, Path]) -> list[Fault]:
        """Windows beyond the model's length; held-out tokens of another tokenizer than the model's (TRAPS K10)."""
        from data.shards import read_info
        from stages.runtime.warm_start import spec_of, tokenizer_faults

        if "from_" not in parents:
            return []
        output = parents["from_"] / "output"
        faults = length_faults(config, spec_of(output))
        if "data" in parents:
            faults += tokenizer_faults(output, read_info(parents["data"] / "output").tokenizer_digest)
        return faults

    @classmethod
    def plan(cls, config: Any, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """The suites."""
        return {"suites": ", ".join(config.suites.chosen())}

    def run(self, context: StageContext) -> StageResult:
        """Run the suites; those that an interrupted run finished are not run again.

        Raises:
            ConfigError: where a suite has nothing to measure.
        """
        from stages.runtime.suites.evaluation_run import evaluate_model

        return evaluate_model(context)


def length_faults(config: EvaluateConfig, spec: ModelSpec) -> list[Fault]:
    """Windows longer than the model was made for: what it says beyond is no measure of it."""
    if config.suites.bpb is None or config.suites.bpb.seq_len <= spec.max_seq_len:
        return []
    message = f"must be at most model.max_seq_len {spec.max_seq_len}; got {config.suites.bpb.seq_len}; set less"
    return [Fault("suites.bpb.seq_len", message)]
