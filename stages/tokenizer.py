"""Train a tokenizer on the cleaned corpus, prune or import a published one, and prove that it loses no text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from data.public_tokenizers import origin_faults, revision
from data.source_config import Package
from data.tokenizer_config import PublicTokenizer
from model.spec import ModelSpec
from stages.base import Fault, Input, SourceName, Stage, StageConfig, StageContext, StageResult, operational

MIN_VOCAB_SIZE = 320
FERTILITY_FILE = "fertility.json"
"""``{tokenizer: {language: figures}}``, ours first, then those of ``compare_with``; see ``data.fertility``."""
OURS = "this"
"""What our own tokenizer is called there."""


class TokenizerConfig(StageConfig):
    """How the vocabulary comes about."""

    kind: Literal["tokenizer"] = "tokenizer"
    """This stage."""
    corpus: str
    """The ``clean`` stage whose training text is sampled."""
    model_type: Literal["byte_level_bpe", "sentencepiece_bpe", "pruned_bpe", "import"] = "byte_level_bpe"
    """``byte_level_bpe`` or ``sentencepiece_bpe`` (falls back to bytes) are trained; ``pruned_bpe`` keeps of a
    published byte-level BPE what the sample uses most; ``import`` takes over a published one whole."""
    vocab_size: int | None = Field(None, ge=MIN_VOCAB_SIZE, le=4_194_304)
    """Ids to train or to keep, specials and bytes included; left out for ``import``."""
    max_sample_bytes: int = Field(10_000_000, ge=1000, le=100_000_000_000)
    """UTF-8 bytes of training text to learn from, spread over the languages."""
    language_shares: dict[str, float] | None = None
    """Share of the sample by language, any positive scale, every language named; none means by bytes."""
    indentation_runs: list[Annotated[int, Field(ge=2, le=64)]] = Field([], max_length=64)
    """Lengths of runs of spaces that become pieces of their own (``sentencepiece_bpe`` only), such as 4, 8, 12."""
    source: str | None = None
    """What to prune or import: a directory, or a hub name together with ``revision``; none means ``package``."""
    revision: str | None = None
    """Commit hash of the hub's repository; a branch's name would not pin it."""
    package: Package | None = None
    """Pinned package that ships what to prune or import, in place of ``source``."""
    file: str | None = None
    """Glob of the one file of ``package``: ``tokenizer.json``, ranks (``*.tiktoken``), or a model (``*.gguf``)."""
    split: Literal["qwen2", "qwen35"] | None = None
    """How text is cut into words where the file does not say (``*.tiktoken``), by llama.cpp's name."""
    compare_with: list[PublicTokenizer] = operational([])
    """Published tokenizers whose fertility is reported beside ours when the tokenizer is made."""
    progress_seconds: float = operational(10.0, gt=0, le=86_400)
    """Seconds between lines of progress."""


