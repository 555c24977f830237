"""What a finished parent must satisfy before its model is exported. No torch here."""

from __future__ import annotations

from pathlib import Path

from data.shards import read_info
from model.export.vocabulary import vocabulary_faults
from model.spec import ModelSpec
from stages.base import Fault
from stages.runtime.warm_start import tokenizer_faults


def tokenizer_form_faults(output: Path, wanted: list[str]) -> list[Fault]:
    """What of the parent's tokenizer llama.cpp cannot reproduce, where a GGUF format is wanted."""
    gguf = [name for name in wanted if name != "granite"]
    if not gguf:
        return []
    return [Fault(f"formats.{gguf[0]}", fault) for fault in vocabulary_faults(output)]


def data_faults(output: Path, data: Path, spec: ModelSpec) -> list[Fault]:
    """Held-out text that was tokenised otherwise than for the model, or that its embedding has no rows for (K10)."""
    info = read_info(data)
    faults = tokenizer_faults(output, info.tokenizer_digest)
    try:
        info.check_model(spec.vocab_size)
    except ValueError as error:
        faults.append(Fault("data", str(error)))
    return faults
