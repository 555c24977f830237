"""Our gated linear attention's kernels, interpreted, against the plain recurrence in fp64 (traps K1, K3).

B batch, T time, H heads, K head_k_dim, V head_v_dim. The interpreter's bf16 products are wrong, so these run in fp32;
bf16 on a GPU is tests/test_gpu_kernels.py's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import layout_of
from torch import Tensor
from triton_cases import kernels

from model.kernels.gla_triton import Plan, gla_backward, gla_forward
from model.kernels.rows import document_edges
from model.kernels.tiles import Tiles
from model.mixers.gla import gla_recurrence

SMALL = Plan(states=Tiles(width=64), keys=Tiles(width=64), size=16)
"""Chunks small enough that few tokens meet every border."""
LENGTHS = [3, 1, 16, 17]
"""Documents of one token, of one chunk, and of one token more."""
TIME = sum(LENGTHS)
SCALE = 0.25
Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def interpreted():
    kernels("gla_triton")


def draw(heads: int, keys: int, values: int, decay: float = 0.5, batch: int = 1) -> dict[str, Any]:
    """Decays differ everywhere; one token keeps everything."""
    generator = torch.Generator().manual_seed(heads + keys + values)
    q, k, v, gate = (
        torch.randn(batch, TIME, heads, width, generator=generator) for width in (keys, keys, values, keys)
    )
    log_decay = -decay * gate.exp()
    log_decay[0, TIME // 2] = 0.0
    return {"q": q, "k": k, "v": v, "log_decay": log_decay, "ids": None}


def packed(inputs: dict[str, Any]) -> dict[str, Any]:
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    return inputs | {"ids": ids.expand(inputs["q"].shape[0], -1)}


def weights(inputs: dict[str, Any]) -> Tensor:
    return torch.randn(inputs["v"].shape, generator=torch.Generator().manual_seed(1))


def rows_of(inputs: dict[str, Any]) -> Any:
    return layout_of(*inputs["q"].shape[:2], **({} if inputs["ids"] is None else {"seq_idx": inputs["ids"]}))


def ours(inputs: dict[str, Any], plan: Plan = SMALL) -> Results:
    tensors = [inputs[name] for name in ("q", "k", "v", "log_decay")]
    edges = None if inputs["ids"] is None else document_edges(rows_of(inputs), *inputs["q"].shape[:2])
    o, sums, scores = gla_forward(*tensors, edges, SCALE, plan)
    d_q, d_k, d_v, d_decay = gla_backward(weights(inputs), *tensors[:3], sums, scores, edges, SCALE, plan)
    return {"o": o, "d_q": d_q, "d_k": d_k, "d_v": d_v, "d_log_decay": d_decay}


def recurrence(inputs: dict[str, Any]) -> Results:
    names = ("q", "k", "v", "log_decay")
    leaf = {name: inputs[name].double().clone().requires_grad_() for name in names}
    o, _ = gla_recurrence(SCALE * leaf["q"], leaf["k"], leaf["v"], leaf["log_decay"], rows_of(inputs), None, 64)
    o.backward(weights(inputs).double())
    return {"o": o.detach()} | {f"d_{name}": leaf[name].grad for name in names}  # type: ignore[dict-item]


def faults(got: Results, wanted: Results, largest_sum: float) -> dict[str, float]:
    """Results off by more than an exponent's rounding at running sums of up to ``largest_sum``, over some 2^4 terms."""
    allowed = 16 * torch.finfo(torch.float32).eps * max(largest_sum, 4.0)
    gaps = {name: float((got[name].double() - right).norm() / right.norm()) for name, right in wanted.items()}
    return {name: gap for name, gap in gaps.items() if not gap <= allowed}


@pytest.mark.parametrize(
    ("heads", "keys", "values", "dress"), [(2, 16, 32, dict), (2, 16, 32, packed), (1, 64, 128, packed)]
)
def test_it_equals_the_recurrence_in_outputs_and_gradients(heads, keys, values, dress):  # traps K1, K3
    inputs = dress(draw(heads, keys, values))
    assert faults(ours(inputs), recurrence(inputs), largest_sum=16.0) == {}


@pytest.mark.parametrize("dress", [dict, packed])
def test_strong_decays_neither_overflow_nor_lose_weak_ones(dress):
    inputs = dress(draw(1, 16, 16, decay=300.0))
    inputs["log_decay"][:, 1::2] *= 1e-4
    assert faults(ours(inputs), recurrence(inputs), largest_sum=64.0 * SMALL.size) == {}


@pytest.mark.parametrize(
    "change", [{"size": 64}, {"states": Tiles(width=16), "keys": Tiles(width=16)}, {"wide_reach": 1}]
)
def test_results_do_not_hang_on_how_they_are_cut(change):
    inputs = packed(draw(1, 32, 16, batch=2))
    assert faults(ours(inputs, replace(SMALL, **change)), recurrence(inputs), largest_sum=64.0) == {}


def test_a_document_leaves_no_trace_in_another():  # trap K3
    inputs = packed(draw(1, 16, 16))
    before = ours(inputs)
    changed = dict(inputs)
    for name in ("q", "k", "v", "log_decay"):
        changed[name] = inputs[name].clone()
        changed[name][0, 4:20] *= 3.0
    after = ours(changed)
    for name in before:
        assert torch.equal(before[name][0, :4], after[name][0, :4]), name
        assert torch.equal(before[name][0, 20:], after[name][0, 20:]), name
        assert not torch.equal(before[name][0, 4:20], after[name][0, 4:20]), name


WRONG = {
    "decays of another head": lambda inputs: {"log_decay": inputs["log_decay"].flip(2)},
    "decays of another channel": lambda inputs: {"log_decay": inputs["log_decay"].flip(3)},
    "keys turned round": lambda inputs: {"k": inputs["k"].flip(3)},
    "a boundary one token late": lambda inputs: {"ids": inputs["ids"].roll(1, 1)},
    "no boundaries": lambda inputs: {"ids": None},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_is_caught(name):  # traps K1, K3
    inputs = packed(draw(2, 16, 16))
    found = faults(ours(inputs | WRONG[name](inputs)), recurrence(inputs), largest_sum=16.0)
    assert {"o", "d_q", "d_v"} <= set(found)