class Tokenizer(Stage):
    """From a corpus to a tokenizer that ``AutoTokenizer`` loads."""

    kind: ClassVar[str] = "tokenizer"
    Config: ClassVar[type[StageConfig]] = TokenizerConfig
    code_version: ClassVar[int] = 2
    produces: ClassVar[str] = "tokenizer"
    inputs: ClassVar[dict[str, Input]] = {"corpus": Input(produces="corpus")}

    @classmethod
    def check(cls, config: TokenizerConfig, model: ModelSpec | None) -> list[Fault]:
        """Fields that only fit some kinds, and a vocabulary that the model's embedding lacks rows for (TRAPS K10)."""
        faults = [*_kind_faults(config), *_compared_faults(config)]
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
    def check_sources(cls, config: TokenizerConfig, sources: Mapping[str, list[str]]) -> list[Fault]:
        """Shares of languages that the recipe's corpus does not have, or without those that it has."""
        names = sources.get("corpus", [])
        languages = {name.language for name in names if isinstance(name, SourceName) and name.language}
        return _share_faults(config.language_shares, languages) if languages else []

    @classmethod
    def check_parents(
        cls, config: TokenizerConfig, model: ModelSpec | None, parents: Mapping[str, Path]
    ) -> list[Fault]:
        """The same of a corpus that is there already, from this recipe or elsewhere."""
        from data.corpus import sources

        if "corpus" not in parents or config.language_shares is None:
            return []
        found = sources(parents["corpus"] / "output")
        return _share_faults(config.language_shares, {source["language"] for source in found})

    @classmethod
    def source_revisions(cls, config: TokenizerConfig) -> dict[str, str]:
        """What pins the tokenizer that is pruned or imported: digest, package hash or commit."""
        if not _takes_published(config) or (config.source is None and config.package is None):
            return {}
        return revision(_origin(config))

    @classmethod
    def plan(cls, config: TokenizerConfig, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Vocabulary and sample."""
        published = {"from": config.source or config.file} if _takes_published(config) else {}
        if config.model_type == "import":
            return published
        return {**published, "vocab_size": config.vocab_size, "max_sample_bytes": config.max_sample_bytes}

    def run(self, context: StageContext) -> StageResult:
        """Make the tokenizer, save, check round trips and byte counts, and report what it costs by language."""
        from data.tokenizer import audit, finish, load

        config, corpus = context.config, context.parent_output("corpus")
        started = time.monotonic()
        print(f"tokenizer: {config.model_type} from {config.source or config.file or config.corpus}", flush=True)
        facts = build(config, corpus, context.output, context.seed, context.cache, context.work)
        tokenizer = load(context.output)
        audit(tokenizer)
        elapsed = time.monotonic() - started
        report = compare(config, tokenizer, corpus, context.cache)
        (context.output / FERTILITY_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        ours = next(iter(report.values()))
        info = finish(context.output, tokenizer, config.model_type, ours, **facts)
        warnings = _unfilled(config, info["vocab_size"])
        for line in warnings:
            print(f"tokenizer: {line}", flush=True)
        metrics = {
            "vocab_size": info["vocab_size"],
            "train_seconds": round(elapsed, 3),
            **{f"bytes_per_token_{language}": figures["bytes_per_token"] for language, figures in ours.items()},
        }
        return StageResult(metrics, [*warnings, *_summary(info, report, elapsed)])


def build(config: TokenizerConfig, corpus: Path, output: Path, seed: int, cache: Path, work: Path) -> dict[str, Any]:
    """Write the tokenizer that ``config`` asks for into ``output``, the same bytes every time; ``work`` is scratch.

    Returns:
        What is worth recording of how it came about.

    Raises:
        DataError: if the text cannot fill the vocabulary, or what is to be pruned or imported is no such tokenizer.
        FetchError: if its package cannot be had as pinned.
    """
    if config.model_type == "import":
        from data.tokenizer_import import import_public

        import_public(_origin(config), cache, output)
        return {}
    if config.model_type == "pruned_bpe":
        return _prune(config, corpus, output, seed, cache)
    return _train(config, corpus, output, seed, work)


def _train(config: TokenizerConfig, corpus: Path, output: Path, seed: int, work: Path) -> dict[str, Any]:
    from data.tokenizer_learn import LearnJob, learn
    from data.tokenizer_train import save_learned

    assert config.vocab_size is not None, "check() asks for vocab_size"
    learned = learn(
        LearnJob(
            corpus=str(corpus),
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            indentation_runs=config.indentation_runs,
            max_bytes=config.max_sample_bytes,
            language_shares=config.language_shares,
            seed=seed,
            progress_seconds=config.progress_seconds,
        ),
        work,
    )
    save_learned(config.model_type, learned.model, output)
    print(f"tokenizer: learned, at most {learned.peak_rss_bytes / 1e6:.0f} MB of memory", flush=True)
    return {"sampled_bytes": learned.sampled_bytes}


def _prune(config: TokenizerConfig, corpus: Path, output: Path, seed: int, cache: Path) -> dict[str, Any]:
    from data.public_tokenizers import read_bpe
    from data.sample import Sample
    from data.tokenizer_prune import train_pruned

    assert config.vocab_size is not None, "check() asks for vocab_size"
    every = config.progress_seconds
    sample = Sample(corpus, config.max_sample_bytes, config.language_shares, seed, every)
    pruned = train_pruned(read_bpe(_origin(config), cache), sample, config.vocab_size, output, every)
    return {"sampled_bytes": sample.taken, "pruned": pruned}


def compare(config: TokenizerConfig, tokenizer: Any, corpus: Path, cache: Path) -> dict[str, Any]:
    """Fertility on the same held-out text of our tokenizer and of those to compare with, by name and language."""
    from data.fertility import measure_fertility
    from data.public_tokenizers import open_public

    report = {OURS: measure_fertility(tokenizer, corpus)}
    for other in config.compare_with:
        print(f"tokenizer: fertility of {other.name}", flush=True)
        report[other.name] = measure_fertility(open_public(other, cache), corpus)
    return report


def _share_faults(shares: Mapping[str, float] | None, languages: set[str]) -> list[Fault]:
    """Faults of ``language_shares`` against the ``languages`` of a corpus; an empty mapping lacks them all."""
    if shares is None:
        return []
    listed = f"must be a language of the corpus ({', '.join(sorted(languages))})"
    unknown = [
        Fault(f"language_shares.{name}", f"{listed}; got {name}; rename or remove it")
        for name in shares
        if name not in languages
    ]
    missing = [
        Fault(f"language_shares.{name}", "must be given, since the corpus has that language; got none; set its share")
        for name in sorted(languages - set(shares))
    ]
    return unknown + missing


def _takes_published(config: TokenizerConfig) -> bool:
    return config.model_type in ("pruned_bpe", "import")


def _origin(config: TokenizerConfig) -> PublicTokenizer:
    return PublicTokenizer(
        name="origin", source=config.source, revision=config.revision, package=config.package, file=config.file,
        split=config.split,
    )  # fmt: skip


def _compared_faults(config: TokenizerConfig) -> list[Fault]:
    faults = []
    names = [OURS, *(other.name for other in config.compare_with)]
    for index, other in enumerate(config.compare_with):
        place = f"compare_with.{index}"
        if names.count(other.name) > 1:
            faults.append(Fault(f"{place}.name", f"must be used once, and not be {OURS}; got {other.name}; rename it"))
        faults += [Fault(f"{place}.{field}", message) for field, message in origin_faults(other)]
    return faults


def _kind_faults(config: TokenizerConfig) -> list[Fault]:
    faults = []
    kind, is_import = config.model_type, config.model_type == "import"
    if _takes_published(config):
        faults += [Fault(field, message) for field, message in origin_faults(_origin(config))]
    else:
        given = [name for name in ("source", "revision", "package", "file", "split") if getattr(config, name)]
        text = f"must be left out for model_type {kind}; remove it or set import or pruned_bpe"
        faults += [Fault(name, text) for name in given]
    if is_import:
        given = [name for name in ("vocab_size", "language_shares") if getattr(config, name)]
        faults += [Fault(name, "must be left out for model_type import; remove it") for name in given]
    elif config.vocab_size is None:
        faults.append(Fault("vocab_size", f"must be set for model_type {kind}; got nothing; set it, such as 8192"))
    if config.indentation_runs and kind != "sentencepiece_bpe":
        faults.append(Fault("indentation_runs", "must be empty unless model_type is sentencepiece_bpe; remove it"))
    return faults


def _unfilled(config: TokenizerConfig, made: int) -> list[str]:
    """A warning where byte-level BPE ran out of pairs to merge: the library then ends early without a word."""
    if config.vocab_size is None or made >= config.vocab_size:
        return []
    return [
        f"WARNING: vocab_size asks for {config.vocab_size:,} ids, and the sampled text gave {made:,}: no pair in it is "
        f"left that occurs twice; set vocab_size to {made}, raise max_sample_bytes, or give the corpus more text"
    ]


def _summary(info: dict[str, Any], report: Mapping[str, Any], elapsed: float) -> list[str]:
    from data.fertility import table

    lines = [f"{info['kind']}, {info['vocab_size']} ids, {elapsed:.1f} s"]
    if pruned := info.get("pruned"):
        lines.append(
            f"of {pruned['source_vocab_size']:,} tokens {pruned['source_tokens_used']:,} occur; "
            f"those kept are {pruned['kept_use']:.2%} of all uses"
        )
    return [*lines, *table(report)]
