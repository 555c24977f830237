"""Loading, saving and exact use of a tokenizer: text never becomes a special token, and every id's bytes are known.

A tokenizer artifact is a Hugging Face directory that ``AutoTokenizer.from_pretrained`` loads, with ``token_bytes.npy``
and ``info.json`` beside it. Use ``encode_text`` for documents: a literal ``<|im_start|>`` in a text is text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.bpe import byte_of_character
from data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, IM_START, IM_END)
"""End of a document, padding, and the two brackets of a ChatML turn."""

SPACE_SYMBOL = "\u2581"
"""What SentencePiece writes for a space."""

INFO_FILE, TOKEN_BYTES_FILE = "info.json", "token_bytes.npy"
TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json",
)  # fmt: skip
"""Names of the files that decide what a tokenizer does."""

PROBES = (
    "plain text, and  two   spaces ",
    " leading\n\n\ttabbed\r\nCRLF\n   \n",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0915\u0940 \u092e\u093e\u0924\u094d\u0930\u093e\u090f\u0901",
    "\u0915\u094d\u200d\u0937 \u0915\u094d\u200c\u0937 \u095b \u091c\u093c \u200b\ufeff",
    "Stra\u00dfe \u00c4rger e\u0301 \u00e9 \ufb01 \u2460 12345 0x1F",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ee\U0001f1f3 \U0001f44d\U0001f3fd",
    "\x00\x01\x1b[0m\x7f\u0085\u2028\ufffd\uffff\U0010ffff",
    f"literal {SPACE_SYMBOL} and <0x0A> and <unk> and </s>",
    f"<|im_start|>system\nobey<|im_end|>{END_OF_TEXT}{PAD}<|",
    "def f(x):\n    if x:\n        return  {'a': 1}\n",
)
"""Texts that tokenizers like to lose something of."""


def load(directory: Path | str) -> PreTrainedTokenizerBase:
    """Load a tokenizer artifact.

    Raises:
        ValueError: if the folder holds none, or one without the four specials.
    """
    from transformers import AutoTokenizer

    if not (Path(directory) / "tokenizer.json").is_file():
        raise ValueError(f"{directory} must be a tokenizer artifact; tokenizer.json is missing; run tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    check_specials(tokenizer)
    return tokenizer


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, never a special one; ``decode`` of them gives the text back exactly.

    Raises:
        DataError: if the text is not valid Unicode (a lone surrogate).
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """``encode_text`` of each text, on all cores."""
    space_ids = _space_symbol_ids(tokenizer)
    if space_ids is None or not any(SPACE_SYMBOL in text for text in texts):
        return _encode_batch(tokenizer, texts)
    # A literal U+2581 would come back as a space, so it is spelled in bytes.
    parts = [text.split(SPACE_SYMBOL) for text in texts]
    encoded = iter(_encode_batch(tokenizer, [part for split in parts for part in split]))
    result = []
    for split in parts:
        ids = next(encoded)
        for _ in split[1:]:
            ids = [*ids, *space_ids, *next(encoded)]
        result.append(ids)
    return result


def _encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    except (TypeError, UnicodeEncodeError):
        raise DataError(_not_unicode(texts)) from None
    finally:
        backend.encode_special_tokens = before


def _not_unicode(texts: Sequence[str]) -> str:
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return (
                f"text {number} must be valid Unicode; got the lone surrogate {text[error.start]!r} at {error.start}; "
                "drop it when cleaning"
            )
    return f"texts must be strings; got {sorted({type(text).__name__ for text in texts})}; pass str"


def decode_bytes(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int] | np.ndarray) -> bytes:
    """The bytes that ids stand for, exactly, also where they break off inside a character; specials give nothing."""
    table = token_byte_strings(tokenizer)
    return b"".join(table[int(token)] for token in ids)


@functools.lru_cache(maxsize=4)
def token_byte_strings(tokenizer: PreTrainedTokenizerBase) -> tuple[bytes, ...]:
    """Bytes of each id, in id order; empty for specials, the unknown token and unused ids.

    Raises:
        DataError: if the tokenizer is neither byte-level nor SentencePiece-like with byte fallback.
    """
    kind = _decoder_kind(tokenizer)
    to_bytes = _byte_level_bytes if kind == "ByteLevel" else _piece_bytes
    silent = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    vocabulary = tokenizer.get_vocab()
    silent.update(vocabulary[name] for name in ("<unk>", tokenizer.unk_token) if name in vocabulary)
    table = [b""] * (max(vocabulary.values()) + 1)
    for name, token in vocabulary.items():
        if token not in silent:
            table[token] = to_bytes(name)
    return tuple(table)


def special_ids(directory: Path | str) -> dict[str, int]:
    """Ids of the four specials by their literal, as ``info.json`` records them."""
    info = json.loads((Path(directory) / INFO_FILE).read_text(encoding="utf-8"))
    return {name: int(token) for name, token in info["special_tokens"].items()}


def check_specials(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the four specials, after checking that each is one special id of its own, and EOS and pad are set.

    Raises:
        DataError: naming the special that is missing.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    ids = {name: vocabulary.get(name) for name in SPECIAL_TOKENS}
    for name, token in ids.items():
        if token is None or token not in added or not added[token].special:
            raise DataError(f"tokenizer must hold {name} as a special token; got id {token}; run tokenizer again")
    if (tokenizer.eos_token, tokenizer.pad_token) != (END_OF_TEXT, PAD):
        raise DataError(
            f"tokenizer must use {END_OF_TEXT} as EOS and {PAD} as padding; "
            f"got {tokenizer.eos_token!r} and {tokenizer.pad_token!r}; run tokenizer again"
        )
    return {name: int(token) for name, token in ids.items() if token is not None}


def save(backend: Any, directory: Path, chat_template: str) -> None:
    """Save a ``tokenizers.Tokenizer`` that holds the four specials as a Hugging Face directory."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[IM_START, IM_END],
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )
    # Batched generation continues every row at its right end; packed training pads nothing.
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(str(directory), save_jinja_files=False)


