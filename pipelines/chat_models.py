"""Who speaks in the chat: the checkpoint of a finished stage by our cached decoding, or a GGUF file by llama.cpp."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pipelines.terminal import harmless

Message = dict[str, str]
End = Literal["stop", "length", "context"]

SMALL_PARAMETERS = 50_000_000
"""Below this a second thread costs more than it gives: a step's matrix products are too short to share."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an answer is drawn; ``seed`` and the number of the turn decide it, so that models compare fairly."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one step added: ``text`` (empty inside a character), tokens so far, and at the last step why it ended.

    ``stop`` is the model's own end, ``length`` is ``max_new_tokens``, ``context`` is the model's ``max_seq_len``.
    """

    text: str
    tokens: int
    end: End | None = None


class ContextFull(Exception):  # noqa: N818 - a state of the conversation, not an error
    """The conversation leaves no room for an answer; ``tokens`` of ``limit`` are taken."""

    def __init__(self, tokens: int, limit: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(f"the conversation has {tokens} tokens and the model holds {limit}")


class Speaker(Protocol):
    """One model in the conversation."""

    label: str

    def about(self) -> str:
        """One line: what it is."""

    def answer(self, messages: Sequence[Message], settings: Settings) -> Iterator[Delta]:
        """The answer to ``messages``, step by step; raises ``ContextFull`` before the first."""

    def forget(self) -> None:
        """Drop what is kept between turns."""

    def close(self) -> None:
        """Give back what the model holds."""


class TextStream:
    """Bytes of tokens to text: a character appears when its last byte has come, and no control character passes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, part: bytes, final: bool = False) -> str:
        """The characters that ``part`` completes; with ``final`` an unfinished one becomes U+FFFD."""
        return harmless(self._decoder.decode(part, final))


class Checkpoint:
    """A Hugging Face directory of ours, decoded from a cache that lives on from turn to turn."""

    def __init__(self, label: str, directory: Path) -> None:
        from data.chat import REPLY_ENDS
        from data.tokenizer import check_specials, load, token_byte_strings

        self.label = label
        self._model = load_checkpoint(directory)
        self._tokenizer = load(directory)
        ids = check_specials(self._tokenizer)
        self._ends = {ids[end] for end in REPLY_ENDS}
        self._bytes = token_byte_strings(self._tokenizer)
        self._cache: Any = None
        self._held: list[int] = []

    def about(self) -> str:
        """Parameters, device and room."""
        count = sum(parameter.numel() for parameter in self._model.parameters())
        return f"{count:,} parameters on {self._model.device.type}, up to {self._limit} tokens"

    @property
    def _limit(self) -> int:
        return int(self._model.config.max_seq_len)

    def answer(self, messages: Sequence[Message], settings: Settings) -> Iterator[Delta]:
        """See ``Speaker.answer``."""
        from data.chat import render

        prompt = render(self._tokenizer, messages, add_generation_prompt=True).ids
        room = self._limit - len(prompt)
        if room < 1:
            raise ContextFull(len(prompt), self._limit)
        turn = sum(message["role"] == "user" for message in messages)
        limit = min(room, settings.max_new_tokens)
        out_of: End = "length" if settings.max_new_tokens <= room else "context"
        return self._deltas(self._tokens(prompt, settings, turn, limit), limit, out_of)

    def _tokens(self, prompt: list[int], settings: Settings, turn: int, limit: int) -> Iterator[int]:
        import torch

        from model.cache import HybridCache
        from model.decode import Sampling, stream

        generator = torch.Generator(self._model.device).manual_seed(settings.seed + turn)
        sampling = Sampling(settings.temperature, settings.top_p)
        cache = self._cache
        # What was drawn may spell the same text by other ids than the template's; a recurrent state cannot go back.
        if cache is None or cache.columns >= len(prompt) or prompt[: cache.columns] != self._held[: cache.columns]:
            cache = HybridCache()
        # An answer that is broken off inside the model leaves a torn cache behind: it is kept again only at the end.
        self._cache, held = None, list(prompt)
        for token in stream(
            self._model, prompt, max_new_tokens=limit, eos_token_ids=self._ends, sampling=sampling,
            generator=generator, cache=cache,
        ):  # fmt: skip
            held.append(token)
            yield token
        self._cache, self._held = cache, held

    def _deltas(self, tokens: Iterator[int], limit: int, out_of: End) -> Iterator[Delta]:
        text = TextStream()
        for count, token in enumerate(tokens, start=1):
            if token in self._ends:
                # The rest of the iterator keeps the cache for the next turn.
                continue_to_end(tokens)
                yield Delta(text.feed(b"", final=True), count, "stop")
                return
            part, last = text.feed(self._bytes[token], final=count == limit), count == limit
            if last:
                continue_to_end(tokens)
            yield Delta(part, count, out_of if last else None)

    def forget(self) -> None:
        """Drop the cache."""
        self._cache, self._held = None, []

    def close(self) -> None:
        """Nothing is open."""


