"""Taking over a Hugging Face tokenizer: the four specials and the chat template are added, the rest is kept."""

from __future__ import annotations

import json
from pathlib import Path

from data.chat import CHAT_TEMPLATE
from data.errors import DataError
from data.tokenizer import SPECIAL_TOKENS, save


def import_tokenizer(source: str, revision: str | None, output: Path) -> None:
    """Save the tokenizer at ``source`` with our specials and template.

    Ids it has stay as they are; specials it lacks are appended. Canonical normalisation (NFC) is taken out, since
    cleaning did it, and so is the template that puts a beginning-of-sequence token before every text.

    Args:
        source: a directory, or a hub name.
        revision: commit of the hub's repository; unused for a directory.
        output: where to save.

    Raises:
        DataError: if there is no such tokenizer, or it is not one of the ``tokenizers`` library.
    """
    from transformers import AutoTokenizer

    pinned = {"local_files_only": True} if Path(source).is_dir() else {"revision": revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **pinned)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"source must be a tokenizer that AutoTokenizer loads; got {source!r}: {first}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"source must be a fast tokenizer with a tokenizer.json; got {type(tokenizer).__name__}")
    facts = json.loads(backend.to_str())
    if (facts.get("normalizer") or {}).get("type") == "NFC":
        facts["normalizer"] = None
    if (facts.get("post_processor") or {}).get("type") != "ByteLevel":
        facts["post_processor"] = None
    _save(facts, output)


def _save(facts: dict, output: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(json.dumps(facts))
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    save(backend, output, CHAT_TEMPLATE)
