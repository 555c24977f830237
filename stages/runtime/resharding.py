"""A checkpoint of another number of ranks: DeepSpeed's parts of the optimizer's state, put together and cut anew.

DeepSpeed 0.19 loads a ZeRO checkpoint on as many ranks as saved it. Its parts are slices of flat tensors, so what a
rank of another number needs is found by arithmetic; moments keep their bits. Weights and the state of ZeRO-0 are whole.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from stages.runtime import distributed, flat
from stages.runtime.optimizer_8bit import BLOCK, _code_books, blocked

Part = dict[str, Any]
"""What one rank saved of the optimizer."""


def load(engine: Any, optimizer: torch.optim.Optimizer, folder: Path, saved: int) -> None:
    """Take up the weights and optimizer state in ``folder``, which ``saved`` ranks wrote under the same ZeRO stage.

    Each rank reads the parts one after another. Counts of micro-steps begin anew: saves are between steps.
    """

    def read(name: str) -> Any:
        return engine.checkpoint_engine.load(str(folder / name), map_location="cpu")

    def parts() -> Iterator[Part]:
        for rank in range(saved):
            yield read(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]

    if engine.zero_optimization_stage() == 3:
        _load_zero3(engine.optimizer, parts, saved)
        return
    weights = read("mp_rank_00_model_states.pt")
    engine.module.load_state_dict(weights["module"])
    engine.optimizer.refresh_fp32_params()
    optimizer.load_state_dict(_state_dict(optimizer, _zero12_states(engine.optimizer, parts, saved)))


def _state_dict(optimizer: torch.optim.Optimizer, states: Sequence[Part]) -> Part:
    """``states`` of the optimizer's tensors, in their order, in torch's form."""
    return {"state": dict(enumerate(states)), "param_groups": optimizer.state_dict()["param_groups"]}


def _zero12_states(zero: Any, parts: Callable[[], Iterator[Part]], saved: int) -> list[Part]:
    """The state of each group's flat tensor on this rank."""
    groups = [_Group(zero, index, saved) for index in range(len(zero.single_partition_of_fp32_groups))]
    for rank, part in enumerate(parts()):
        base = part["base_optimizer_state"]
        for group, numbers in zip(groups, base["param_groups"], strict=True):
            group.take(rank, base["state"].get(numbers["params"][0], {}))
    return [group.state() for group in groups]


