"""Making a published byte-level vocabulary smaller by counted use: what the text at hand needs stays.

Tokens are taken away one after another, always the least used of those that no kept token is made of; its uses go to
the two tokens that it was made of, which is how BPE will write it from then on. So each kept token can still be built
from its bytes, and a text whose tokens are all kept is cut exactly as before.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.bpe import ByteLevelBPE, to_backend
from data.chat import CHAT_TEMPLATE
from data.errors import DataError
from data.tokenizer import SPECIAL_TOKENS, save

SOURCE_IDS_FILE = "source_ids.npy"
"""(V,) int32: the id that each id had in the source, -1 for our specials."""
_BATCH_TEXTS = 256


def train_pruned(
    source: ByteLevelBPE, texts: Iterable[str], vocab_size: int, directory: Path, progress_seconds: float = 10.0
) -> dict[str, Any]:
    """Save ``source`` pruned to ``vocab_size`` ids, specials and bytes included, by its use in ``texts``.

    Ids 0 to 3 are the specials; what is kept follows in the source's order, without gaps.

    Returns:
        ``{"source_vocab_size", "source_tokens_used", "kept_use"}``, the last as share of all counted tokens.

    Raises:
        DataError: if ``vocab_size`` leaves no room for the bytes or nothing to take away, or ``source`` lacks a byte.
    """
    room = vocab_size - len(SPECIAL_TOKENS)
    counts = count_use(source, texts, progress_seconds)
    kept = choose(source, counts, room)
    save(to_backend(subset(source, kept), SPECIAL_TOKENS), directory, CHAT_TEMPLATE)
    ids = np.concatenate([np.full(len(SPECIAL_TOKENS), -1), kept]).astype("<i4")
    np.save(directory / SOURCE_IDS_FILE, ids)
    return {
        "source_vocab_size": len(source.tokens),
        "source_tokens_used": int(np.count_nonzero(counts)),
        "kept_use": round(float(counts[kept].sum() / max(1, counts.sum())), 6),
    }


def count_use(source: ByteLevelBPE, texts: Iterable[str], progress_seconds: float = 10.0) -> np.ndarray:
    """(V,) int64: how often each token occurs in ``texts``, which are read batch by batch."""
    backend, counts = to_backend(source), np.zeros(len(source.tokens), np.int64)
    started = shown = time.monotonic()
    stream = iter(texts)
    while batch := list(itertools.islice(stream, _BATCH_TEXTS)):
        encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
        ids = np.fromiter(itertools.chain.from_iterable(one.ids for one in encoded), np.int64)
        counts += np.bincount(ids, minlength=len(counts))
        if time.monotonic() - shown > progress_seconds:
            shown = time.monotonic()
            print(f"tokenizer: counted {counts.sum():,} tokens, {shown - started:.0f} s", flush=True)
    return counts


def choose(source: ByteLevelBPE, counts: np.ndarray, room: int) -> np.ndarray:
    """Sorted source ids of the ``room`` tokens to keep; of equally used tokens the later merged one goes first.

    Raises:
        DataError: as ``train_pruned``.
    """
    total, specials = len(source.tokens), len(SPECIAL_TOKENS)
    if not 256 <= room < total:
        raise DataError(
            f"vocab_size must be in {256 + specials}..{total + specials - 1} to prune {total} tokens; "
            f"got {room + specials}; set it, or import the tokenizer whole"
        )
    missing = sorted({*range(256)} - {token[0] for token in source.tokens if len(token) == 1})
    if missing:
        raise DataError(
            f"source must hold all 256 bytes; {len(missing)} are missing, such as {missing[0]:#x}; set another"
        )
    made_of, users = _parts(source)
    use = counts.astype(np.int64).tolist()
    leaves = [(use[union], -union) for union in made_of if not users[union]]
    heapq.heapify(leaves)
    kept = np.ones(total, bool)
    for _ in range(total - room):
        count, negated = heapq.heappop(leaves)
        union = -negated
        kept[union] = False
        for part in made_of[union]:
            use[part] += count
            users[part] -= 1
            if not users[part] and part in made_of:
                heapq.heappush(leaves, (use[part], -part))
    return np.flatnonzero(kept)


def _parts(source: ByteLevelBPE) -> tuple[dict[int, list[int]], list[int]]:
    """Of each merged token the parts of all its merges, and of each token how often it is such a part."""
    made_of: dict[int, list[int]] = {}
    users = [0] * len(source.tokens)
    for left, right, union in source.merges:
        made_of.setdefault(union, []).extend((left, right))
        users[left] += 1
        users[right] += 1
    return made_of, users


def subset(source: ByteLevelBPE, kept: np.ndarray) -> ByteLevelBPE:
    """``source`` with the tokens ``kept`` alone, renumbered without gaps in the order given."""
    new_id = {int(old): new for new, old in enumerate(kept)}
    merges = tuple(
        (new_id[left], new_id[right], new_id[union])
        for left, right, union in source.merges
        if left in new_id and right in new_id and union in new_id
    )
    return ByteLevelBPE(tuple(source.tokens[old] for old in kept), merges, source.pre_tokenizer)
