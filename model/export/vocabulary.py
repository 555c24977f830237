"""A tokenizer artifact as the token lists that GGUF wants: byte-level BPE as ``gpt2``, SentencePiece BPE as ``llama``.

llama.cpp has no general tokenizer: it knows the split regex of each family by a name. What we train has ``qwen35``'s,
what is pruned of Qwen2.5 has ``qwen2``'s; only a byte-level tokenizer with exactly one of them, or SentencePiece BPE
trained with the identity, keeps its ids there.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The regex that llama.cpp calls ``qwen35``."""
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The regex that llama.cpp calls ``qwen2``."""
PRES = {SPLIT_PATTERN: "qwen35", QWEN2_PATTERN: "qwen2"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types."""
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, PAD, _, END_OF_TURN = SPECIAL_TOKENS


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens in id order with llama.cpp's types; ``merges`` of byte-level BPE, or ``scores`` of SentencePiece.

    ``model`` is ``gpt2`` or ``llama``, ``pre`` llama.cpp's name of the split; ``chat_template`` the Jinja text; the ids
    are those of the specials.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    eos_id: int
    pad_id: int
    eot_id: int
    chat_template: str

    def padded(self, size: int) -> Vocabulary:
        """With unused tokens up to ``size``, the rows of the model's embedding.

        Raises:
            ValueError: when there are more tokens than rows (TRAPS K10).
        """
        missing = size - len(self.tokens)
        if missing < 0:
            raise ValueError(f"vocab_size must be at least the tokenizer's {len(self.tokens)}; got {size}; set it")
        return dataclasses.replace(
            self,
            tokens=self.tokens + [f"[unused{number}]" for number in range(missing)],
            types=self.types + [UNUSED] * missing,
            scores=self.scores + [-1e6] * missing if self.scores else [],
        )


def read_vocabulary(directory: Path | str) -> Vocabulary:
    """The vocabulary of the tokenizer artifact in ``directory``.

    Raises:
        ValueError: for a tokenizer whose ids llama.cpp would not reproduce, saying what of it has no form there.
    """
    directory = Path(directory)
    facts = json.loads((directory / "tokenizer.json").read_bytes())
    template = json.loads((directory / "tokenizer_config.json").read_bytes())["chat_template"]
    faults = _faults(facts, directory)
    if faults:
        raise ValueError("; ".join(faults))
    is_byte_level = _is_byte_level(facts)
    tokens, types = _tokens(facts)
    for name in SPECIAL_TOKENS:
        if name not in tokens:
            raise ValueError(f"tokenizer must hold {name}; got none; run the tokenizer stage")
    return Vocabulary(
        model="gpt2" if is_byte_level else "llama",
        pre=PRES[_splits(facts)[0]] if is_byte_level else "default",
        tokens=tokens,
        types=types,
        merges=[_merge(pair) for pair in facts["model"]["merges"]] if is_byte_level else [],
        scores=[] if is_byte_level else _scores(directory, tokens),
        eos_id=tokens.index(END_OF_TEXT),
        pad_id=tokens.index(PAD),
        eot_id=tokens.index(END_OF_TURN),
        chat_template=template,
    )


def vocabulary_faults(directory: Path | str) -> list[str]:
    """What of the tokenizer in ``directory`` llama.cpp cannot reproduce; empty where it can."""
    return _faults(json.loads((Path(directory) / "tokenizer.json").read_bytes()), Path(directory))


def _faults(facts: dict[str, Any], directory: Path) -> list[str]:
    model = facts["model"]
    if model["type"] != "BPE":
        return [f"tokenizer must be BPE for GGUF; got {model['type']}; leave the gguf formats out"]
    if _is_byte_level(facts):
        return _byte_level_faults(facts)
    if model.get("byte_fallback") and (directory / "tokenizer.model").is_file():
        return []
    return ["tokenizer must be byte-level BPE, or SentencePiece BPE with its tokenizer.model; got neither"]


def _byte_level_faults(facts: dict[str, Any]) -> list[str]:
    faults = []
    if facts["normalizer"] is not None:
        faults.append(f"tokenizer must not normalise; got {facts['normalizer']['type']}; normalise when cleaning")
    splits = _splits(facts)
    if len(splits) != 1 or splits[0] not in PRES:
        faults.append(
            f"tokenizer must split text by the regex that llama.cpp calls {' or '.join(PRES.values())}; got {splits}; "
            "train one, or leave the gguf formats out"
        )
    if any(step.get("add_prefix_space") for step in _pre_tokenizers(facts)):
        faults.append("tokenizer must not put a space before the text; got add_prefix_space true; train one")
    if facts["model"].get("ignore_merges"):
        faults.append("tokenizer must apply its merges to every word; got ignore_merges true; train one")
    return faults


def _splits(facts: dict[str, Any]) -> list[Any]:
    return [step["pattern"].get("Regex") for step in _pre_tokenizers(facts) if step["type"] == "Split"]


def _is_byte_level(facts: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _pre_tokenizers(facts))


def _pre_tokenizers(facts: dict[str, Any]) -> list[dict[str, Any]]:
    step = facts["pre_tokenizer"]
    if step is None:
        return []
    return step["pretokenizers"] if step["type"] == "Sequence" else [step]


def _tokens(facts: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and types in id order; ids that nothing has are unused."""
    known = dict(facts["model"]["vocab"])
    added = {token["id"]: token for token in facts["added_tokens"]}
    size = max([*known.values(), *added]) + 1
    tokens = [f"[unused{number}]" for number in range(size)]
    types = [UNUSED] * size
    is_byte_level = _is_byte_level(facts)
    for text, number in known.items():
        tokens[number], types[number] = text, NORMAL if is_byte_level else _piece_type(text)
    for number, token in added.items():
        # llama.cpp looks for added tokens in the plain text, where a run of spaces is not yet written in symbols.
        tokens[number] = token["content"]
        types[number] = CONTROL if token["special"] else USER_DEFINED
    return tokens, types


def _piece_type(text: str) -> int:
    if text == "<unk>":
        return UNKNOWN
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _merge(pair: Any) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _scores(directory: Path, tokens: list[str]) -> list[float]:
    """SentencePiece's scores, by which llama.cpp decides which pair is joined first; none for what was added later."""
    import sentencepiece

    native = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    size = native.get_piece_size()
    return [float(native.get_score(number)) if number < size else 0.0 for number in range(len(tokens))]
