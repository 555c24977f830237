"""Chat with a GGUF file: llama.cpp's own server in this process, by the wheel ``xllamacpp``.

The file's template, tokenizer and weights do all the work; nothing of the training side is imported. The server also
listens on a local port, which a random key closes to everybody else.
"""

from __future__ import annotations

import json
import queue
import re
import secrets
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from model.export.vocabulary import SPECIAL_TOKENS

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_SLOT = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
_MAGIC = b"GGUF"


def open_gguf(path: Path | str, *, threads: int = 2, context_tokens: int = 0) -> GgufChat:
    """Load ``path``; ``context_tokens`` 0 takes the length that the model was made for.

    Raises:
        ValueError: if the file is no GGUF that llama.cpp runs, or ``xllamacpp`` is not installed.
    """
    path = Path(path)
    if not path.is_file() or not _begins_as_gguf(path):
        raise ValueError(f"field path must be a GGUF file; got {path}; set one from an export stage")
    try:
        import xllamacpp
    except ImportError:
        raise ValueError("chat with a GGUF file needs xllamacpp; it is not installed; pip install xllamacpp") from None
    key = secrets.token_hex(16)
    try:
        server = xllamacpp.Server(_params(xllamacpp, path, threads, context_tokens, key))
    except RuntimeError as error:
        raise ValueError(
            f"field path must be a model that llama.cpp runs; got {path}: {error}; export again"
        ) from error
    return GgufChat(server, key)


class GgufChat:
    """A loaded model that answers conversations; use as a context manager or ``close`` it.

    ``timings`` tells of the last answer: ``prompt_tokens``, ``tokens``, ``time_to_first_token_s`` (the prompt's
    processing, cached parts left out), ``tokens_per_s`` and ``finished`` (an end token was drawn).
    """

    def __init__(self, server: Any, key: str) -> None:
        self._server = server
        self._key = key
        self.timings: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._server = None

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks; a literal special inside a message stays text.

        llama.cpp would read it as structure, so its template is filled with slots, and contents are tokenised as text.
        """
        slots = [
            {"role": message["role"], "content": f"{_OPEN}{number}{_CLOSE}"} for number, message in enumerate(messages)
        ]
        template = self._call("/apply-template", {"messages": slots})["prompt"]
        ids: list[int] = []
        for part in _SPECIAL.split(template):
            is_special = part in SPECIAL_TOKENS
            text = part if is_special else _SLOT.sub(lambda slot: messages[int(slot[1])]["content"], part)
            if text:
                ids += self.tokenize(text, parse_special=is_special)
        return ids

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        """llama.cpp's ids of ``text``; specials are text unless ``parse_special``."""
        return self._call("/tokenize", {"content": text, "add_special": False, "parse_special": parse_special})[
            "tokens"
        ]

    def stream(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The assistant's answer in pieces of whole characters; closing the iterator stops the model.

        Raises:
            ValueError: if the conversation does not fit the context.
        """
        return self.complete(
            self.prompt(messages), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )

    def complete(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_end: bool = False,
    ) -> Iterator[str]:
        """Pieces of what follows the ids ``prompt``, beyond end tokens where those are ignored; see ``stream``."""
        request = {
            "prompt": list(prompt),
            "n_predict": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            # Only what was asked for: by default llama.cpp also cuts by top-k and min-p.
            "samplers": ["temperature", "top_p"],
            "ignore_eos": ignore_end,
            "stream": True,
        }
        pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = threading.Event()
        worker = threading.Thread(target=self._generate, args=(request, pieces, stop), daemon=True)
        worker.start()
        try:
            while (chunk := pieces.get()) is not None:
                yield from self._text(chunk)
        finally:
            stop.set()
            worker.join()

    def _generate(self, request: dict[str, Any], pieces: queue.SimpleQueue[Any], stop: threading.Event) -> None:
        def receive(chunk: Any) -> bool:
            pieces.put(chunk)
            return stop.is_set()

        try:
            self._server.handle_completions(request, receive)
        except Exception as error:
            pieces.put({"error": {"message": str(error)}})
        pieces.put(None)

    def _text(self, chunk: Any) -> Iterator[str]:
        if "error" in chunk:
            raise ValueError(
                f"field messages must be what the model can take; llama.cpp says: {chunk['error']['message']}"
            )
        choice = chunk["choices"][0]
        if "timings" in chunk:
            timings = chunk["timings"]
            self.timings = {
                "prompt_tokens": timings["prompt_n"] + timings["cache_n"],
                "tokens": timings["predicted_n"],
                "time_to_first_token_s": timings["prompt_ms"] / 1000,
                "tokens_per_s": timings["predicted_per_second"],
                "finished": choice["finish_reason"] == "stop",
            }
        if choice["text"]:
            yield choice["text"]

    def _call(self, path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        # A proxy that the environment names has no business with this process talking to itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            return json.loads(response.read())


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _params(xllamacpp: Any, path: Path, threads: int, context_tokens: int, key: str) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context_tokens
    params.n_gpu_layers = 0
    params.warmup = False
    params.fit_params = False
    params.ui = False
    params.verbosity = -1
    params.cache_ram_mib = 0
    params.api_keys = [key]
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = threads
    return params
