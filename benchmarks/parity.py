"""Parity table of one checkpoint: ours, transformers' GraniteMoeHybrid, and llama.cpp in fp32, F16, Q8_0 and Q4_0.

    python benchmarks/parity.py --model runs/default/dpo-*/output --data runs/default/tokenize-*/output

Every row is compared with our model in fp32 on the same held-out tokens; a speed is the median of several. llama.cpp's
exact row attends in fp32; the others run as anybody would run them, with attention in half precision.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, table, write_result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="output folder of a training stage")
    parser.add_argument("--data", type=Path, required=True, help="output folder of a tokenize stage")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens to compare on")
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timings of each, of which the median counts")
    parser.add_argument("--result", type=Path, default=RESULTS / "parity.json")
    arguments = parser.parse_args(argv)
    settings = {name: value for name, value in vars(arguments).items() if isinstance(value, int)}
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(arguments, Path(scratch))
    print(table(rows))
    write_result(arguments.result, rows, settings)
    return 0


def measure(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    import torch

    import model as model_room
    from model.export.gguf_chat import open_gguf
    from model.export.llama_cpp import LlamaCpp
    from stages.runtime import export_formats
    from stages.runtime.exporting import gguf_speed, load_model, quiet, threads, torch_logits, torch_speed
    from stages.runtime.parity import StoredLogits, parity_windows
    from stages.runtime.warm_start import spec_of

    model_room.register()
    spec = spec_of(arguments.model)
    windows = parity_windows(arguments.data, arguments.tokens, arguments.window_tokens)
    reference = StoredLogits(scratch / "reference", windows, spec.vocab_size)
    prompt = [token for window in windows for token in window][: arguments.prompt_tokens]
    length = len(prompt) + arguments.new_tokens
    rows: list[dict[str, Any]] = []

    def add(name: str, size: int, logits: Iterable[Any], speeds: list[Any]) -> None:
        rows.append(row(name, size, windows, reference, logits, speeds))

    def timed(speed: Callable[[Any, list[int], int], Any], runner: Any) -> list[Any]:
        """Each time another beginning, so that no cache holds the prompt."""
        prompts = [prompt[shift:] + prompt[:shift] for shift in range(arguments.repeats + 1)]
        return [speed(runner, one, arguments.new_tokens) for one in prompts][1:]

    with quiet(), torch.no_grad():
        export_formats.write_huggingface(arguments.model, scratch / "huggingface")
        ours = load_model(scratch / "huggingface")
        export_formats.write_granite(arguments.model, scratch / "granite", spec, ours)
        for name, directory in (("ours, fp32", "huggingface"), ("GraniteMoeHybrid, fp32", "granite")):
            model = load_model(scratch / directory)
            with threads(1):
                logits = list(torch_logits(model, windows))
            if directory == "huggingface":
                reference.fill(logits)
            with threads(arguments.threads):
                speeds = timed(torch_speed, model)
            add(name, (scratch / directory / "model.safetensors").stat().st_size, logits, speeds)
        for precision in ("f32", "f16", "q8_0", "q4_0"):
            path = scratch / "gguf" / f"{precision}.gguf"
            export_formats.write_gguf_file(arguments.model, path, spec, precision, "benchmark")
            with open_gguf(path, threads=arguments.threads, context_tokens=length) as chat:
                speeds = timed(gguf_speed, chat)
            for exact in (True, False) if precision == "f32" else (False,):
                with LlamaCpp(path, context_tokens=arguments.window_tokens, threads=1, exact=exact) as other:
                    name = f"llama.cpp, {precision.upper()}{', exact attention' if exact else ''}"
                    add(name, path.stat().st_size, map(other.logits, windows), [] if exact else speeds)
    return rows


def row(
    name: str, size: int, windows: list[list[int]], reference: Any, logits: Iterable[Any], speeds: list[Any]
) -> dict[str, Any]:
    from stages.runtime.parity import Parity

    parity = Parity()
    for number, (ids, other) in enumerate(zip(windows, logits, strict=True)):
        parity.add(ids, reference.window(number), other)
    found = {
        "runtime": name,
        **parity.figures(),
        "file_bytes": size,
    }
    for field, digits in (("time_to_first_token_s", 4), ("tokens_per_s", 2)):
        each = [round(getattr(speed, field), digits) for speed in speeds]
        found |= {field: statistics.median(each) if each else None, f"{field}_all": each}
    print(found, flush=True)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
