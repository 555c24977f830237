"""Time to the first token and tokens a second of a preset with random weights in llama.cpp.

    python benchmarks/decode_latency.py --preset chimera_700m --precision q4_0 --prompt-tokens 128 512 --threads 2
    python benchmarks/decode_latency.py --beside native/bin/python

It times the wheel ``xllamacpp``, and beside it, on the same file and prompts, the llama.cpp that another interpreter
has as ``llama_cpp``; ``docs/export.md`` says how to build one for the machine's own processor.

The weights are drawn tensor by tensor, so that memory never holds the model twice. Each prompt is new, so nothing of it
is cached; the first token counts from the prompt's arrival. Run it on idle cores: llama.cpp's threads wait for each
other, and one that is disturbed holds up all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_cpp_python import peak_memory_bytes
from record import RESULTS, ROOT, table, write_result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", default="chimera_700m")
    parser.add_argument("--precision", choices=["f16", "q8_0", "q4_0"], default="q4_0")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timings of each, of which the median counts")
    parser.add_argument("--file", type=Path, help="GGUF file to write, or to measure where it is there already")
    parser.add_argument("--beside", metavar="PYTHON", help="an interpreter with llama-cpp-python, to be timed as well")
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

    from model.presets import preset

    path = arguments.file or scratch / "model.gguf"
    if not path.exists():
        started = time.perf_counter()
        write_random(path, preset(arguments.preset), arguments.precision, scratch)
        print(f"written in {time.perf_counter() - started:.1f} s, {path.stat().st_size / 1e6:.0f} MB", flush=True)
    rows, draw = [], np.random.default_rng(3)
    for count in arguments.prompt_tokens:
        # Ids of the small tokenizer: which ones changes no arithmetic. The first prompt is a warm-up.
        prompts = [draw.integers(4, 500, size).tolist() for size in (16, *[count] * arguments.repeats)]
        for time_it in (by_xllamacpp, by_llama_cpp_python)[: 1 + (arguments.beside is not None)]:
            rows.append(row(arguments, path, count, time_it(arguments, path, prompts)))
            print(rows[-1], flush=True)
    return rows


def by_xllamacpp(arguments: argparse.Namespace, path: Path, prompts: list[list[int]]) -> dict[str, Any]:
    import importlib.metadata

    import xllamacpp

    from model.export.gguf_chat import open_gguf

    with open_gguf(path, threads=arguments.threads, context_tokens=context_tokens(arguments, prompts)) as chat:
        timings = [run(chat, prompt, arguments.new_tokens) for prompt in prompts][1:]
    return {
        "runtime": "llama.cpp in xllamacpp's wheel",
        "versions": {
            "xllamacpp": importlib.metadata.version("xllamacpp"),
            "built for": xllamacpp.get_system_info().strip(" |"),
        },
        "peak_memory_bytes": peak_memory_bytes(),
        "timings": timings,
    }


def by_llama_cpp_python(arguments: argparse.Namespace, path: Path, prompts: list[list[int]]) -> dict[str, Any]:
    request = {
        "path": str(path.resolve()),
        "threads": arguments.threads,
        "context_tokens": context_tokens(arguments, prompts),
        "new_tokens": arguments.new_tokens,
        "prompts": prompts,
    }
    script = Path(__file__).with_name("llama_cpp_python.py")
    command = [arguments.beside, str(script)]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def context_tokens(arguments: argparse.Namespace, prompts: list[list[int]]) -> int:
    return max(map(len, prompts)) + arguments.new_tokens


def row(arguments: argparse.Namespace, path: Path, count: int, found: dict[str, Any]) -> dict[str, Any]:
    first = [round(timing["time_to_first_token_s"], 3) for timing in found["timings"]]
    speed = [round(timing["tokens_per_s"], 2) for timing in found["timings"]]
    return {
        "model": f"{arguments.preset}, random weights, {arguments.precision.upper()}",
        "runtime": found["runtime"],
        "versions": found["versions"],
        "prompt_tokens": count,
        "new_tokens": arguments.new_tokens,
        "threads": arguments.threads,
        "file_bytes": path.stat().st_size,
        "time_to_first_token_s": statistics.median(first),
        "time_to_first_token_s_all": first,
        "tokens_per_s": statistics.median(speed),
        "tokens_per_s_all": speed,
        "peak_memory_bytes": found["peak_memory_bytes"],
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
