"""A tiny pretraining run for tests: a real tokenizer, shards of two languages, a model of three mixers, a context."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from model.spec import ModelSpec
from stages.base import StageContext
from stages.pretrain import Pretrain

SOURCES = {"en": "the cat sat on a red mat and saw one small dog run over the old hill".split(),
           "de": "der kleine Hund läuft über die grüne Wiese und hört schöne Vögel am Fluss".split()}  # fmt: skip


def documents(language: str, count: int, seed: int) -> list[str]:
    """Sentences of a dozen words in a mildly predictable order; no two seeds give the same ones."""
    drawn = random.Random(f"{language}{seed}")
    words = SOURCES[language]
    texts = []
    for _ in range(count):
        place, text = drawn.randrange(len(words)), []
        for _ in range(drawn.randrange(6, 30)):
            text.append(words[place % len(words)])
            place += drawn.choice((1, 1, 1, 2, 5))
        texts.append(" ".join(text) + ".")
    return texts


def make_tokens(directory: Path) -> Path:
    """A finished tokens artifact in ``directory/output``; returns ``directory``."""
    import numpy as np

    from data import shards
    from data.tokenizer import encode_text, finish, load
    from data.tokenizer_train import train_byte_level

    output = directory / "output"
    tokenizer_dir = output / "tokenizer"
    tokenizer_dir.mkdir(parents=True)
    train = {language: documents(language, 120, 1) for language in SOURCES}
    train_byte_level([text for texts in train.values() for text in texts], 320, tokenizer_dir)
    tokenizer = load(tokenizer_dir)
    info = finish(tokenizer_dir, tokenizer, "bpe", {})
    dtype, counts, facts = np.dtype("<u2"), np.zeros(info["vocab_size"], np.int64), []
    for language, texts in train.items():
        splits = {}
        for split, split_texts in (("train", texts), ("heldout", documents(language, 12, 2))):
            with shards.ShardWriter(output, split, language, dtype) as writer:
                for number, text in enumerate(split_texts):
                    ids = [*encode_text(tokenizer, text), tokenizer.eos_token_id]
                    writer.append(f"{split}{number}", ids, len(text.encode()))
                    if split == "train":
                        np.add.at(counts, ids, 1)
            splits[split] = writer.facts()
        facts.append({"name": language, "language": language, **splits})
    np.save(output / "unigram.npy", counts)
    tokens = {
        "vocab_size": info["vocab_size"],
        "dtype": "uint16",
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "tokenizer_digest": info["digest"],
        "special_token_counts": {},
        "sources": facts,
        "heldout_hash": shards.heldout_digest(output, [(language, language) for language in SOURCES]),
    }
    (output / "tokens.json").write_text(json.dumps(tokens))
    return directory


def spec(**changes: Any) -> ModelSpec:
    """A model of all three mixers, width 32."""
    mixers = {
        "ssd": {"mixer": "mamba2", "d_state": 8, "head_dim": 16, "chunk_size": 16},
        "gla": {"mixer": "gla", "n_heads": 2, "head_k_dim": 8, "head_v_dim": 16, "chunk_size": 16},
        "att": {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "output_gate": True, "window": 24},
    }
    plain = {"d_model": 32, "d_ff": 48, "vocab_size": 320, "max_seq_len": 64, "layers": "ssd gla att", "mixers": mixers}
    return ModelSpec.model_validate(plain | changes)


def config(**changes: Any) -> Any:
    """Six steps of four rows of 32 tokens."""
    plain = {
        "kind": "pretrain", "data": "tokenize", "seq_len": 32, "global_batch_size": 4, "micro_batch_size": 2,
        "max_steps": 6, "lr": 3e-3, "max_epochs": 50, "log_every_steps": 1, "precision": "fp32", "deepspeed": "zero0",
        "schedule": {"kind": "cosine", "warmup_steps": 1},
    }  # fmt: skip
    return Pretrain.Config.model_validate(plain | changes)


class Log:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Remember one row."""
        self.rows.append({"event": event, "step": step, **values})

    def resume(self, step: int) -> None:
        """Remember that the run goes on."""
        self.log("resume", step, {})

    def log_checkpoint(self, step: int, path: Path) -> None:
        """Remember that a checkpoint was sealed."""
        self.log("checkpoint", step, {"path": str(path)})

    def flush(self) -> None:
        """Nothing is written."""

    def alert(self, text: str) -> None:
        """Remember what an operator should read."""
        self.log("alert", 0, {"text": text})

    def notify(self, text: str) -> None:
        """Nobody watches."""

    def of(self, event: str, name: str) -> dict[int, Any]:
        """Values of one name by step."""
        return {row["step"]: row[name] for row in self.rows if row["event"] == event and name in row}


def context(directory: Path, tokens: Path, *, parent: Path | None = None, model: ModelSpec | None = None,
            tracker: Any = None, **changes: Any) -> StageContext:  # fmt: skip
    """A context as the lifecycle would hand it over."""
    for name in ("output.tmp", "work"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    if parent is not None:
        changes.setdefault("from", "parent")
    return StageContext(
        pipeline="test", name="pretrain", key="0" * 64, seed=17, config=config(**changes), model=model or spec(),
        directory=directory, output=directory / "output.tmp", work=directory / "work", cache=directory / "cache",
        parents={"data": tokens} | ({"from_": parent} if parent is not None else {}), tracker=tracker or Log(),
    )  # fmt: skip
