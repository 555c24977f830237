"""A corpus of a few hundred made-up documents in four languages, and token artifacts without any tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from data.corpus import DocumentWriter, document_id, write_description
from data.shards import HELDOUT, TRAIN, ShardWriter, heldout_digest, token_dtype

_VOCABULARY = {
    "en": "the river old house stands near a small town and its people remember many stories about water",
    "de": "der alte Fluss fließt größer über die schöne Brücke und müde Leute hören süße Lieder",
    "hi": "हिन्दी की मात्राएँ और नदी के किनारे छोटा गाँव है जहाँ लोग ज़रूर कहानी सुनाते हैं",
    "code": "def return self if value else items for index in range print None True",
}
WORDS = {language: words.split() for language, words in _VOCABULARY.items()}
SIZES = {"wiki": ("en", 120), "netz": ("de", 60), "gaon": ("hi", 40), "python": ("code", 40)}


def document_text(rng: random.Random, language: str) -> str:
    if language == "code":
        lines = [f"    {rng.choice(WORDS['code'])}({rng.randint(0, 99)})" for _ in range(rng.randint(2, 12))]
        return "def main():\n" + "\n\t".join(lines) + "\n"
    stop = "।" if language == "hi" else "."
    sentences = [" ".join(rng.choices(WORDS[language], k=rng.randint(4, 12))) + stop for _ in range(rng.randint(2, 8))]
    return " ".join(sentences)


def build_corpus(directory: Path) -> Path:
    """Write the corpus; every sixth document is held out."""
    described = []
    for name, (language, count) in SIZES.items():
        rng, splits = random.Random(name), {}
        with (
            DocumentWriter(directory / TRAIN / f"{name}.jsonl.gz") as train,
            DocumentWriter(directory / HELDOUT / f"{name}.jsonl.gz") as heldout,
        ):
            for number in range(count):
                text = f"{document_text(rng, language)} {number}"
                title = f"Place {number}" if name == "wiki" else None
                (heldout if number % 6 == 0 else train).write(
                    {"id": document_id(text), "text": text, "source": name, "language": language, "title": title}
                )
        for split, writer in ((TRAIN, train), (HELDOUT, heldout)):
            splits[split] = {"documents": writer.documents, "bytes": writer.bytes}
        described.append({"name": name, "language": language, "licence": "none", "dropped": {}, **splits})
    write_description(directory, described)
    return directory


def build_tokens(
    directory: Path, train: dict[str, list[list[int]]], heldout: dict[str, list[list[int]]] | None = None,
    *, vocab_size: int = 60_000, token_bytes: np.ndarray | None = None,
) -> Path:  # fmt: skip
    """A tokens artifact of given documents (ids without EOS); EOS is 0 and padding 1."""
    facts = []
    heldout = heldout or {}
    for name, documents in train.items():
        entry = {"name": name, "language": name[:2]}
        for split, members in ((TRAIN, documents), (HELDOUT, heldout.get(name, []))):
            with ShardWriter(directory, split, name, token_dtype(vocab_size)) as writer:
                for number, ids in enumerate(members):
                    writer.append(f"{name}-{split}-{number}", [*ids, 0], 2 * len(ids))
            entry[split] = writer.facts()
        facts.append(entry)
    content = {
        "vocab_size": vocab_size, "dtype": token_dtype(vocab_size).name, "eos_id": 0, "pad_id": 1,
        "tokenizer_digest": "none", "special_token_counts": {}, "sources": facts,
        "heldout_hash": heldout_digest(directory, [(entry["name"], entry["language"]) for entry in facts]),
    }  # fmt: skip
    (directory / "tokens.json").write_text(json.dumps(content))
    (directory / "tokenizer").mkdir(exist_ok=True)
    lengths = np.full(vocab_size, 2, dtype=np.uint16) if token_bytes is None else token_bytes
    lengths[:2] = 0
    np.save(directory / "tokenizer" / "token_bytes.npy", lengths)
    return directory
