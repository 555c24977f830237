"""Where documents begin and which tokens are padding: one representation for every mixer.

Shapes: B batch, T time, n documents of a packed row, Q tokens a chunk, C chunks.

Worked row, two documents and then two tokens of padding::

    seq_idx    7 7 7 4 4 - -      any number that changes where a document starts
    doc_ids    0 0 0 1 1 1 1      counts those changes, so no number comes back; padding joins the document before
    positions  0 1 2 0 1 - -      restarts with each document
    valid      1 1 1 1 1 0 0
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class ChunkMasks:
    """Which pairs of a packed row cut into chunks share a document; every entry is a bool tensor.

    ``pairs`` (B, C, Q, Q): query and key tokens of one chunk. ``head`` (B, C, Q): the token and the last token of the
    chunk before. ``tail`` (B, C, Q): the token and the last of its own chunk. ``through`` (B, C): the last tokens of
    the chunk before and of this one, so whether a state passes through the whole chunk.
    """

    pairs: Tensor
    head: Tensor
    tail: Tensor
    through: Tensor


@dataclasses.dataclass
class Layout:
    """Positions, documents and padding of one forward pass; masks are built once and shared by the layers.

    ``positions`` (B or 1, T): place of a token in its document. ``doc_ids`` (B, T), never falling along a row, or none
    where every row is one document. ``valid`` (B, T), false at padding, or none where nothing is padded.
    """

    positions: Tensor
    doc_ids: Tensor | None = None
    valid: Tensor | None = None
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def chunk_masks(self, chunk_size: int) -> ChunkMasks | None:
        """The masks for chunks of ``chunk_size`` tokens, or none where no row holds two documents."""
        if self.doc_ids is None:
            return None
        key = ("chunks", chunk_size)
        if key not in self.memo:
            self.memo[key] = _chunk_masks(self.doc_ids, chunk_size)
        return self.memo[key]

    def same_document(self, shift: int) -> Tensor | None:
        """(B, T), whether the token ``shift`` places before belongs to the same document; none where all do."""
        if self.doc_ids is None:
            return None
        key = ("shift", shift)
        if key not in self.memo:
            before = functional.pad(self.doc_ids, (shift, 0), value=-1)[:, : self.doc_ids.shape[1]]
            self.memo[key] = before == self.doc_ids
        return self.memo[key]

    def attention_mask(self, window: int | None, global_tokens: int) -> Tensor | None:
        """(B or 1, 1, T, T), true where a query may look; none where plain causality says it all."""
        if self.doc_ids is None and self.valid is None and (window is None or window >= self.positions.shape[1]):
            return None
        key = ("attention", window, global_tokens)
        if key not in self.memo:
            self.memo[key] = self._attention_mask(window, global_tokens)
        return self.memo[key]

    def _attention_mask(self, window: int | None, global_tokens: int) -> Tensor:
        positions = self.positions
        mask = visible(positions, positions, window, global_tokens)
        order = torch.arange(positions.shape[1], device=positions.device)
        mask = mask & (order[:, None] >= order)
        if self.doc_ids is not None:
            mask = mask & (self.doc_ids[:, :, None] == self.doc_ids[:, None, :])
        if self.valid is not None:
            # A padded query sees itself, so that its softmax stays finite; nothing reads what it gives.
            mask = (mask & self.valid[:, None, :]) | (order[:, None] == order)
        return mask[:, None]


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None, global_tokens: int) -> Tensor:
    """(B, Tq, Tk), whether a key lies before a query of its document, and in its window or the global tokens."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    causal = distance >= 0
    if window is None:
        return causal
    return causal & ((distance < window) | (key_positions < global_tokens)[:, None, :])


def resolve_layout(
    batch: int,
    time: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    past: int | None = None,
    past_tokens: Tensor | None = None,
) -> Layout:
    """One ``Layout`` from whichever description of the rows the caller has.

    ``attention_mask`` (B, past + T), 0 at padding; ``position_ids`` (B or 1, T); ``seq_idx`` (B or 1, T);
    ``cu_seq_lens`` (n + 1,), document edges of a single row; ``past``, columns that a cache has seen, none without a
    cache; ``past_tokens`` (B,), those of them that were no padding. Documents come from ``seq_idx``, else
    ``cu_seq_lens``, else from where ``position_ids`` do not count on from the token before.
    Padding neither joins two documents nor parts one.

    Raises:
        ValueError: for a mask or ids of another shape, for packed documents beside a cache, and for padding to the
            right of tokens beside a cache.
    """
    valid = _valid(attention_mask, batch, time, past or 0)
    doc_ids = _documents(batch, time, position_ids, seq_idx, cu_seq_lens, valid)
    if past is not None:
        _refuse_beside_cache(doc_ids, valid, past_tokens)
    if position_ids is not None:
        positions = position_ids.expand(batch, time)
    elif doc_ids is not None:
        positions = _restarting_positions(doc_ids, valid)
    else:
        positions = _counted_positions(time, device, valid, past_tokens)
    return Layout(positions, doc_ids, valid)


