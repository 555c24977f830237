"""The evaluate stage: chosen suites on a finished model, every score with n, unit, interval and the hash of its set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from model.spec import ModelSpec
from stages.base import Fault, Input, Stage, StageConfig, StageContext, StageResult, operational
from stages.runtime.gates import GateConfig, gate_faults
from stages.runtime.suites.config import NEEDS, LocalTask, Suites, needed_inputs

MIN_PROMPT_TOKENS = 8
"""Room that the longest reply must leave: about what the template alone takes of a user's message."""


class EvaluateConfig(StageConfig):
    """Which model, on which sets, by which suites."""

    kind: Literal["evaluate"]
    """Measurement of a model."""
    from_: str = Field(alias="from")
    """Training stage (or artifact path) whose model is measured."""
    suites: Suites
    """The suites to run."""
    data: str | None = None
    """``tokenize`` stage whose held-out documents ``bpb`` and ``needles`` read."""
    messages: str | None = None
    """``messages`` stage whose held-out conversations ``format`` and ``decoding`` have answered."""
    tasks: str | None = None
    """``tasks`` stage whose held-out questions ``reasoning`` asks."""
    preferences: str | None = None
    """``preferences`` stage whose held-out prompts ``safety`` puts."""
    problems: str | None = None
    """``problems`` stage whose problems ``code`` has solved."""
    facts: str | None = None
    """``facts`` stage whose facts ``margins`` scores."""
    batch_size: int = Field(32, ge=1, le=2**16)
    """Rows a forward. Part of the key: another one can move a token's nats by rounding (below 1e-4 of it in fp32)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products; weights and recurrent states are fp32 in either."""
    gates: list[GateConfig] = operational([])
    """What the scores must keep to before the chain goes on from this model."""


class Evaluate(Stage):
    """Measures a model; the output is ``scores.json``, ``items.json`` (for paired intervals) and ``samples.json``."""

    kind: ClassVar[str] = "evaluate"
    Config: ClassVar[type[StageConfig]] = EvaluateConfig
    code_version: ClassVar[int] = 8
    produces: ClassVar[str] = "scores"
    shared: ClassVar[bool] = True
    inputs: ClassVar[dict[str, Input]] = {
        "from_": Input("model"),
        "data": Input("tokens", optional=True),
        "messages": Input("messages", optional=True),
        "tasks": Input("tasks", optional=True),
        "preferences": Input("preferences", optional=True),
        "problems": Input("problems", optional=True),
        "facts": Input("facts", optional=True),
    }

    @classmethod
    def check(cls, config: Any, model: ModelSpec | None) -> list[Fault]:
        """No suite at all, a suite without its set, a set that no suite reads (TRAPS T7), a file that is not there."""
        if not config.suites.chosen():
            return [Fault("suites", f"must name a suite; got none; set one of {', '.join(NEEDS)}, such as bpb: {{}}")]
        needed = needed_inputs(config.suites)
        # A model from elsewhere is known when its artifact is opened: check_parents.
        faults = [] if model is None or "/" in config.from_ else length_faults(config, model)
        faults += file_faults(config)
        faults += gate_faults(config.gates, list(config.suites.chosen()))
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
        """Windows beyond the model's length; held-out tokens of another tokenizer (TRAPS K10); gates on no score."""
        from data.shards import read_info
        from stages.runtime.warm_start import spec_of, tokenizer_faults

        if "from_" not in parents:
            return []
        output = parents["from_"] / "output"
        faults = length_faults(config, spec_of(output))
        if "facts" in parents:
            faults += facts_faults(parents["facts"] / "output")
        if "data" in parents:
            faults += tokenizer_faults(output, read_info(parents["data"] / "output").tokenizer_digest)
        return faults + made_gate_faults(config, parents)

    @classmethod
    def check_beside(cls, config: Any, parents: Mapping[str, Any]) -> list[Fault]:
        """More questions of a task than any task of the recipe holds out."""
        reasoning = config.suites.reasoning
        if reasoning is None or reasoning.questions is None or "tasks" not in parents:
            return []
        most = max(choice.heldout for choice in parents["tasks"].tasks)
        if reasoning.questions <= most:
            return []
        message = f"must be at most the {most} questions that {config.tasks} holds out of a task"
        return [
            Fault("suites.reasoning.questions", f"{message}; got {reasoning.questions}; set {most}, or none for all")
        ]

    @classmethod
    def check_devices(cls, config: Any, world_size: int | None, has_gpu: bool | None) -> list[Fault]:
        """No sandbox on this machine, where programs are to be executed (TRAPS O4)."""
        code = config.suites.code
        if code is None or has_gpu is None:
            return []
        from stages.runtime.sandbox import why_none

        reason = why_none(code.sandbox)
        return [] if reason is None else [Fault("suites.code.sandbox", reason)]

    @classmethod
    def source_revisions(cls, config: Any) -> dict[str, str]:
        """Content of the harness's local files."""
        tasks = config.suites.harness.files if config.suites.harness else ()
        return {f"harness/{task.name}": _revision(task) for task in tasks}

    @classmethod
    def score_names(cls, config: Any, parents: Mapping[str, Any], sources: Mapping[str, list[str]]) -> list[str]:
        """Every score that the suites will give on the sets that ``parents`` make."""
        from stages.runtime.suites.names import score_names
        from stages.runtime.suites.sets import planned_sets

        return score_names(config.suites, planned_sets(parents, sources))

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
    """Windows longer than the model was made for (what it says beyond is no measure of it), replies without room."""
    asked: list[tuple[str, int]] = []
    if config.suites.bpb is not None:
        asked.append(("suites.bpb.seq_len", config.suites.bpb.seq_len))
    if config.suites.needles is not None:
        asked += [(f"suites.needles.lengths[{n}]", length) for n, length in enumerate(config.suites.needles.lengths)]
    return [
        Fault(path, f"must be at most model.max_seq_len {spec.max_seq_len}; got {length}; set less")
        for path, length in asked
        if length > spec.max_seq_len
    ] + reply_faults(config.suites, spec.max_seq_len)