def continue_to_end(iterator: Iterator[Any]) -> None:
    """Run an iterator that has nothing left to give, so that what it does last is done."""
    for _ in iterator:
        pass


def load_checkpoint(directory: Path) -> Any:
    """The model in ``directory``, in fp32 on the GPU if there is one, after its files were verified.

    Raises:
        CheckpointError: when a file is damaged or missing, or does not fit the model.
    """
    from stages.runtime.distributed import settle_threads
    from stages.runtime.manifest import CheckpointError, verify_manifest

    settle_threads()
    verify_manifest(directory)
    import torch
    from transformers.utils import logging

    from model.lm import HybridForCausalLM

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = HybridForCausalLM.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory} holds no model that can be loaded: {error}") from error
    model, info = loaded
    if lost := sorted(info["missing_keys"]):
        raise CheckpointError(f"{directory} lacks the weights {', '.join(lost)}; make this artifact anew")
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL_PARAMETERS:
        torch.set_num_threads(1)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


class Gguf:
    """A GGUF file through llama.cpp."""

    def __init__(self, path: Path) -> None:
        import os

        from model.export.gguf_chat import open_gguf

        self.label = path.stem
        self._threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._chat: Any = open_gguf(path, threads=self._threads)
        self._size, self._limit = path.stat().st_size, context_tokens(path)

    def about(self) -> str:
        """Size and runtime."""
        from pipelines.table import size

        return f"{size(self._size)} by llama.cpp on {self._threads} threads, up to {self._limit} tokens"

    def answer(self, messages: Sequence[Message], settings: Settings) -> Iterator[Delta]:
        """See ``Speaker.answer``; a piece may hold several tokens, the last delta has llama.cpp's own count."""
        with _one_line(self.label):
            prompt = self._chat.prompt(messages)
        room = self._limit - len(prompt)
        if room < 1:
            raise ContextFull(len(prompt), self._limit)
        turn = sum(message["role"] == "user" for message in messages)
        limit = min(room, settings.max_new_tokens)
        pieces = self._chat.complete(
            prompt, max_new_tokens=limit, temperature=settings.temperature, top_p=settings.top_p,
            seed=settings.seed + turn,
        )  # fmt: skip
        return self._deltas(pieces, "length" if settings.max_new_tokens <= room else "context")

    def _deltas(self, pieces: Any, out_of: End) -> Iterator[Delta]:
        # Ctrl-C leaves the iterator half way: closing it stops llama.cpp.
        with _one_line(self.label), contextlib.closing(pieces):
            for count, piece in enumerate(pieces, start=1):
                yield Delta(harmless(piece), count)
        timings = self._chat.timings
        yield Delta("", timings["tokens"], "stop" if timings["finished"] else out_of)

    def forget(self) -> None:
        """llama.cpp keeps its own cache."""

    def close(self) -> None:
        """End llama.cpp."""
        self._chat.close()


@contextlib.contextmanager
def _one_line(label: str) -> Iterator[None]:
    """What llama.cpp or the file's template refuses (a foreign one may know no system message), as a fault."""
    from stages.runtime.manifest import CheckpointError

    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{label} cannot take this conversation: {error}; try another file") from error


def context_tokens(path: Path) -> int:
    """How many tokens a GGUF file's model was made for, as its metadata says."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    architecture = fields["general.architecture"].contents()
    return int(fields[f"{architecture}.context_length"].contents())
