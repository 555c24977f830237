"""Byte-level BPE as plain lists: read from what is published, and written for the ``tokenizers`` library."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 and Qwen2.5 cut text into words: marks are cut off their letters."""
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen3.5 cuts text into words, and our own byte-level BPE: letters stay with their marks, digits stand alone."""
PATTERNS = {"qwen2": QWEN2_PATTERN, "qwen35": QWEN35_PATTERN}
"""Split patterns by the names that llama.cpp has for them; files of ranks do not say theirs."""

Merge = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ByteLevelBPE:
    """A vocabulary without specials.

    ``tokens`` are the bytes of each id; ``merges`` are (left, right, union) ids in the order in which they apply;
    ``pre_tokenizer`` is the section of that name of a ``tokenizer.json``.
    """

    tokens: tuple[bytes, ...]
    merges: tuple[Merge, ...]
    pre_tokenizer: dict[str, Any]


def split_by(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer that cuts by ``pattern`` and then writes bytes as characters, with no space before the text."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def read_ranks(path: Path, pattern: str) -> ByteLevelBPE:
    """A file of ``base64 rank`` lines, as tiktoken's vocabularies are published; ids are the ranks.

    Raises:
        DataError: if a line is no such pair, a rank is missing, or a token is not built from two of lower rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            spelled, rank = line.split()
            ranks[base64.b64decode(spelled, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{path.name} must hold 'base64 rank' a line; line {number} does not; fetch it again"
            ) from None
    tokens = tuple(sorted(ranks, key=ranks.__getitem__))
    if sorted(ranks.values()) != list(range(len(tokens))):
        raise DataError(f"{path.name} must skip no rank; got {len(tokens)} tokens; fetch it again")
    return ByteLevelBPE(tokens, tuple(_merge_of(token, ranks) for token in tokens if len(token) > 1), split_by(pattern))


def _merge_of(token: bytes, ranks: dict[bytes, int]) -> Merge:
    """The last merge by which BPE arrives at ``token`` from its bytes, using only tokens of lower rank."""
    own, parts = ranks[token], [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        pairs = itertools.pairwise(parts)
        rank, place = min((ranks.get(left + right, own), place) for place, (left, right) in enumerate(pairs))
        if rank >= own:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    if len(parts) > 2 or not all(ranks.get(part, own) < own for part in parts):
        raise DataError(f"ranks must build each token from two of lower rank; rank {own} is not; use a tokenizer.json")
    return ranks[parts[0]], ranks[parts[1]], own


def from_facts(facts: dict[str, Any], name: str) -> ByteLevelBPE:
    """The vocabulary of a parsed ``tokenizer.json``; its specials and added tokens are left out.

    Raises:
        DataError: if ``name`` is not byte-level BPE that applies its merges, or normalises other than to NFC.
    """
    model, steps = facts["model"], json.dumps(facts.get("pre_tokenizer"))
    normalizer = (facts.get("normalizer") or {}).get("type")
    if model.get("type", "BPE") != "BPE" or '"ByteLevel"' not in steps or model.get("ignore_merges"):
        raise DataError(f"{name} must be byte-level BPE that applies its merges to every word; it is not; name another")
    if normalizer not in (None, "NFC") and facts["normalizer"] != {"type": "Sequence", "normalizers": []}:
        raise DataError(f"{name} must not change text; got the normaliser {normalizer}; name another")
    added = {token["content"] for token in facts.get("added_tokens", ())}
    spelled = [token for token in sorted(model["vocab"], key=model["vocab"].__getitem__) if token not in added]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return from_spelled(spelled, merges, facts["pre_tokenizer"], name)


def from_spelled(
    spelled: Sequence[str], merges: Sequence[tuple[str, ...]], pre_tokenizer: dict[str, Any], name: str
) -> ByteLevelBPE:
    """A vocabulary whose tokens and merges are written in the byte alphabet, in id order.

    Raises:
        DataError: if a token is not written so, or a merge names no token.
    """
    ids, alphabet = {token: number for number, token in enumerate(spelled)}, byte_of_character()
    try:
        tokens = tuple(bytes(alphabet[character] for character in token) for token in spelled)
        triples = tuple((ids[left], ids[right], ids[left + right]) for left, right in merges)
    except KeyError as error:
        raise DataError(
            f"{name} must be written in the byte alphabet of GPT-2; got {error.args[0]!r}; name another"
        ) from None
    return ByteLevelBPE(tokens, triples, pre_tokenizer)


_GGUF_SPLITS: dict[str, dict[str, Any]] = {
    **{name: split_by(pattern) for name, pattern in PATTERNS.items()},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}
"""Pre-tokenizers by llama.cpp's names."""


def read_gguf(path: Path) -> ByteLevelBPE:
    """The byte-level vocabulary inside a GGUF file; control and user-defined tokens are left out.

    Raises:
        DataError: if it holds none, or one that cuts text in a way that is not known here.
    """
    import gguf

    fields = gguf.GGUFReader(str(path)).fields
    pre = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else None
    if pre not in _GGUF_SPLITS or "tokenizer.ggml.merges" not in fields:
        raise DataError(f"{path.name} must cut text as {', '.join(_GGUF_SPLITS)}; got {pre!r}; name another file")
    texts, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    spelled = [text for text, kind in zip(texts, types, strict=True) if kind == gguf.TokenType.NORMAL]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    return from_spelled(spelled, merges, _GGUF_SPLITS[pre], path.name)


_MODEL: dict[str, Any] = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
}  # fmt: skip
_FACTS: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
}  # fmt: skip
"""The sections of a ``tokenizer.json`` that every byte-level tokenizer of ours has."""


def to_backend(bpe: ByteLevelBPE, specials: Sequence[str] = ()) -> Any:
    """A ``tokenizers.Tokenizer`` with ``specials`` at the first ids and every token of ``bpe`` after them."""
    from tokenizers import AddedToken, Tokenizer

    spelled = [spell(token) for token in bpe.tokens]
    vocabulary = {name: number for number, name in enumerate([*specials, *spelled])}
    merges = [[spelled[left], spelled[right]] for left, right, _ in bpe.merges]
    facts = {**_FACTS, "pre_tokenizer": bpe.pre_tokenizer}
    facts["model"] = {**_MODEL, "vocab": vocabulary, "merges": merges}
    backend = Tokenizer.from_str(json.dumps(facts))
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    return backend


def spell(token: bytes) -> str:
    """Bytes in the alphabet in which byte-level BPE is written."""
    return "".join(map(_character_of_byte().__getitem__, token))


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The byte that each character of the GPT-2 alphabet stands for (Radford et al. 2019, byte-level BPE)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@functools.cache
def _character_of_byte() -> dict[int, str]:
    return {byte: character for character, byte in byte_of_character().items()}