def reply_faults(suites: Suites, max_seq_len: int) -> list[Fault]:
    """Replies so long that no prompt fits before them."""
    asked = {
        f"suites.{name}.max_new_tokens": section.max_new_tokens
        for name, section in suites.chosen().items()
        if name != "harness" and hasattr(section, "max_new_tokens")
    }
    harness = suites.harness
    if harness is not None:
        # What is not generated has no length.
        if "tasks_local" in harness.local:
            asked["suites.harness.max_new_tokens"] = harness.max_new_tokens
        asked |= {
            f"suites.harness.files[{number}].max_new_tokens": task.max_new_tokens
            for number, task in enumerate(harness.files)
            if task.kind == "answer"
        }
    most = max_seq_len - MIN_PROMPT_TOKENS
    told = f"must leave {MIN_PROMPT_TOKENS} tokens of model.max_seq_len {max_seq_len} to a prompt"
    way = f"set {most} or less" if most > 0 else "set a longer model.max_seq_len"
    return [Fault(path, f"{told}; got {asked_for}; {way}") for path, asked_for in asked.items() if asked_for > most]


def facts_faults(output: Path) -> list[Fault]:
    """Facts of another format than the suites read."""
    from data.facts import facts_info

    try:
        facts_info(output)
    except (OSError, ValueError) as error:
        return [Fault("facts", str(error))]
    return []


def made_gate_faults(config: EvaluateConfig, parents: Mapping[str, Path]) -> list[Fault]:
    """Gates on scores that the suites will not give on the sets that are finished."""
    if not config.gates:
        return []
    from stages.runtime.suites.names import metric_faults, score_names
    from stages.runtime.suites.sets import made_sets

    safety = config.suites.safety
    outputs = {field: path / "output" for field, path in parents.items()}
    sets = made_sets(outputs, None if safety is None else safety.prompts)
    return metric_faults(config.gates, score_names(config.suites, sets))


def file_faults(config: EvaluateConfig) -> list[Fault]:
    """Tasks of the harness that it does not know, whose file holds no questions, or whose name another one has."""
    harness = config.suites.harness
    if harness is None:
        return []
    from stages.runtime.suites.published import name_faults
    from stages.runtime.suites.question_files import first_rows_faults

    names = [*harness.local, *(task.name for task in harness.files)]
    return [*name_faults(harness.tasks), *first_rows_faults(harness)] + [
        Fault(f"suites.harness.files[{number}].name", f"must be a task's own; got {task.name} twice; set another name")
        for number, task in enumerate(harness.files)
        if names.count(task.name) > 1
    ]


def _revision(task: LocalTask) -> str:
    if task.type == "package":
        return f"{task.package.name}=={task.package.version}:{task.package.sha256}"
    path = Path(task.path)
    # A file that is not there is told by ``check``.
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else "absent"
