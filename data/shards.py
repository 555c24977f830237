"""Token shards: one memory-mapped stream of token ids a source, with a document index and a digest.

Layout of a tokens artifact: ``tokens.json`` (facts), ``<split>/<source>.bin`` (little-endian uint16 or uint32 ids, each
document ending with EOS), ``<split>/<source>.idx.npy`` (int64 document offsets in tokens, one more than documents),
``<split>/<source>.ids.txt`` (document ids, one a line), ``unigram.npy``, ``tokenizer/``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

TRAIN, HELDOUT = "train", "heldout"
_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokensInfo:
    """The facts of ``tokens.json`` that readers need; ``sources`` keeps the file's dictionaries."""

    directory: Path
    vocab_size: int
    dtype: np.dtype[Any]
    eos_id: int
    pad_id: int
    tokenizer_digest: str
    special_token_counts: dict[str, int]
    sources: list[dict[str, Any]]
    heldout_hash: str

    def source(self, name: str) -> dict[str, Any]:
        """The facts of one source.

        Raises:
            ValueError: if the artifact holds no such source.
        """
        for source in self.sources:
            if source["name"] == name:
                return source
        raise ValueError(f"source must be one of {[source['name'] for source in self.sources]}; got {name!r}")

    def check_model(self, vocab_size: int) -> None:
        """Refuse a model whose embedding lacks rows for these tokens (TRAPS K10).

        Raises:
            ValueError: if the vocabulary, EOS or pad id does not fit ``vocab_size`` rows.
        """
        if vocab_size < self.vocab_size:
            raise ValueError(
                f"model.vocab_size must be at least the tokenizer's {self.vocab_size}; got {vocab_size}; "
                f"set model.vocab_size={self.vocab_size} or train a smaller tokenizer"
            )
        for name, token in (("eos_id", self.eos_id), ("pad_id", self.pad_id)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"tokens.json {name} must be in 0..{self.vocab_size - 1}; got {token}; tokenize again")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One opened stream: ``tokens`` (n,) memory-mapped, ``offsets`` (documents + 1,) int64 in tokens."""

    name: str
    language: str
    tokens: np.ndarray
    offsets: np.ndarray

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, its closing EOS included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest dtype of a shard whose ids are below ``vocab_size``: little-endian uint16, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def read_info(tokens_dir: Path | str) -> TokensInfo:
    """Read ``tokens.json``.

    Raises:
        ValueError: if the folder is not a tokens artifact or its facts are incomplete.
    """
    path = Path(tokens_dir) / "tokens.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return TokensInfo(
            directory=path.parent,
            dtype=np.dtype(facts["dtype"]).newbyteorder("<"),
            **{
                field.name: facts[field.name]
                for field in dataclasses.fields(TokensInfo)
                if field.name not in ("directory", "dtype")
            },
        )
    except FileNotFoundError:
        raise ValueError(f"{path.parent} must be a tokens artifact; tokens.json is missing; run tokenize") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must hold a tokens artifact's facts; got {error!r}; run tokenize again") from None


def open_shard(info: TokensInfo, split: str, name: str) -> Shard:
    """Memory-map one source's stream after checking its size against ``tokens.json`` (a truncated file is refused).

    Raises:
        ValueError: if the source is unknown, or a file is missing or of another size than recorded.
    """
    source = info.source(name)
    facts, (stream, index, _) = source[split], shard_paths(info.directory, split, name)
    for path, expected in ((stream, facts["tokens"] * info.dtype.itemsize), (index, facts["index_bytes"])):
        found = path.stat().st_size if path.exists() else None
        if found != expected:
            raise ValueError(f"{path} must be {expected} bytes; found {found}; restore it or run tokenize again")
    offsets = np.load(index)
    empty = facts["tokens"] == 0
    tokens = np.empty(0, info.dtype) if empty else np.memmap(stream, dtype=info.dtype, mode="r")
    if len(offsets) != facts["documents"] + 1 or offsets[0] != 0 or offsets[-1] != len(tokens):
        raise ValueError(f"{index} must index {facts['documents']} documents of {stream.name}; run tokenize again")
    return Shard(name, source["language"], tokens, offsets)


def shard_paths(directory: Path, split: str, name: str) -> tuple[Path, Path, Path]:
    """Stream, document index and document ids of one source."""
    folder = Path(directory) / split
    return folder / f"{name}.bin", folder / f"{name}.idx.npy", folder / f"{name}.ids.txt"


def read_ids(directory: Path, split: str, name: str) -> list[str]:
    """Document ids of one source in the stream's order."""
    return shard_paths(directory, split, name)[2].read_text(encoding="utf-8").splitlines()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes one source's stream, index and ids; use as a context manager, then ask ``facts``."""

    def __init__(self, directory: Path, split: str, name: str, dtype: np.dtype[Any]) -> None:
        self.paths = shard_paths(directory, split, name)
        self.dtype = dtype
        self._offsets = [0]
        self._bytes = 0
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        self._stream = self.paths[0].open("wb", buffering=_BLOCK_BYTES)
        self._ids = self.paths[2].open("w", encoding="utf-8", newline="\n")
        return self

    def append(self, document_id: str, token_ids: Iterable[int] | np.ndarray, text_bytes: int) -> None:
        """Add one document: ids that end with EOS; ``text_bytes`` is the UTF-8 length of the text they stand for."""
        values = np.asarray(token_ids, dtype=self.dtype)
        self._stream.write(values.tobytes())
        self._ids.write(document_id + "\n")
        self._offsets.append(self._offsets[-1] + len(values))
        self._bytes += text_bytes

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._ids.close()
        np.save(self.paths[1], np.asarray(self._offsets, dtype="<i8"))

    def facts(self) -> dict[str, Any]:
        """``documents``, ``tokens``, UTF-8 ``bytes``, ``index_bytes`` and the stream's ``sha256``."""
        return {
            "documents": len(self._offsets) - 1,
            "tokens": self._offsets[-1],
            "bytes": self._bytes,
            "index_bytes": self.paths[1].stat().st_size,
            "sha256": file_digest(self.paths[0]),
        }


def heldout_digest(directory: Path, sources: Iterable[tuple[str, str]]) -> str:
    """Content hash of the held-out set: every source's name, language, document ids, index and token bytes (TRAPS M2).

    Args:
        directory: the tokens artifact.
        sources: (name, language) pairs; their order does not matter.
    """
    digest = hashlib.sha256()
    for name, language in sorted(sources):
        digest.update(f"{name}\0{language}\0".encode())
        for path in shard_paths(directory, HELDOUT, name):
            digest.update(bytes.fromhex(file_digest(path)))
    return digest.hexdigest()