def _refuse_beside_cache(doc_ids: Tensor | None, valid: Tensor | None, past_tokens: Tensor | None) -> None:
    if doc_ids is not None:
        raise ValueError(
            "field seq_idx (or position_ids, cu_seq_lens) must describe one document a row beside a cache; "
            "got packed documents; set use_cache=False, or give each document a row of its own"
        )
    if valid is None:
        return
    started = valid[:, :1] if past_tokens is None else valid[:, :1] | (past_tokens > 0)[:, None]
    if bool((torch.cat([started, valid[:, :-1]], 1) & ~valid).any()):
        raise ValueError(
            "field attention_mask must pad on the left beside a cache; got padding after a token; "
            "set padding_side='left' on the tokenizer"
        )


def _valid(attention_mask: Tensor | None, batch: int, time: int, past: int) -> Tensor | None:
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) not in {(batch, time), (batch, past + time)}:
        raise ValueError(
            f"field attention_mask must be (batch, past + time) = ({batch}, {past + time}); "
            f"got {tuple(attention_mask.shape)}; set 1 at tokens and 0 at padding"
        )
    valid = attention_mask[:, -time:].bool()
    return None if bool(valid.all()) else valid


def _documents(
    batch: int,
    time: int,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | None,
    valid: Tensor | None,
) -> Tensor | None:
    """Running number of each token's document (B, T); none where no row holds two. Padding joins the document before.

    Numbers count changes from token to token: an id that comes back later names a new document.
    """
    if seq_idx is not None:
        ids = _shaped("seq_idx", seq_idx, batch, time)
    elif cu_seq_lens is not None:
        ids = _documents_of_edges(cu_seq_lens, batch, time)
    elif position_ids is not None:
        ids = _shaped("position_ids", position_ids, batch, time)
    else:
        return None
    previous, distance = _previous_tokens(ids, valid)
    starts = ids != previous
    if seq_idx is None and cu_seq_lens is None:
        # Positions may have counted the padding between two tokens, or not.
        starts = (ids != previous + 1) & (ids != previous + distance)
    starts = starts & (distance <= torch.arange(time, device=ids.device))
    if valid is not None:
        starts = starts & valid
    return starts.cumsum(1) if bool(starts.any()) else None


def _previous_tokens(ids: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Id of the last token before each column, padding left out, and how many columns back it is (B or 1, T).

    Where there is none, the distance reaches beyond the row, and the id means nothing.
    """
    index = torch.arange(ids.shape[1], device=ids.device)[None]
    tokens = index if valid is None else torch.where(valid, index, -1).cummax(1).values
    before = functional.pad(tokens[:, :-1], (1, 0), value=-1)
    return ids.gather(1, before.clamp(min=0).expand_as(ids)), index - before


def _shaped(name: str, ids: Tensor, batch: int, time: int) -> Tensor:
    if ids.dim() != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != time:
        raise ValueError(f"field {name} must be (batch, time) = ({batch}, {time}); got {tuple(ids.shape)}")
    return ids.expand(batch, time)


def _documents_of_edges(cu_seq_lens: Tensor, batch: int, time: int) -> Tensor:
    if batch != 1 or cu_seq_lens.dim() != 1:
        raise ValueError(
            f"field cu_seq_lens must be one list of edges beside a single row; got {tuple(cu_seq_lens.shape)} "
            f"and batch {batch}; set position_ids or seq_idx for several rows"
        )
    if int(cu_seq_lens[0]) != 0 or int(cu_seq_lens[-1]) != time:
        raise ValueError(f"field cu_seq_lens must run from 0 to the row's {time} tokens; got {cu_seq_lens.tolist()}")
    index = torch.arange(time, device=cu_seq_lens.device)
    return torch.searchsorted(cu_seq_lens[1:].long(), index, right=True)[None]


def _restarting_positions(doc_ids: Tensor, valid: Tensor | None) -> Tensor:
    count = (torch.ones_like(doc_ids) if valid is None else valid.long()).cumsum(1) - 1
    starts = functional.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=False)
    return (count - torch.where(starts, count, 0).cummax(1).values).clamp(min=0)


def _counted_positions(time: int, device: torch.device, valid: Tensor | None, past_tokens: Tensor | None) -> Tensor:
    seen = torch.ones(1, time, device=device) if valid is None else valid
    start = -1 if past_tokens is None else past_tokens[:, None] - 1
    return (seen.long().cumsum(1) + start).clamp(min=0)


def _chunk_masks(doc_ids: Tensor, chunk_size: int) -> ChunkMasks:
    batch, time = doc_ids.shape
    filler = doc_ids[:, -1:].expand(batch, -time % chunk_size)
    chunks = torch.cat([doc_ids, filler], 1).view(batch, -1, chunk_size)  # (B, C, Q)
    last = chunks[:, :, -1]
    # The first chunk has none before it; its carried state is zero, whatever the mask says.
    before = torch.cat([chunks[:, :1, 0], last[:, :-1]], 1)
    return ChunkMasks(
        pairs=chunks[:, :, :, None] == chunks[:, :, None, :],
        head=chunks == before[:, :, None],
        tail=chunks == last[:, :, None],
        through=last == before,
    )