class _Group:
    """One parameter group's state, while it is put together from the parts."""

    def __init__(self, zero: Any, index: int, saved: int) -> None:
        parameters = zero.round_robin_bit16_groups[index]
        self.shapes = [tuple(parameter.shape) for parameter in parameters]
        numels = [parameter.numel() for parameter in parameters]
        self.offsets = list(itertools.accumulate(numels, initial=0))[:-1]
        assert self.offsets == list(zero.round_robin_bit16_offsets[index]), "parameters lie side by side"
        self.size = int(zero.partition_size[index])
        # Parts are padded to a multiple of what NCCL likes, as DeepSpeed did when it saved.
        align = int(zero.nccl_start_alignment_factor)
        self.old_size = -(-sum(numels) // (align * saved)) * align
        self.begin = distributed.rank() * self.size
        self.found: Part = {}

    def take(self, rank: int, state: Part) -> None:
        """Add what saved rank ``rank`` knows of this rank's slice."""
        first = max(self.begin, rank * self.old_size)
        last = min(self.begin + self.size, (rank + 1) * self.old_size)
        if "scales1" in state:
            state = state | {name: self._spread(rank, state[name]) for name in ("scales1", "scales2")}
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.numel() != self.old_size:
                self.found.setdefault(name, value)
                continue
            mine = self.found.setdefault(name, value.new_zeros(self.size))
            if first < last:
                here = slice(first - rank * self.old_size, last - rank * self.old_size)
                mine[first - self.begin : last - self.begin] = value[here]

    def state(self) -> Part:
        """The state as the optimizer has it."""
        if "scales1" not in self.found:
            return self.found
        spans = blocked(flat.partition(self.shapes, self.offsets, self.size, distributed.rank()))
        books = _code_books(torch.device("cpu"))
        for number, book in zip("12", books, strict=True):
            codes, scales = self.found[f"codes{number}"], self.found[f"scales{number}"]
            self.found[f"scales{number}"] = rescaled(codes, scales, spans, book)
        return self.found

    def _spread(self, rank: int, scales: torch.Tensor) -> torch.Tensor:
        """One scale an element instead of one a block."""
        spread = scales.new_zeros(self.old_size)
        for span in blocked(flat.partition(self.shapes, self.offsets, self.old_size, rank)):
            blocks = scales[span.scale : span.scale - (-span.numel // BLOCK)]
            spread[span.at : span.at + span.numel] = blocks.repeat_interleave(BLOCK)[: span.numel]
        return spread


def rescaled(codes: torch.Tensor, scales: torch.Tensor, spans: Sequence[Any], book: torch.Tensor) -> torch.Tensor:
    """One scale a block of ``spans``, from one an element; codes are changed in place where a block has two scales.

    Two ranks that each held a part of a block had a scale of their own. Joined, its values are rounded to the larger.
    """
    found = []
    for span in spans:
        tail = span.numel % BLOCK
        for at, numel, width in ((span.at, span.numel - tail, BLOCK), (span.at + span.numel - tail, tail, tail)):
            if numel:
                rows = slice(at, at + numel)
                found.append(_rescaled_rows(codes[rows].view(-1, width), scales[rows].view(-1, width), book))
    return torch.cat(found) if found else scales.new_zeros(0)


def _rescaled_rows(codes: torch.Tensor, scales: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """The scale of each row, which is a block."""
    largest = scales.amax(1)
    for row in (scales.amin(1) != largest).nonzero().flatten().tolist():
        values = book[codes[row].long()] * scales[row]
        largest[row] = values.abs().max()
        nearest = torch.bucketize(values / largest[row].clamp_min(1e-38), (book[1:] + book[:-1]) / 2)
        codes[row] = nearest.to(codes.dtype)
    return largest


def _load_zero3(zero: Any, parts: Callable[[], Iterator[Part]], saved: int) -> None:
    """ZeRO-3 cuts every parameter for itself; a rank's pieces stand one after another in its sub-groups' tensors."""
    numels = [[int(parameter.ds_numel) for parameter in group] for group in zero.fp16_groups]
    whole: list[list[Part]] = []
    common: Part = {}
    for part in parts():
        base = part.pop("optimizer_state_dict")["state"]
        tensors = part.pop("fp32_flat_groups")
        common = common or part
        whole.append([{**base.get(number, {}), "weights": tensors[number].detach()} for number in range(len(tensors))])
    states: list[Part] = [{} for _ in numels]
    for name, example in whole[0][0].items():
        if isinstance(example, torch.Tensor) and example.numel() == whole[0][0]["weights"].numel():
            # The saved sub-groups may have been cut elsewhere, since their bound is on a rank's share.
            rows = [torch.cat([group[name] for group in rank]) for rank in whole]
            values: Iterable[Any] = _recut(rows, numels, saved)
        else:
            # Each its own: counts of steps are tensors, which are added to in place.
            values = [copy.deepcopy(example) for _ in states]
        for state, value in zip(states, values, strict=True):
            state[name] = value
    weights = [state.pop("weights") for state in states]
    zero.checkpoint_event_prologue()
    zero._set_fp32_optimizer_param_groups()
    groups = zero.optimizer.state_dict()["param_groups"]
    zero._clear_fp32_optimizer_param_groups()
    state_dict = {"state": dict(enumerate(states)), "param_groups": groups}
    zero._rigid_load_state_dict(common | {"optimizer_state_dict": state_dict, "fp32_flat_groups": weights})
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    zero.checkpoint_event_epilogue()


def _recut(rows: Sequence[torch.Tensor], numels: Sequence[Sequence[int]], saved: int) -> Iterator[torch.Tensor]:
    """This rank's flat tensor of each sub-group, from every saved rank's pieces (``rows``) of all parameters."""
    rank, ranks = distributed.rank(), distributed.world_size()
    at = 0
    for group in numels:
        pieces = []
        for numel in group:
            old, new = -(-numel // saved), -(-numel // ranks)
            joined = torch.cat([row[at : at + old] for row in rows])[:numel]
            at += old
            piece = joined[rank * new : (rank + 1) * new]
            pieces.append(torch.nn.functional.pad(piece, (0, new - piece.numel())))
        yield torch.cat(pieces)
