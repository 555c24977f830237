"""Training tokenizers: SentencePiece BPE with byte fallback, and byte-level BPE that keeps letters with their marks."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.bpe import QWEN35_PATTERN
from data.chat import CHAT_TEMPLATE
from data.errors import DataError
from data.tokenizer import END_OF_TEXT, IM_END, IM_START, PAD, SPACE_SYMBOL, SPECIAL_TOKENS, save

SPLIT_PATTERN = QWEN35_PATTERN
"""How byte-level BPE cuts text into words: letters stay with their marks, digits stand alone."""

_UNKNOWN_ID = len(SPECIAL_TOKENS)
_MAX_LINE_CHARACTERS = 8000
_SENTENCEPIECE: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "split_digits": True,
    "character_coverage": 0.9999,
    "eos_id": 0,
    "eos_piece": END_OF_TEXT,
    "pad_id": 1,
    "pad_piece": PAD,
    "control_symbols": [IM_START, IM_END],
    "unk_id": _UNKNOWN_ID,
    "bos_id": -1,
    "max_sentence_length": 4 * _MAX_LINE_CHARACTERS + 1,
    "num_threads": 1,
}


def train_byte_level(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """``learn_byte_level``, saved into ``directory``."""
    save_learned("byte_level_bpe", learn_byte_level(texts, vocab_size), directory)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, directory: Path, indentation_runs: Sequence[int] = ()
) -> None:
    """``learn_sentencepiece``, saved into ``directory`` as ``tokenizer.model`` and ``tokenizer.json``."""
    save_learned("sentencepiece_bpe", learn_sentencepiece(texts, vocab_size, indentation_runs), directory)


def save_learned(model_type: str, model: bytes, directory: Path) -> None:
    """Save what one of the two ``learn_`` functions gave as a Hugging Face directory."""
    from tokenizers import Tokenizer

    if model_type == "byte_level_bpe":
        save(Tokenizer.from_buffer(model), directory, CHAT_TEMPLATE)
        return
    (directory / "tokenizer.model").write_bytes(model)
    save(from_sentencepiece(model), directory, CHAT_TEMPLATE)


def learn_byte_level(texts: Iterable[str], vocab_size: int, *, is_watched: bool = False) -> bytes:
    """Byte-level BPE without normaliser or prefix space; ids 0 to 3 are the specials. Same texts, same bytes.

    ``is_watched`` has the library say on the error stream how far it is.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    watched: dict[str, Any] = {"progress_format": "json"} if is_watched else {}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=is_watched,
        **watched,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer.to_str().encode()


def learn_sentencepiece(
    texts: Iterable[str], vocab_size: int, indentation_runs: Sequence[int] = (), *, is_watched: bool = False
) -> bytes:
    """A SentencePiece BPE model with identity normalisation and byte fallback.

    Ids 0 to 3 are the specials, 4 the unknown piece (which byte fallback keeps from ever occurring), then newline, tab
    and the runs of spaces, then 256 bytes. One thread and a fixed order, so the same texts give the same file.
    ``is_watched`` is that of ``learn_byte_level``.

    Raises:
        DataError: if the text cannot fill the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            user_defined_symbols=["\n", "\t", *(SPACE_SYMBOL * run for run in sorted(indentation_runs, reverse=True))],
            minloglevel=0 if is_watched else 2,
            **_SENTENCEPIECE,
        )
    except RuntimeError as error:
        message = (
            f"must fit the sampled text; got {vocab_size}; sentencepiece says: {error}; "
            "change vocab_size or raise max_sample_bytes"
        )
        raise DataError([("vocab_size", message)]) from None
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of text that SentencePiece's trainer accepts: it skips lines with tabs, nulls, or too many bytes."""
    for text in texts:
        for line in re.split(r"[\n\t\r\0]+", text):
            for start in range(0, len(line), _MAX_LINE_CHARACTERS):
                yield line[start : start + _MAX_LINE_CHARACTERS]


def from_sentencepiece(model: bytes) -> Any:
    """A ``tokenizers.Tokenizer`` that gives the ids of a SentencePiece BPE model trained here.

    SentencePiece joins the adjacent pair whose union has the best score; written as merges, every way to split a piece
    into two pieces is one merge, ranked by the union's id.
    """
    import sentencepiece
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    native = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {native.id_to_piece(token): token for token in range(native.get_piece_size())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(native), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE_SYMBOL)
    # No learned piece goes on past a space, so cutting before spaces changes no id and lets the library cache words.
    words = Regex(f"{SPACE_SYMBOL}+[^{SPACE_SYMBOL}]*|[^{SPACE_SYMBOL}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_symbols(tokenizer, native)
    return tokenizer


def _add_symbols(tokenizer: Any, native: Any) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    for token in range(_UNKNOWN_ID + 1, native.get_piece_size()):
        piece = native.id_to_piece(token)
        if native.is_byte(token):
            break
        # Runs of spaces exist only after spaces were replaced, which is what "normalized" means.
        tokenizer.add_tokens([AddedToken(piece, normalized=SPACE_SYMBOL in piece, special=False)])


def _merges(native: Any) -> list[tuple[str, str]]:
    first_learned = max(token for token in range(native.get_piece_size()) if native.is_byte(token)) + 1
    learned = [native.id_to_piece(token) for token in range(first_learned, native.get_piece_size())]
    known = set(learned)
    return [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
