"""Time to the first token and tokens a second of a preset with random weights in llama.cpp (``xllamacpp``'s build).

    python benchmarks/decode_latency.py --preset chimera_700m --precision q4_0 --prompt-tokens 128 512 --threads 2

The weights are drawn tensor by tensor, so that memory never holds the model twice. Each prompt is new, so nothing of it
is cached; the first token counts from the prompt's arrival. Run it on idle cores: llama.cpp's threads wait for each
other, and one that is disturbed holds up all. ``xllamacpp``'s wheel for Linux is built for AVX2 alone; a llama.cpp
built on the machine itself is faster (``pip install llama-cpp-python --no-binary llama-cpp-python``, about ten minutes
on two cores); that one is not measured here.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, table, write_result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", default="chimera_700m")
    parser.add_argument("--precision", choices=["f16", "q8_0", "q4_0"], default="q4_0")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--file", type=Path, help="GGUF file to write, or to measure where it is there already")
    parser.add_argument("--result", type=Path, default=RESULTS / "decode_latency.json")
    arguments = parser.parse_args(argv)
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path | None)}
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(arguments, Path(scratch))
    print(table(rows))
    write_result(arguments.result, rows, settings)
    return 0


def measure(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    import numpy as np

    from model.export.gguf_chat import open_gguf
    from model.presets import preset

    spec = preset(arguments.preset)
    path = arguments.file or scratch / "model.gguf"
    if not path.exists():
        started = time.perf_counter()
        write_random(path, spec, arguments.precision, scratch)
        print(f"written in {time.perf_counter() - started:.1f} s, {path.stat().st_size / 1e6:.0f} MB", flush=True)
    longest = max(arguments.prompt_tokens) + arguments.new_tokens
    rows, draw = [], np.random.default_rng(3)
    with open_gguf(path, threads=arguments.threads, context_tokens=longest) as chat:
        run(chat, draw.integers(4, 500, 16).tolist(), 4)
        for count in arguments.prompt_tokens:
            # Ids of the small tokenizer: which ones changes no arithmetic.
            prompts = [draw.integers(4, 500, count).tolist() for _ in range(arguments.repeats)]
            rows.append(row(arguments, path, count, [run(chat, prompt, arguments.new_tokens) for prompt in prompts]))
            print(rows[-1], flush=True)
    return rows


def row(arguments: argparse.Namespace, path: Path, count: int, timings: list[dict[str, float]]) -> dict[str, Any]:
    first = [round(timing["time_to_first_token_s"], 3) for timing in timings]
    speed = [round(timing["tokens_per_s"], 2) for timing in timings]
    return {
        "model": f"{arguments.preset}, random weights, {arguments.precision.upper()}",
        "runtime": "llama.cpp in xllamacpp's wheel",
        "prompt_tokens": count,
        "new_tokens": arguments.new_tokens,
        "threads": arguments.threads,
        "file_bytes": path.stat().st_size,
        "time_to_first_token_s": statistics.median(first),
        "time_to_first_token_s_all": first,
        "tokens_per_s": statistics.median(speed),
        "tokens_per_s_all": speed,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def run(chat: Any, prompt: list[int], n_tokens: int) -> dict[str, float]:
    for _ in chat.complete(prompt, max_new_tokens=n_tokens, ignore_end=True):
        pass
    return chat.timings


def write_random(path: Path, spec: Any, precision: Any, scratch: Path) -> None:
    from data.tokenizer_train import train_byte_level
    from model.export.gguf import write_gguf
    from model.export.vocabulary import read_vocabulary

    directory = scratch / "tokenizer"
    directory.mkdir()
    train_byte_level([(ROOT / "README.md").read_text(encoding="utf-8")], 512, directory)
    write_gguf(path, spec, random_weights(spec), read_vocabulary(directory), precision, name="random")


def random_weights(spec: Any) -> Callable[[str], Any]:
    """A function from a parameter's name to values of the size that initialisation gives, drawn when asked for."""
    import numpy as np
    import torch

    from model.config import HybridConfig
    from model.lm import HybridForCausalLM

    with torch.device("meta"):
        model = HybridForCausalLM(HybridConfig.from_spec(spec, eos_token_id=0, pad_token_id=1))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    draw = np.random.default_rng(7)
    vectors = {"A_log": (0.0, 2.7), "dt_bias": (-6.9, -2.3), "D": (1.0, 1.0)}

    def read(name: str) -> Any:
        shape = shapes[name]
        if "norm" in name:
            return np.ones(shape, np.float32)
        low_high = vectors.get(name.rpartition(".")[2])
        if low_high is not None:
            return draw.uniform(*low_high, shape).astype(np.float32)
        return draw.standard_normal(shape, np.float32) * np.float32(0.02)

    return read


if __name__ == "__main__":
    raise SystemExit(main())
