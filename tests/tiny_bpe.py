"""A published byte-level vocabulary in small: what somebody else trained, as lists, as ranks and as a folder."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from data.bpe import QWEN2_PATTERN, ByteLevelBPE, from_facts, split_by
from data.tokenizer_prune import train_pruned


def published(texts: list[str], vocab_size: int) -> ByteLevelBPE:
    """Trained by the ``tokenizers`` library with Qwen2's split; no specials."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer=trainer)
    found = from_facts(json.loads(backend.to_str()), "published")
    return ByteLevelBPE(found.tokens, found.merges, split_by(QWEN2_PATTERN))


def write_ranks(bpe: ByteLevelBPE, path: Path) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(bpe.tokens)]
    path.write_text("\n".join(lines) + "\n")
    return path


def pruned_tokenizer(texts: list[str], vocab_size: int, directory: Path) -> None:
    """A tokenizer artifact pruned from one that was trained on ``texts`` in another order and larger."""
    train_pruned(published(texts, 2 * vocab_size), texts[::2], vocab_size, directory)
