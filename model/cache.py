"""What decoding remembers: one state a layer, and how much of the sequence went by.

B batch, T time, H heads, P head_dim, S columns held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from model.boundaries import Layout, visible


@dataclasses.dataclass
class MixerState:
    """What one layer remembers; every tensor has the batch as its first axis. States carry no gradient."""

    def select(self, index: Tensor) -> None:
        """Make row i what row ``index[i]`` was (beam search, repeated prompts)."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value.index_select(0, index.to(value.device)))

    def held_bytes(self) -> int:
        """Bytes of all tensors held."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


@dataclasses.dataclass
class RecurrentState(MixerState):
    """The memory of a linear mixer: ``mixer_state`` in fp32, and its convolution's last inputs where it has one."""

    mixer_state: Tensor | None = None
    conv: Tensor | None = None


@dataclasses.dataclass
class KVState(MixerState):
    """Keys and values that later queries may see.

    Without a window that is all of them. With one it is the last ``window`` columns and, apart from them, the first
    ``global_tokens`` of the document, whose slot is their position. Buffers grow by doubling; a windowed one is
    compacted when full. Columns of padding have position -1.
    """

    window: int | None = None
    global_tokens: int = 0
    length: int = 0
    padded: bool = False
    keys: Tensor | None = None
    values: Tensor | None = None
    positions: Tensor | None = None
    global_keys: Tensor | None = None
    global_values: Tensor | None = None
    global_positions: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor, layout: Layout) -> None:
        """Remember ``keys`` and ``values`` (B, H, T, P), rotated already."""
        keys, values = keys.detach(), values.detach()
        positions = layout.positions.expand(keys.shape[0], -1)
        if layout.valid is not None:
            positions = torch.where(layout.valid, positions, -1)
            self.padded = True
        if self.global_tokens:
            self._append_globals(keys, values, positions)
        if self.window is not None and self.keys is None:
            keys, values, positions = (part[..., -self.window :, :] for part in (keys, values, positions[..., None]))
            positions = positions[..., 0]
        self._reserve(keys, values, positions)
        start, self.length = self.length, self.length + keys.shape[2]
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        self.positions[:, start : self.length] = positions

    def extend(self, keys: Tensor, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append, then give what the new tokens may see: keys and values (B, H, S, P) and the mask (B, 1, T, S).

        The mask is none where a single new token sees all columns of every row.
        """
        self.append(keys, values, layout)
        keys, values, positions = self._view(keys.shape[2])
        if layout.positions.shape[1] == 1 and self.window is None and not self.padded:
            return keys, values, None
        memo = ("cached", self.window, self.global_tokens)
        if memo not in layout.memo:
            layout.memo[memo] = self._mask(positions, layout)
        return keys, values, layout.memo[memo]

    def _view(self, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """The columns that any of the last ``queries`` tokens may see; position -1 where there is nothing to see."""
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        first = 0 if self.window is None else max(0, self.length - (self.window - 1 + queries))
        keys, values = self.keys[:, :, first : self.length], self.values[:, :, first : self.length]
        positions = self.positions[:, first : self.length]
        if self.global_keys is None or self.global_values is None or self.global_positions is None:
            return keys, values, positions
        count = self.global_tokens
        # A global token still inside the window is seen through its slot alone, never twice.
        positions = torch.where(positions < count, -1, positions)
        return (
            torch.cat([self.global_keys[:, :, :count], keys], 2),
            torch.cat([self.global_values[:, :, :count], values], 2),
            torch.cat([self.global_positions[:, :count], positions], 1),
        )

    def _mask(self, positions: Tensor, layout: Layout) -> Tensor:
        mask = visible(layout.positions, positions, self.window, self.global_tokens) & (positions >= 0)[:, None, :]
        if layout.valid is not None:
            # A padded query sees anything, so that its softmax stays finite; nothing reads what it gives.
            mask = mask | ~layout.valid[:, :, None]
        return mask[:, None]

    def _append_globals(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        count = self.global_tokens
        if self.global_keys is None:
            batch, heads, _, width = keys.shape
            self.global_keys = keys.new_zeros(batch, heads, count + 1, width)
            self.global_values = values.new_zeros(batch, heads, count + 1, values.shape[-1])
            self.global_positions = positions.new_full((batch, count + 1), -1)
        assert self.global_values is not None
        assert self.global_positions is not None
        # All other tokens go to a slot past the end that nobody reads: no data-dependent shapes, no synchronisation.
        slots = torch.where((positions >= 0) & (positions < count), positions, count)
        index = slots[:, None, :, None]
        self.global_keys.scatter_(2, index.expand_as(keys), keys)
        self.global_values.scatter_(2, index.expand_as(values), values)
        self.global_positions.scatter_(1, slots, positions)

    def _reserve(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        needed = self.length + keys.shape[2]
        if self.keys is not None and needed <= self.keys.shape[2]:
            return
        kept = self.length if self.window is None else min(self.length, self.window)
        room = max(2 * (kept + keys.shape[2]), 64)
        self.keys = _moved(self.keys, keys, 2, self.length, kept, room)
        self.values = _moved(self.values, values, 2, self.length, kept, room)
        self.positions = _moved(self.positions, positions, 1, self.length, kept, room)
        self.length = kept


State = TypeVar("State", bound=MixerState)


class HybridCache:
    """The states of all layers, as ``generate`` passes them from step to step.

    Recurrent states are kept in fp32; ``state_dtype`` stores them smaller between steps, at the price of drift.
    Rows may be reordered and repeated. A recurrent state cannot forget, so the cache cannot be cropped.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state_dtype: torch.dtype | None = None) -> None:
        self.state_dtype = state_dtype
        self.layers: dict[int, MixerState] = {}
        self.columns = 0
        self.tokens: Tensor | None = None
        """(B,), tokens seen by each row, padding left out."""

    def layer(self, index: int, create: Callable[[], State]) -> State:
        """The state of layer ``index``, created empty at first sight."""
        if index not in self.layers:
            self.layers[index] = create()
        return self.layers[index]  # type: ignore[return-value]

    def advance(self, layout: Layout, batch: int, time: int) -> None:
        """Count the ``time`` columns that every layer has taken in."""
        self.columns += time
        self.tokens = layout.positions[:, -1].expand(batch) + 1
        if layout.valid is not None:
            self.tokens = torch.where(layout.valid.any(1), self.tokens, 0 * self.tokens)
        if self.state_dtype is not None:
            for state in self.layers.values():
                if isinstance(state, RecurrentState) and state.mixer_state is not None:
                    state.mixer_state = state.mixer_state.to(self.state_dtype)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns taken in so far, padding included: the length of the attention mask that goes with them."""
        return self.columns

    def held_bytes(self) -> int:
        """Bytes of all states."""
        return sum(state.held_bytes() for state in self.layers.values())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was."""
        for state in self.layers.values():
            state.select(beam_idx)
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, beam_idx.to(self.tokens.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies side by side."""
        if self.tokens is not None:
            rows = torch.arange(self.tokens.shape[0], device=self.tokens.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Refuse to drop tokens.

        Raises:
            ValueError: if fewer columns than seen are asked for, since a recurrent state has no way back.
        """
        if max_length < self.columns:
            raise ValueError(
                f"field max_length must be at least the {self.columns} columns seen; got {max_length}; "
                "start a new HybridCache and prefill the shorter prompt"
            )


def _moved(old: Tensor | None, like: Tensor, axis: int, length: int, kept: int, room: int) -> Tensor:
    shape = list(like.shape)
    shape[axis] = room
    new = like.new_zeros(shape)
    if old is not None:
        new.narrow(axis, 0, kept).copy_(old.narrow(axis, length - kept, kept))
    return new
