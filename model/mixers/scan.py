"""Parts that chunked linear recurrences share: cutting into chunks, and carrying a state from chunk to chunk.

B batch, T time, C chunks, Q tokens a chunk, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def block_size(time: int, chunk_size: int) -> int:
    """The largest power of two up to ``chunk_size`` that does not pad a short sequence beyond need."""
    largest = 2 ** int(math.log2(chunk_size))
    return min(largest, max(1, 2 ** math.ceil(math.log2(time))))


def into_chunks(tensor: Tensor, chunk_size: int) -> Tensor:
    """(B, T, H, ...) to (B, C, H, Q, ...), zeros after the end: no input and, in log space, no decay."""
    missing = -tensor.shape[1] % chunk_size
    if missing:
        tensor = functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
    return tensor.unflatten(1, (-1, chunk_size)).transpose(2, 3)


def from_chunks(tensor: Tensor, time: int) -> Tensor:
    """(B, C, H, Q, ...) back to (B, T, H, ...)."""
    return tensor.transpose(2, 3).flatten(1, 2)[:, :time]


def carry_states(inputs: Tensor, decay: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each chunk, and after the last: S_(c+1) = decay_c S_c + inputs_c.

    ``inputs`` (B, C, H, ...) is what each chunk adds; ``decay`` broadcasts to it; ``initial`` (B, H, ...), or zeros.
    """
    state = torch.zeros_like(inputs[:, 0]) if initial is None else initial.to(inputs.dtype)
    before = []
    for added, kept in zip(inputs.unbind(1), decay.unbind(1), strict=True):
        before.append(state)
        state = added + kept * state
    return torch.stack(before, 1), state


def document_changes(doc_ids: Tensor | None, time: int) -> list[Tensor | None]:
    """For each of ``time`` tokens the rows (B,) whose document starts there, for recurrences that go token by token."""
    if doc_ids is None:
        return [None] * time
    changes = doc_ids[:, 1:] != doc_ids[:, :-1]
    return [None, *changes.unbind(1)]
