"""Documents to token ids, closed by EOS, a share of them told as chat: the same by document, wherever it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.chat import render
from data.chat_turns import as_chat
from data.mix import hash64
from data.shards import token_dtype
from data.tokenizer import END_OF_TEXT, INFO_FILE, PAD, TOKEN_BYTES_FILE, encode_texts, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """A tokenizer artifact, opened to encode documents.

    Args:
        tokenizer_dir: output of the tokenizer stage.
        seed: decides with a document's id whether it is told as chat.
        chat_share: share of training documents that are.
    """

    def __init__(self, tokenizer_dir: Path, *, seed: int, chat_share: float) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load(tokenizer_dir)
        self.info = json.loads((tokenizer_dir / INFO_FILE).read_text(encoding="utf-8"))
        self.specials: dict[str, int] = self.info["special_tokens"]
        self.eos_id, self.pad_id = self.specials[END_OF_TEXT], self.specials[PAD]
        self.vocab_size: int = self.info["vocab_size"]
        self.lengths = np.load(tokenizer_dir / TOKEN_BYTES_FILE).astype(np.int64)
        self.dtype = token_dtype(self.vocab_size)
        self.seed, self.chat_share = seed, chat_share

    def encode(self, documents: Sequence[Mapping[str, Any]], *, chat: bool) -> Iterator[list[int]]:
        """Ids of each document (``id``, ``text``, ``title``, ``language``), closed by EOS.

        With ``chat`` a share of them, chosen by id, is rendered as a short conversation.
        """
        chats = {
            number: messages
            for number, document in enumerate(documents)
            if chat and self._is_chat(document["id"]) and (messages := as_chat(document))
        }
        plain = [document["text"] for number, document in enumerate(documents) if number not in chats]
        encoded = iter(encode_texts(self.tokenizer, plain))
        for number in range(len(documents)):
            ids = render(self.tokenizer, chats[number]).ids if number in chats else next(encoded)
            yield [*ids, self.eos_id]

    def text_bytes(self, ids: np.ndarray | list[int]) -> int:
        """UTF-8 bytes of the text that ``ids`` stand for; specials stand for none."""
        return int(self.lengths[ids].sum())

    def _is_chat(self, document_id: str) -> bool:
        return hash64("chat", self.seed, document_id) / 2**64 < self.chat_share
