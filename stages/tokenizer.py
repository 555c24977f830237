"""Train a tokenizer on the cleaned corpus, or import one, and prove that it loses no text."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from model.spec import ModelSpec
from stages.base import Fault, Input, Stage, StageConfig, StageContext, StageResult, operational

MIN_VOCAB_SIZE = 320


class TokenizerConfig(StageConfig):
    """How the vocabulary comes about."""

    kind: Literal["tokenizer"] = "tokenizer"
    """This stage."""
    corpus: str
    """The ``clean`` stage whose training text is sampled."""
    model_type: Literal["byte_level_bpe", "sentencepiece_bpe", "import"] = "byte_level_bpe"
    """``byte_level_bpe`` or ``sentencepiece_bpe`` (falls back to bytes) are trained; ``import`` takes over one."""
    vocab_size: int | None = Field(None, ge=MIN_VOCAB_SIZE, le=4_194_304)
    """Ids to train, specials and bytes included; left out for ``import``."""
    max_sample_bytes: int = Field(10_000_000, ge=1000, le=100_000_000_000)
    """UTF-8 bytes of training text to learn from, spread over the languages."""
    language_shares: dict[str, float] | None = None
    """Share of the sample by language, any positive scale, every language named; none means by bytes."""
    indentation_runs: list[int] = Field([], max_length=64)
    """Lengths of runs of spaces that become pieces of their own (``sentencepiece_bpe`` only), such as 4, 8, 12."""
    source: str | None = None
    """What to import: a directory, or a hub name together with ``revision``."""
    revision: str | None = None
    """Commit hash of the hub's repository; a branch's name would not pin it."""
    progress_seconds: float = operational(10.0, gt=0)
    """Seconds between lines of progress."""


class Tokenizer(Stage):
    """From a corpus to a tokenizer that ``AutoTokenizer`` loads."""

    kind: ClassVar[str] = "tokenizer"
    Config: ClassVar[type[StageConfig]] = TokenizerConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "tokenizer"
    inputs: ClassVar[dict[str, Input]] = {"corpus": Input(produces="corpus")}

    @classmethod
    def check(cls, config: TokenizerConfig, model: ModelSpec | None) -> list[Fault]:
        """Fields that only fit some kinds, and a vocabulary that the model's embedding lacks rows for (TRAPS K10)."""
        faults = _import_faults(config) if config.model_type == "import" else _training_faults(config)
        if model and config.vocab_size and config.vocab_size > model.vocab_size:
            faults.append(
                Fault(
                    "vocab_size",
                    f"must be at most model.vocab_size {model.vocab_size}; got {config.vocab_size}; "
                    f"set vocab_size to {model.vocab_size} or model.vocab_size to {config.vocab_size}",
                )
            )
        for language, share in (config.language_shares or {}).items():
            if not 0 < share < float("inf"):
                faults.append(Fault(f"language_shares.{language}", f"must be positive; got {share}; set its share"))
        return faults

    @classmethod
    def source_revisions(cls, config: TokenizerConfig) -> dict[str, str]:
        """The digest of an imported directory, or the pinned commit of a hub name."""
        if config.model_type != "import" or config.source is None:
            return {}
        if Path(config.source).is_dir():
            from data.tokenizer import directory_digest

            return {config.source: directory_digest(Path(config.source))}
        return {config.source: str(config.revision)}

    @classmethod
    def plan(cls, config: TokenizerConfig, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Vocabulary and sample."""
        if config.model_type == "import":
            return {"import": config.source}
        return {"vocab_size": config.vocab_size, "max_sample_bytes": config.max_sample_bytes}

    def run(self, context: StageContext) -> StageResult:
        """Train or import, save, check round trips and byte counts, and report bytes a token by language."""
        from data.fertility import measure_fertility
        from data.tokenizer import audit, finish, load

        config, corpus = context.config, context.parent_output("corpus")
        started = time.monotonic()
        print(f"tokenizer: {config.model_type} from {config.source or config.corpus}", flush=True)
        build(config, corpus, context.output, context.seed)
        tokenizer = load(context.output)
        audit(tokenizer)
        fertility = measure_fertility(tokenizer, corpus)
        info = finish(context.output, tokenizer, config.model_type, fertility)
        elapsed = time.monotonic() - started
        metrics = {
            "vocab_size": info["vocab_size"],
            "train_seconds": round(elapsed, 3),
            **{f"bytes_per_token_{language}": figures["bytes_per_token"] for language, figures in fertility.items()},
        }
        return StageResult(metrics, _summary(info, fertility, elapsed))


def build(config: TokenizerConfig, corpus: Path, output: Path, seed: int) -> None:
    """Write the tokenizer that ``config`` asks for into ``output``."""
    from data.sample import sample_texts
    from data.tokenizer_import import import_tokenizer
    from data.tokenizer_train import train_byte_level, train_sentencepiece

    if config.model_type == "import":
        assert config.source is not None, "check() asks for source"
        import_tokenizer(config.source, config.revision, output)
        return
    assert config.vocab_size is not None, "check() asks for vocab_size"
    texts = sample_texts(
        corpus,
        max_bytes=config.max_sample_bytes,
        language_shares=config.language_shares,
        seed=seed,
        progress_seconds=config.progress_seconds,
    )
    if config.model_type == "sentencepiece_bpe":
        train_sentencepiece(texts, config.vocab_size, output, config.indentation_runs)
    else:
        train_byte_level(texts, config.vocab_size, output)


def _import_faults(config: TokenizerConfig) -> list[Fault]:
    faults = []
    if not config.source:
        faults.append(Fault("source", "must name what to import; got nothing; set a directory or a hub name"))
    elif not Path(config.source).is_dir() and not re.fullmatch(r"[0-9a-f]{40}", config.revision or ""):
        faults.append(
            Fault(
                "revision",
                f"must be a 40-digit commit hash, since {config.source} is no directory here; "
                f"got {config.revision!r}; set the commit, or source to a directory",
            )
        )
    for name in ("vocab_size", "language_shares", "indentation_runs"):
        if getattr(config, name):
            faults.append(Fault(name, "must be left out for model_type import; remove it"))
    return faults


def _training_faults(config: TokenizerConfig) -> list[Fault]:
    faults = []
    if config.vocab_size is None:
        faults.append(
            Fault("vocab_size", f"must be set for model_type {config.model_type}; got nothing; set it, such as 8192")
        )
    for name in ("source", "revision"):
        if getattr(config, name) is not None:
            faults.append(Fault(name, f"must be left out for model_type {config.model_type}; remove it or set import"))
    if config.indentation_runs and config.model_type != "sentencepiece_bpe":
        faults.append(Fault("indentation_runs", "must be empty unless model_type is sentencepiece_bpe; remove it"))
    for run in config.indentation_runs:
        if not 2 <= run <= 64:
            faults.append(Fault("indentation_runs", f"must hold lengths in 2..64; got {run}; remove it"))
    return faults


def _summary(info: dict[str, Any], fertility: dict[str, dict[str, float]], elapsed: float) -> list[str]:
    lines = [
        f"{info['kind']}, {info['vocab_size']} ids, {elapsed:.1f} s",
        "language  bytes/token  tokens/word  sample_bytes",
    ]
    for language, row in sorted(fertility.items()):
        lines.append(
            f"{language:<8}  {row['bytes_per_token']:>11.2f}  {row['tokens_per_word']:>11.2f}  {row['bytes']:>12,.0f}"
        )
    return lines
