"""One export from start to end: write the formats, run each of them, and compare it with the model.

Everything runs on the processor in fp32: that is where the exported files are used, and where rounding is smallest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as library_logging

import model as model_room
from data import tokenizer as tokenizers
from model.export.gguf import Precision
from model.export.gguf_chat import open_gguf
from model.export.llama_cpp import LlamaCpp
from stages.base import StageContext, StageResult
from stages.runtime import export_formats
from stages.runtime.export_tokens import TokenParity, compare_ids
from stages.runtime.manifest import sealed_digest
from stages.runtime.parents import unchanged
from stages.runtime.parity import Parity, ParityError, StoredLogits, parity_windows
from stages.runtime.suites.scores import content_hash
from stages.runtime.warm_start import spec_of

PARITY_FILE = "parity.json"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds until the first new token of a prompt, and tokens a second after it."""

    time_to_first_token_s: float
    tokens_per_s: float


class Exporting:
    """The run of one ``export`` stage."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.config = context.config
        self.source = context.parent_output("from_")
        self.data = context.parent_output("data")
        self.output = context.output
        self.spec = spec_of(self.source)
        self.windows = parity_windows(self.data, self.config.parity_tokens, self.config.window_tokens)
        self.rows: list[dict[str, Any]] = []

    def run(self) -> StageResult:
        """Write, measure, judge.

        Raises:
            CheckpointError: where the parent's output gave way to a longer run's meanwhile.
            ParityError: naming every format that is beyond its bound.
        """
        model_room.register()
        digest = self.context.parent_digest("from_") or sealed_digest(self.source)
        # The parent is read anew for each format.
        with unchanged(self.source, digest), quiet(), threads(1), torch.no_grad():
            path = self.context.work / "reference.f32"
            self.reference = StoredLogits(path, self.windows, self.spec.vocab_size)
            try:
                self._huggingface()
                if self.config.formats.granite:
                    self._granite()
                tokens = self._gguf()
            finally:
                path.unlink()
        return self._result(tokens)

    def _huggingface(self) -> None:
        """The directory; and the model that everything else is compared with, loaded from it in fp32."""
        directory = self.output / "huggingface"
        export_formats.write_huggingface(self.source, directory)
        model = load_model(directory)
        self.reference.fill(torch_logits(model, self.windows))
        self._row("huggingface", _transformers(), directory, self._torch_speed(model), None)
        if self.config.formats.granite:
            export_formats.write_granite(
                self.source, self.output / "granite", self.spec, load_model(directory, dtype="auto")
            )

    def _granite(self) -> None:
        directory = self.output / "granite"
        model = load_model(directory)
        parity = self._compare(torch_logits(model, self.windows))
        self._row("granite", f"{_transformers()} GraniteMoeHybrid", directory, self._torch_speed(model), parity)

    def _gguf(self) -> TokenParity | None:
        tokens = None
        for precision in self.config.formats.wanted():
            if precision == "granite":
                continue
            path = self.output / "gguf" / f"model-{precision.upper()}.gguf"
            export_formats.write_gguf_file(
                self.source, path, self.spec, cast(Precision, precision), f"{self.context.pipeline}-{self.config.from_}"
            )
            with LlamaCpp(path, context_tokens=self.config.window_tokens, threads=1) as other:
                if tokens is None:
                    tokens = compare_ids(other, tokenizers.load(self.source), self.data)
                parity = self._compare(map(other.logits, self.windows))
            self._row(precision, llama_cpp_name(), path, self._gguf_speed(path), parity)
        return tokens

    def _compare(self, logits: Iterator[np.ndarray]) -> Parity:
        parity = Parity()
        for number, (ids, other) in enumerate(zip(self.windows, logits, strict=True)):
            parity.add(ids, self.reference.window(number), other)
        return parity

    def _torch_speed(self, model: Any) -> Speed:
        prompt = self._prompt()
        with threads(self.config.threads):
            torch_speed(model, prompt, 2)
            return torch_speed(model, prompt, self.config.timing_new_tokens)

    def _gguf_speed(self, path: Path) -> Speed:
        length = self.config.timing_prompt_tokens + self.config.timing_new_tokens
        with open_gguf(path, threads=self.config.threads, context_tokens=length) as chat:
            return gguf_speed(chat, self._prompt(), self.config.timing_new_tokens)

    def _prompt(self) -> list[int]:
        ids = [token for window in self.windows for token in window]
        count = self.config.timing_prompt_tokens
        return (ids * (count // len(ids) + 1))[:count]

    def _row(self, name: str, runtime: str, path: Path, speed: Speed, parity: Parity | None) -> None:
        """Keep what was measured of one format, and log it."""
        bound = None if parity is None else self.config.bounds.of(name)
        figures = {} if parity is None else parity.figures()
        row = {
            "format": name,
            "runtime": runtime,
            "threads": self.config.threads,
            "file_bytes": _size_bytes(path),
            **figures,
            **{field: round(value, 4) for field, value in dataclasses.asdict(speed).items()},
            "bound": None if bound is None else {"mean_kl": bound},
            # A comparison with a NaN is false, so it fails here.
            "passed": bound is None or figures["mean_kl_nats"] <= bound,
        }
        if name == "q4_0" and row["passed"] and figures["mean_kl_nats"] > self.config.bounds.q4_0_warning:
            row["warning"] = f"mean KL is above {self.config.bounds.q4_0_warning:g} nats a token"
            self.context.tracker.alert(f"{name}: {row['warning']}: {figures['mean_kl_nats']:.3g}")
        self.rows.append(row)
        print(f"{name}: written and measured", flush=True)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "passed"}
        self.context.tracker.log("parity", len(self.rows), {"format": name, **numbers})

    def _result(self, tokens: TokenParity | None) -> StageResult:
        faults = [
            f"{row['format']} has a mean KL of {row['mean_kl_nats']:.3g} nats, bound {row['bound']['mean_kl']:g}"
            for row in self.rows
            if not row["passed"]
        ]
        faults += [] if tokens is None else tokens.faults()
        report = {
            "format": 1,
            "reference": "huggingface, fp32, PyTorch on the processor",
            "text": {
                "tokens": sum(map(len, self.windows)),
                "windows": len(self.windows),
                "set_hash": content_hash(self.windows),
            },
            "rows": self.rows,
            "tokenizer": None if tokens is None else dataclasses.asdict(tokens),
            "not_run": {name: "not chosen in formats" for name in self._left_out()},
        }
        (self.output / PARITY_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if faults:
            raise ParityError(f"the export is not the model: {'; '.join(faults)}; look for the fault, or set bounds")
        metrics = {
            f"{row['format']}/{name}": row[name]
            for row in self.rows
            for name in ("mean_kl_nats", "perplexity_ratio", "top1_agreement", "file_bytes", "tokens_per_s")
            if name in row
        }
        return StageResult(metrics, [_line(row) for row in self.rows] + ([] if tokens is None else [tokens.line()]))

    def _left_out(self) -> list[str]:
        return [name for name, on in self.config.formats.model_dump().items() if not on]


def torch_logits(model: Any, windows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Logits (T, V) of a causal model for each window, in fp32."""
    for ids in windows:
        yield model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def torch_speed(model: Any, prompt: list[int], n_tokens: int) -> Speed:
    """Greedy decoding by a transformers model with its own cache."""
    started = time.perf_counter()
    outputs = model(input_ids=torch.tensor([prompt]), use_cache=True)
    token = outputs.logits[:, -1:].argmax(-1)
    first = time.perf_counter()
    for _ in range(n_tokens - 1):
        outputs = model(input_ids=token, past_key_values=outputs.past_key_values, use_cache=True)
        token = outputs.logits[:, -1:].argmax(-1)
    return Speed(first - started, (n_tokens - 1) / (time.perf_counter() - first))


