"""Write a model for other programs (Hugging Face, native GraniteMoeHybrid, GGUF) and measure what each loses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from model.spec import ModelSpec
from stages.base import Fault, Input, Section, Stage, StageConfig, StageContext, StageResult, operational

GGUF_FORMATS: tuple[Literal["f16", "q8_0", "q4_0"], ...] = ("f16", "q8_0", "q4_0")
_BYTES_PER_WEIGHT = {"huggingface": 4.0, "granite": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Weights as trained are fp32; a block of 32 has a scale of two bytes."""


class Formats(Section):
    """What is written beside the Hugging Face directory, which every model has."""

    granite: bool = True
    """Native GraniteMoeHybrid directory that transformers loads without any code of ours."""
    f16: bool = True
    """GGUF with matrices in half precision."""
    q8_0: bool = True
    """GGUF with matrices in 8-bit blocks of 32."""
    q4_0: bool = True
    """GGUF with matrices in 4-bit blocks of 32, the embedding in 8-bit ones."""

    def wanted(self) -> list[str]:
        """Names of the formats that are on."""
        return [name for name, on in self.model_dump().items() if on]


class Bounds(Section):
    """Largest mean KL divergence, nats a token, of a format from the model in fp32; beyond it the stage fails."""

    granite: float = Field(1e-6, gt=0, le=100)
    """GraniteMoeHybrid in fp32: the same arithmetic, so rounding alone."""
    f16: float = Field(1e-4, gt=0, le=100)
    """GGUF F16 in llama.cpp."""
    q8_0: float = Field(5e-3, gt=0, le=100)
    """GGUF Q8_0 in llama.cpp."""
    q4_0: float = Field(0.5, gt=0, le=100)
    """GGUF Q4_0 in llama.cpp."""
    q4_0_warning: float = Field(0.1, gt=0, le=100)
    """Mean KL of Q4_0 above which the artifact carries a warning."""

    def of(self, name: str) -> float:
        """The bound of one format."""
        return {"granite": self.granite, "f16": self.f16, "q8_0": self.q8_0, "q4_0": self.q4_0}[name]


class ExportConfig(StageConfig):
    """Which model is exported how, and on what text its exports are compared."""

    kind: Literal["export"]
    """Export with parity measurement."""
    from_: str = Field(alias="from")
    """Training stage (or artifact path) whose model is exported."""
    data: str = "tokenize"
    """Stage (or artifact path) whose held-out text the formats are compared on."""
    formats: Formats = Formats()
    """What is written."""
    bounds: Bounds = Bounds()
    """How far a format may be from the model."""
    parity_tokens: int = Field(2048, ge=64, le=1_000_000)
    """Held-out tokens that the formats are compared on, spread over the sources."""
    window_tokens: int = Field(256, ge=16, le=2**24)
    """Longest piece of a document that is scored at once."""
    timing_prompt_tokens: int = operational(128, ge=1, le=2**20)
    """Prompt of the speed measurement, in tokens."""
    timing_new_tokens: int = operational(32, ge=2, le=2**20)
    """Tokens that the speed measurement generates."""
    threads: int = operational(2, ge=1, le=2**10)
    """Processor threads of the speed measurement; logits are computed on one."""


class Export(Stage):
    """From a trained model to files that other programs run, each with its measured distance from the model."""

    kind: ClassVar[str] = "export"
    Config: ClassVar[type[StageConfig]] = ExportConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "export"
    inputs: ClassVar[dict[str, Input]] = {"from_": Input("model"), "data": Input("tokens")}

    @classmethod
    def check(cls, config: ExportConfig, model: ModelSpec | None) -> list[Fault]:
        """Formats that the recipe's model has no form in, and windows beyond its length."""
        if model is None or "/" in config.from_:
            # A model from elsewhere is known when its artifact is opened: check_parents.
            return []
        return format_faults(config, model)

    @classmethod
    def check_parents(cls, config: ExportConfig, model: ModelSpec | None, parents: Mapping[str, Path]) -> list[Fault]:
        """Formats that the parent's model or tokenizer has no form in; text of another tokenizer than the model's."""
        from stages.runtime.export_checks import data_faults, tokenizer_form_faults
        from stages.runtime.warm_start import spec_of

        if "from_" not in parents:
            return []
        output = parents["from_"] / "output"
        spec = spec_of(output)
        faults = format_faults(config, spec) + tokenizer_form_faults(output, config.formats.wanted())
        return faults + (data_faults(output, parents["data"] / "output", spec) if "data" in parents else [])

    @classmethod
    def plan(cls, config: ExportConfig, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Formats, the text of the comparison, and bytes on disk."""
        formats = ["huggingface", *config.formats.wanted()]
        plan: dict[str, Any] = {"formats": formats, "parity_tokens": config.parity_tokens}
        if model is not None and "/" not in config.from_:
            from model.cost import count_parameters

            total = count_parameters(model).total
            plan["disk_bytes"] = round(sum(_BYTES_PER_WEIGHT[name] for name in formats) * total)
        return plan

    def run(self, context: StageContext) -> StageResult:
        """Write every format, compare each with the model on held-out text, and write ``parity.json``.

        Raises:
            ParityError: when a format is beyond its bound, or llama.cpp tokenises otherwise.
        """
        from stages.runtime.exporting import Exporting

        return Exporting(context).run()


def format_faults(config: ExportConfig, spec: ModelSpec) -> list[Fault]:
    """What of ``spec`` the wanted formats have no form for, and measurements beyond its length."""
    from model.export.gguf import gguf_faults
    from model.export.granite import granite_faults

    wanted = config.formats.wanted()
    shared = granite_faults(spec)
    faults = []
    if wanted and shared:
        way_out = f"set {', '.join(f'formats.{name}=false' for name in wanted)}; the Hugging Face directory is written"
        message = f"{', '.join(wanted)} must have a form for every mixer; {{}}; or {way_out}"
        faults += [Fault("formats", message.format(fault)) for fault in shared]
    for precision in GGUF_FORMATS:
        if precision in wanted and not shared:
            way_out = f"or set formats.{precision}=false"
            faults += [Fault(f"formats.{precision}", f"{fault}, {way_out}") for fault in gguf_faults(spec, precision)]
    if config.window_tokens > spec.max_seq_len:
        message = f"must be at most model.max_seq_len {spec.max_seq_len}; got {config.window_tokens}; set less"
        faults.append(Fault("window_tokens", message))
    if config.timing_prompt_tokens + config.timing_new_tokens > spec.max_seq_len:
        total = config.timing_prompt_tokens + config.timing_new_tokens
        message = f"must fit model.max_seq_len {spec.max_seq_len} with timing_new_tokens; got {total} in all; set less"
        faults.append(Fault("timing_prompt_tokens", message))
    return faults
