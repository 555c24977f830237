"""All logits of llama.cpp for given ids: its C interface, as the wheel ``xllamacpp`` exports it, by ctypes.

The wheel's Python side gives text and the likeliest tokens only, so logits are read through the C functions in the
same library. Parameters pass as opaque blobs that llama.cpp itself fills; nothing of their layout is relied on but
seven numbers of a context's (their defaults are checked before use) and ``llama_batch``, unchanged since 2023.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

_CONTEXT_DEFAULTS = {"<4I": (0, (512, 2048, 512, 1)), "<i": (52, (-1,)), "<2I": (104, (1, 1))}
"""Where a context's n_ctx, n_batch, n_ubatch and n_seq_max, its choice of flash attention, and the types of cached keys
and values stand, and what llama.cpp puts there."""
_FLASH_ATTENTION_AT, _CACHE_TYPES_AT = 52, 104
_OFF, _F32_TYPES = 0, (0, 0)
_BLOB_BYTES = 1024
_ERROR_LEVEL = 4
_Pointer = ctypes.c_void_p


class _Blob(ctypes.Structure):
    """Larger than any parameter struct; the callee reads and writes the part that it knows."""

    _fields_ = (("content", ctypes.c_uint8 * _BLOB_BYTES),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", _Pointer),
        ("embd", _Pointer),
        ("pos", _Pointer),
        ("n_seq_id", _Pointer),
        ("seq_id", _Pointer),
        ("logits", _Pointer),
    )


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (_Blob, []),
    "llama_context_default_params": (_Blob, []),
    "llama_model_load_from_file": (_Pointer, [ctypes.c_char_p, _Blob]),
    "llama_model_free": (None, [_Pointer]),
    "llama_model_get_vocab": (_Pointer, [_Pointer]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [_Pointer]),
    "llama_vocab_is_eog": (ctypes.c_bool, [_Pointer, ctypes.c_int32]),
    "llama_init_from_model": (_Pointer, [_Pointer, _Blob]),
    "llama_free": (None, [_Pointer]),
    "llama_set_n_threads": (None, [_Pointer, ctypes.c_int32, ctypes.c_int32]),
    "llama_get_memory": (_Pointer, [_Pointer]),
    "llama_memory_clear": (None, [_Pointer, ctypes.c_bool]),
    "llama_decode": (ctypes.c_int32, [_Pointer, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_Pointer]),
    "llama_tokenize": (
        ctypes.c_int32,
        [_Pointer, ctypes.c_char_p, ctypes.c_int32, _Pointer, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool],
    ),
}


@functools.cache
def _library() -> Any:
    """llama.cpp inside ``xllamacpp``, its functions declared and its log kept to errors.

    Raises:
        ValueError: if the package is absent, or its llama.cpp has another interface than the one described here.
    """
    try:
        from xllamacpp import xllamacpp as extension
    except ImportError:
        raise ValueError("GGUF parity needs xllamacpp; it is not installed; pip install xllamacpp") from None
    library = ctypes.CDLL(extension.__file__)
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise ValueError(f"{_way_out()}; this one lacks {error}") from None
    content = library.llama_context_default_params().content
    for form, (place, wanted) in _CONTEXT_DEFAULTS.items():
        found = struct.unpack_from(form, content, place)
        if found != wanted:
            raise ValueError(f"{_way_out()}; a context's parameters hold {found} at {place}, not {wanted}")
    library.llama_log_set(_print_errors, None)
    return library


def _way_out() -> str:
    import importlib.metadata

    version = importlib.metadata.version("xllamacpp")
    return f"GGUF parity must know llama.cpp's C interface; got xllamacpp {version}; install that of constraints.txt"


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _Pointer)
def _print_errors(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR_LEVEL:
        print(f"llama.cpp: {text.decode(errors='replace').rstrip()}", flush=True)


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU; use as a context manager or ``close`` it."""

    def __init__(self, path: Path | str, *, context_tokens: int, threads: int, exact: bool = False) -> None:
        """Load ``path`` for sequences of up to ``context_tokens``.

        As it comes, llama.cpp attends in half precision; ``exact`` has it keep keys, values and sums in fp32.

        Raises:
            ValueError: if llama.cpp cannot load it.
        """
        self._library = _library()
        self._model = self._context = None
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"{path} must be a model that llama.cpp loads; it does not; export it again")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        params = self._library.llama_context_default_params()
        # One batch holds a whole sequence, so that its logits lie in one array.
        struct.pack_into("<3I", params.content, 0, context_tokens, context_tokens, min(context_tokens, 512))
        if exact:
            struct.pack_into("<i", params.content, _FLASH_ATTENTION_AT, _OFF)
            struct.pack_into("<2I", params.content, _CACHE_TYPES_AT, *_F32_TYPES)
        self._context = self._library.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise ValueError(f"{path} must run in llama.cpp with {context_tokens} tokens; it does not; ask for fewer")
        self._library.llama_set_n_threads(self._context, threads, threads)
        self.context_tokens = context_tokens
        self.vocab_size: int = self._library.llama_vocab_n_tokens(self._vocabulary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free model and context; safe to call twice."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._model = self._context = None

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """(T, V) float32, the logits after each of the T ``ids`` of one sequence that starts afresh.

        Raises:
            ValueError: for no ids, or more than the context holds.
        """
        count = len(ids)
        if not 0 < count <= self.context_tokens:
            raise ValueError(f"field ids must be 1 to {self.context_tokens} tokens; got {count}; cut the text")
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        tokens, wanted = (ctypes.c_int32 * count)(*ids), (ctypes.c_int8 * count)(*[1] * count)
        batch = _Batch(n_tokens=count, token=ctypes.addressof(tokens), logits=ctypes.addressof(wanted))
        code = self._library.llama_decode(self._context, batch)
        if code != 0:
            raise ValueError(f"llama.cpp must decode {count} tokens; it returned {code}; ask for fewer")
        found = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (count, self.vocab_size)).copy()

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of ``text`` without any token before or after it; specials are text unless ``parse_special``."""
        content = text.encode()
        room = len(content) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(
            self._vocabulary, content, len(content), ctypes.addressof(tokens), room, False, parse_special
        )
        assert count >= 0, f"{len(content)} bytes gave more than {room} tokens"
        return tokens[:count]

    def ends_generation(self, token: int) -> bool:
        """Whether llama.cpp stops at ``token``."""
        return bool(self._library.llama_vocab_is_eog(self._vocabulary, token))