def gguf_speed(chat: Any, prompt: list[int], n_tokens: int) -> Speed:
    """Greedy decoding by llama.cpp, as it counts itself; the prompt is not in its cache."""
    for _ in chat.complete(prompt, max_new_tokens=n_tokens, ignore_end=True):
        pass
    return Speed(chat.timings["time_to_first_token_s"], chat.timings["tokens_per_s"])


def llama_cpp_name() -> str:
    """llama.cpp and the package that brings it."""
    return f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"


def _transformers() -> str:
    return f"transformers {importlib.metadata.version('transformers')}"


def load_model(directory: Path, dtype: Any = torch.float32) -> Any:
    """A causal model by the Auto classes, from the disk alone."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's threads inside, put back afterwards; one is enough for logits, and never waits for another program."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars of progress, and no advice on kernels that this processor has no use for."""
    verbosity, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        if bars:
            library_logging.enable_progress_bar()


def _size_bytes(path: Path) -> int:
    """A GGUF file, or the weights in a folder."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _line(row: dict[str, Any]) -> str:
    speed = f"first token {row['time_to_first_token_s']:.2f} s, {row['tokens_per_s']:.1f} tokens/s"
    if "mean_kl_nats" not in row:
        return f"{row['format']:<12} {row['file_bytes'] / 1e6:>8.1f} MB  reference  {speed}"
    parity = (
        f"KL {row['mean_kl_nats']:.2e} (bound {row['bound']['mean_kl']:g}), max logit difference "
        f"{row['max_logit_difference']:.2e}, perplexity ratio {row['perplexity_ratio']:.5f}, "
        f"top-1 {row['top1_agreement']:.4f}, n {row['tokens']}"
    )
    return f"{row['format']:<12} {row['file_bytes'] / 1e6:>8.1f} MB  {parity}  {speed}"
