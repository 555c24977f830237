"""Times llama-cpp-python for ``decode_latency.py`` in whatever interpreter has it; needs nothing else of ours.

Standard input: JSON with ``path``, ``threads``, ``context_tokens``, ``new_tokens`` and ``prompts``, lists of ids of
which the first is a warm-up. Standard output: JSON with ``runtime``, ``versions``, ``peak_memory_bytes`` and
``timings``, one a prompt after the first: ``time_to_first_token_s`` from the prompt's arrival and ``tokens_per_s`` of
the tokens after it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> int:
    import llama_cpp

    request = json.load(sys.stdin)
    llama = llama_cpp.Llama(
        request["path"],
        n_ctx=request["context_tokens"],
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        # The server inside xllamacpp turns it on by itself.
        flash_attn=True,
        verbose=False,
    )
    timings = [timed(llama, prompt, request["new_tokens"]) for prompt in request["prompts"]][1:]
    found = {
        "runtime": "llama.cpp built here by llama-cpp-python",
        "versions": {
            "llama-cpp-python": llama_cpp.__version__,
            "built for": llama_cpp.llama_print_system_info().decode().strip(" |"),
        },
        "peak_memory_bytes": peak_memory_bytes(),
        "timings": timings,
    }
    print(json.dumps(found))
    return 0


def timed(llama: Any, prompt: Sequence[int], n_tokens: int) -> dict[str, float]:
    """Seconds to the first token of ``prompt``, and the rate of the ``n_tokens - 1`` after it; end tokens go on."""
    started = time.perf_counter()
    tokens = llama.generate(prompt, temp=0.0)
    next(tokens)
    first = time.perf_counter()
    for _ in range(n_tokens - 1):
        next(tokens)
    ended = time.perf_counter()
    tokens.close()
    return {"time_to_first_token_s": first - started, "tokens_per_s": (n_tokens - 1) / (ended - first)}


def peak_memory_bytes() -> int:
    """Of this program alone: ``getrusage`` would count what its parent held as well."""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    raise SystemExit(main())
