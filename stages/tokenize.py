"""Turn a cleaned corpus into token shards, with a share of chat turns, and freeze the held-out set."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from model.spec import ModelSpec
from stages.base import Input, Stage, StageConfig, StageContext, StageResult, operational


class TokenizeConfig(StageConfig):
    """What goes into the shards."""

    kind: Literal["tokenize"] = "tokenize"
    """This stage."""
    corpus: str
    """The ``clean`` stage whose documents are tokenized."""
    tokenizer: str
    """The ``tokenizer`` stage."""
    chat_share: float = Field(0.02, ge=0, le=1)
    """Share of training documents rendered as a chat turn, so that the chat specials are trained from the start."""
    min_special_count: int = Field(8, ge=1, le=1_000_000_000)
    """Fewest occurrences in training of every special but padding; fewer is refused (TRAPS T8)."""
    workers: int = operational(1, ge=1, le=256)
    """Processes that encode; the result does not depend on it. One shares the machine's cores by threads."""
    progress_seconds: float = operational(10.0, gt=0, le=86_400)
    """Seconds between lines of progress."""


class Tokenize(Stage):
    """From a corpus and a tokenizer to token shards."""

    kind: ClassVar[str] = "tokenize"
    Config: ClassVar[type[StageConfig]] = TokenizeConfig
    code_version: ClassVar[int] = 2
    produces: ClassVar[str] = "tokens"
    inputs: ClassVar[dict[str, Input]] = {
        "corpus": Input(produces="corpus"),
        "tokenizer": Input(produces="tokenizer"),
    }

    @classmethod
    def plan(cls, config: TokenizeConfig, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Share of chat documents."""
        return {"chat_share": config.chat_share}

    def run(self, context: StageContext) -> StageResult:
        """Tokenize every source, shuffle its documents, audit, and write ``tokens.json`` last."""
        from data.tokenize_corpus import tokenize_corpus

        facts = tokenize_corpus(
            context.parent_output("corpus"),
            context.parent_output("tokenizer"),
            context.output,
            work=context.work,
            seed=context.seed,
            chat_share=context.config.chat_share,
            min_special_count=context.config.min_special_count,
            workers=context.config.workers,
            progress_seconds=context.config.progress_seconds,
        )
        return StageResult(_metrics(facts), _summary(facts))


def _metrics(facts: dict[str, Any]) -> dict[str, Any]:
    train = [source["train"] for source in facts["sources"]]
    return {
        "vocab_size": facts["vocab_size"],
        "train_tokens": sum(split["tokens"] for split in train),
        "train_documents": sum(split["documents"] for split in train),
        "heldout_tokens": sum(source["heldout"]["tokens"] for source in facts["sources"]),
        "heldout_hash": facts["heldout_hash"],
    }


def _summary(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"vocabulary {facts['vocab_size']} ({facts['dtype']}), held-out {facts['heldout_hash'][:12]}",
        "source            language  documents       tokens  bytes/token  held-out tokens",
    ]
    for source in facts["sources"]:
        train = source["train"]
        lines.append(
            f"{source['name']:<16}  {source['language']:<8}  {train['documents']:>9,}  {train['tokens']:>11,}  "
            f"{train['bytes'] / max(1, train['tokens']):>11.2f}  {source['heldout']['tokens']:>15,}"
        )
    counts = ", ".join(f"{name} {count:,}" for name, count in facts["special_token_counts"].items())
    return [*lines, f"specials in training: {counts}"]