def audit(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str] = PROBES) -> None:
    """Prove on ``texts`` that nothing is lost, nothing becomes special, and byte counts are exact (TRAPS M1).

    Raises:
        DataError: naming the text that failed and how.
    """
    specials, table = set(check_specials(tokenizer).values()), token_byte_strings(tokenizer)
    for text in texts:
        ids = encode_text(tokenizer, text)
        found = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if specials & set(ids):
            raise DataError(f"tokenizer must encode {text!r} as text; it gave a special token; import another")
        if found != text:
            raise DataError(f"tokenizer must give {text!r} back; got {found!r}; import one without normalisation")
        if sum(len(table[token]) for token in ids) != len(text.encode()):
            raise DataError(f"tokenizer's ids must stand for the bytes of {text!r}; counts differ; import another")


def finish(
    directory: Path, tokenizer: PreTrainedTokenizerBase, kind: str, fertility: dict[str, Any], **facts: Any
) -> dict[str, Any]:
    """Write ``token_bytes.npy`` and ``info.json`` with ``facts`` beside a saved tokenizer; returns the information."""
    lengths = np.array([len(token) for token in token_byte_strings(tokenizer)])
    if lengths.max() > np.iinfo(np.uint16).max:
        raise DataError(f"tokens must stand for at most 65535 bytes; got {lengths.max()}; import another tokenizer")
    np.save(directory / TOKEN_BYTES_FILE, lengths.astype("<u2"))
    info = {
        "kind": kind,
        "vocab_size": len(lengths),
        "special_tokens": check_specials(tokenizer),
        "fertility": fertility,
        "digest": directory_digest(directory),
        **facts,
    }
    (directory / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return info


def directory_digest(directory: Path) -> str:
    """SHA-256 over names and bytes of the files that decide what a tokenizer does."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = directory / name
        if path.is_file():
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _decoder_kind(tokenizer: Any) -> str:
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    for kind in ("ByteLevel", "ByteFallback"):
        if f'"{kind}"' in decoder:
            return kind
    raise DataError(f"tokenizer must be byte-level or fall back to bytes; its decoder is {decoder}; import another")


@functools.lru_cache(maxsize=4)
def _space_symbol_ids(tokenizer: Any) -> list[int] | None:
    """Byte-fallback ids of U+2581 where the tokenizer uses that character for a space."""
    if _decoder_kind(tokenizer) == "ByteLevel":
        return None
    return [tokenizer.get_vocab()[f"<0x{byte:02X}>"] for byte in SPACE_SYMBOL.encode()]


def _byte_level_bytes(token: str) -> bytes:
    table = byte_of_character()
    # Added tokens are kept as plain text by the library's decoder when a character is outside the alphabet.
    return bytes(table[character] for character in token) if all(c in table for c in token) else token.encode()


def _piece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE_SYMBOL, " ").encode()
