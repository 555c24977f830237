"""Whether other programs give a tokenizer's ids: llama.cpp, SentencePiece's own library, tiktoken on the pruned ranks.

    python benchmarks/token_ids.py --corpus CLEAN/output --tokenizers mine=TOKENIZER/output

Held-out documents of every language and random strings; ``different`` counts texts whose ids are not all equal. For
a pruned tokenizer, ``--ranks`` names the file it was pruned from: texts whose tokens there were all kept must be cut
as there.
"""

from __future__ import annotations

import argparse
import base64
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, table, write_result

PIECES = [
    *"abcXYZ 019  \n\t\r.,'!#<|>_-=äöüßé", "नदी", "हि", "न्", "क्\u200dष", "\u200c", "\u093c", "।", "१२", "    ", "\r\n",
    "👍🏽", "👨\u200d👩", "e\u0301", "\u00a0", "\u2028", "\ufeff", "\U0010ffff", "\x00", "<|im_start|>",
    "<0x41>", "你好", "don't",
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--corpus", type=Path, required=True, help="output folder of a clean stage")
    parser.add_argument(
        "--tokenizers", nargs="+", required=True, metavar="NAME=FOLDER", help="outputs of tokenizer stages"
    )
    parser.add_argument("--ranks", type=Path, help="file of ranks that pruned ones come from (Qwen2's split)")
    parser.add_argument("--max-bytes", type=int, default=400_000, help="held-out text a language")
    parser.add_argument("--random", type=int, default=4000, help="random strings")
    parser.add_argument("--result", type=Path, default=RESULTS / "token_ids.json")
    arguments = parser.parse_args(argv)
    rows = measure(arguments)
    print(table(rows))
    write_result(arguments.result, rows, {"max_bytes": arguments.max_bytes, "random": arguments.random})
    return 0


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from data.fertility import language_texts
    from data.tokenizer import SPACE_SYMBOL, encode_texts, load

    drawn = random.Random(11)
    heldout = [text for texts in language_texts(arguments.corpus, arguments.max_bytes).values() for text in texts]
    fuzz = ["".join(drawn.choices(PIECES, k=drawn.randrange(60))) for _ in range(arguments.random)]
    rows = []
    for name, folder in (one.split("=", 1) for one in arguments.tokenizers):
        tokenizer = load(folder)
        for kind, texts in (("held-out documents", heldout), ("random strings", fuzz)):
            if SPACE_SYMBOL in tokenizer.get_vocab():
                # SentencePiece writes a space so, and cannot tell the two apart.
                texts = [text for text in texts if SPACE_SYMBOL not in text]
            ours = encode_texts(tokenizer, texts)
            for other, encoded in others(Path(folder), texts, arguments.ranks):
                pairs = [(mine, theirs) for mine, theirs in zip(ours, encoded, strict=True) if theirs is not None]
                different = sum(mine != theirs for mine, theirs in pairs)
                rows.append(
                    {"tokenizer": name, "beside": other, "texts": kind, "n": len(pairs), "different": different}
                )
    return rows


def others(folder: Path, texts: list[str], ranks: Path | None) -> Iterator[tuple[str, list[list[int] | None]]]:
    """Name and ids of each program that knows this tokenizer; none for a text that cannot be compared."""
    yield "llama.cpp", list(llama_cpp(folder, texts))
    if (folder / "tokenizer.model").is_file():
        import sentencepiece

        native = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        yield "sentencepiece", [native.encode(text) for text in texts]
    if ranks and (folder / "source_ids.npy").is_file():
        yield "tiktoken, all tokens kept", list(tiktoken_kept(folder, texts, ranks))


def llama_cpp(folder: Path, texts: list[str]) -> Iterator[list[int]]:
    from model.config import HybridConfig
    from model.export.gguf import write_gguf
    from model.export.llama_cpp import LlamaCpp
    from model.export.vocabulary import read_vocabulary
    from model.lm import HybridForCausalLM
    from model.spec import ModelSpec

    vocabulary = read_vocabulary(folder)
    mixers = {
        "ssd": {"mixer": "mamba2", "d_state": 16, "head_dim": 16, "expand": 2, "d_conv": 4, "n_groups": 1},
        "att": {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
    }
    spec = ModelSpec.model_validate(
        {"d_model": 64, "d_ff": 96, "vocab_size": len(vocabulary.tokens), "max_seq_len": 64, "layers": "ssd att",
         "mixers": mixers}
    )  # fmt: skip
    weights = HybridForCausalLM(HybridConfig.from_spec(spec, eos_token_id=0, pad_token_id=1)).state_dict()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        write_gguf(path, spec, lambda name: weights[name].float().numpy(), vocabulary, "f16", name="ids")
        with LlamaCpp(path, context_tokens=64, threads=1) as other:
            for text in texts:
                yield other.tokenize(text)


def tiktoken_kept(folder: Path, texts: list[str], ranks: Path) -> Iterator[list[int] | None]:
    import numpy as np
    import tiktoken

    from data.bpe import QWEN2_PATTERN

    lines = (line.split() for line in ranks.read_bytes().splitlines())
    mergeable = {base64.b64decode(token): int(rank) for token, rank in lines}
    whole = tiktoken.Encoding("ranks", pat_str=QWEN2_PATTERN, mergeable_ranks=mergeable, special_tokens={})
    new = {int(old): number for number, old in enumerate(np.load(folder / "source_ids.npy")) if old >= 0}
    for text in texts:
        ids = whole.encode_ordinary(text)
        yield [new[one] for one in ids] if all(one in new for one in ids) else None


if __name__ == "__main__":
    raise SystemExit(main())
