"""Our scan's kernels, interpreted, against the plain recurrence in fp64: output and all gradients (traps K1, K3).

B batch, T time, H heads, P head_dim, G groups, N d_state. The interpreter's bf16 products are wrong, so these run in
fp32; bf16 on a GPU is tests/test_gpu_kernels.py's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import layout_of
from torch import Tensor
from triton_cases import kernels

from model.kernels.ssd_triton import Plan, plan_for, ssd_backward, ssd_forward
from model.kernels.tiles import Tiles
from model.mixers.mamba2 import ssd_recurrence

SMALL = Plan(scan=Tiles(width=64), states=Tiles(width=64), size=16, backward_size=16, heads_per_block=2)
"""Chunks, columns and blocks of heads small enough that few tokens meet every border."""
TIME = 53
PACKED = [[5] * 3 + [7] + [2] + [5] * 11 + [4] * 4 + [2] * 2 + [5] * 29 + [9] * 2]
"""Documents of one token, numbers that come back, one that begins with a chunk, and one that holds a whole chunk after
a chunk of several."""
Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def interpreted():
    kernels("ssd_triton")


def draw(heads: int, width: int, groups: int, states: int, decay: float = 0.5, time: int = TIME) -> dict[str, Any]:
    """x, B and C are views of one buffer; steps differ everywhere, one of them is zero."""
    generator = torch.Generator().manual_seed(heads + width + states)
    buffer = torch.randn(1, time, heads * width + 2 * groups * states, generator=generator)
    x, b, c = buffer.split([heads * width, groups * states, groups * states], -1)
    step = torch.rand(1, time, heads, generator=generator)
    step[0, time // 2, 0] = 0.0
    return {
        "x": x.unflatten(-1, (heads, width)),
        "step": step,
        "rate": -decay * (0.1 + torch.rand(heads, generator=generator)),
        "b": b.unflatten(-1, (groups, states)),
        "c": c.unflatten(-1, (groups, states)),
        "skip": torch.randn(heads, generator=generator),
        "seq_idx": None,
    }


def packed(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"seq_idx": torch.tensor(PACKED, dtype=torch.int32)}


def weights(inputs: dict[str, Any]) -> Tensor:
    return torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1))


def ours(inputs: dict[str, Any], plan: Plan = SMALL) -> Results:
    """Results in buffers that held nothing finite before."""
    x, b, c = (inputs[name] for name in ("x", "b", "c"))
    holder = torch.full((*x.shape[:2], x[0, 0].numel() + 2 * b[0, 0].numel()), float("nan"))
    places = holder.split([x[0, 0].numel(), b[0, 0].numel(), c[0, 0].numel()], -1)
    d_x, d_b, d_c = (place.unflatten(-1, part.shape[2:]) for place, part in zip(places, (x, b, c), strict=True))
    y = ssd_forward(*inputs.values(), y=torch.full(x.shape, float("nan")), plan=plan)
    d_step, d_rate, d_skip = ssd_backward(weights(inputs), *inputs.values(), d_x, d_b, d_c, plan=plan)
    return {"y": y, "d_x": d_x, "d_step": d_step, "d_rate": d_rate, "d_b": d_b, "d_c": d_c, "d_skip": d_skip}


def recurrence(inputs: dict[str, Any]) -> Results:
    names = ("x", "step", "rate", "b", "c", "skip")
    leaf = {name: inputs[name].double().detach().clone().requires_grad_() for name in names}
    x, step, seq_idx = leaf["x"], leaf["step"], inputs["seq_idx"]
    rows = layout_of(*x.shape[:2], **({} if seq_idx is None else {"seq_idx": seq_idx.long()}))
    y, _ = ssd_recurrence(x * step[..., None], leaf["rate"] * step, leaf["b"], leaf["c"], rows, None, 64)
    y = y + leaf["skip"][:, None] * x
    y.backward(weights(inputs).double())
    return {"y": y.detach()} | {f"d_{name}": leaf[name].grad for name in names}  # type: ignore[dict-item]


def faults(got: Results, wanted: Results, inputs: dict[str, Any], largest_sum: float) -> dict[str, float]:
    """Results off by more than an exponent's rounding at running sums of up to ``largest_sum``, over some 2^4 terms.

    What decays weigh can cancel to almost nothing, so the gradient of rate is held against what it is summed from.
    """
    allowed = 16 * torch.finfo(torch.float32).eps * max(largest_sum, 4.0)
    passed = (weights(inputs) * wanted["y"]).abs().sum(-1)
    sizes = {name: right.norm() for name, right in wanted.items()} | {"d_rate": (inputs["step"] * passed).sum()}
    gaps = {name: float((got[name].double() - right).norm() / sizes[name]) for name, right in wanted.items()}
    return {name: gap for name, gap in gaps.items() if not gap <= allowed}


@pytest.mark.parametrize(
    ("heads", "width", "groups", "states"), [(2, 16, 1, 16), (4, 16, 2, 16), (1, 64, 1, 128), (1, 128, 1, 64)]
)
@pytest.mark.parametrize("dress", [dict, packed])
def test_the_scan_equals_the_recurrence_in_outputs_and_gradients(heads, width, groups, states, dress):  # traps K1, K3
    inputs = dress(draw(heads, width, groups, states))
    assert faults(ours(inputs), recurrence(inputs), inputs, largest_sum=16.0) == {}


@pytest.mark.parametrize("dress", [dict, packed])
def test_strong_decays_neither_overflow_nor_lose_weak_ones(dress):
    inputs = dress(draw(2, 16, 1, 16, decay=300.0))
    inputs["step"][:, 1::2] *= 1e-3
    assert faults(ours(inputs), recurrence(inputs), inputs, largest_sum=64.0 * SMALL.size) == {}


@pytest.mark.parametrize("time", [1, 16])
def test_sequences_end_anywhere(time):
    inputs = draw(2, 16, 1, 16, time=time)
    assert faults(ours(inputs), recurrence(inputs), inputs, largest_sum=16.0) == {}


@pytest.mark.parametrize("change", [{"size": 32}, {"backward_size": 32}])
def test_results_do_not_hang_on_how_they_are_cut(change):
    inputs = packed(draw(3, 32, 1, 16))
    plan = replace(SMALL, scan=Tiles(width=16), states=Tiles(width=16), **change)
    assert faults(ours(inputs, plan), recurrence(inputs), inputs, largest_sum=32.0) == {}


def test_a_document_leaves_no_trace_in_another():  # trap K3
    inputs = packed(draw(2, 16, 1, 16))
    before = ours(inputs)
    changed = dict(inputs)
    for name in ("x", "step", "b", "c"):
        changed[name] = inputs[name].clone()
        changed[name][0, 22:51] += 3.0
    after = ours(changed)
    for name in ("y", "d_x", "d_step", "d_b", "d_c"):
        assert torch.equal(before[name][0, :22], after[name][0, :22]), name
        assert torch.equal(before[name][0, 51:], after[name][0, 51:]), name
        assert not torch.equal(before[name][0, 22:51], after[name][0, 22:51]), name


WRONG = {
    "decays of another head": lambda inputs: {"rate": inputs["rate"].flip(0)},
    "steps of another head": lambda inputs: {"step": inputs["step"].flip(2)},
    "states turned round": lambda inputs: {"c": inputs["c"].flip(3)},
    "a boundary one token late": lambda inputs: {"seq_idx": inputs["seq_idx"].roll(1, 1)},
    "no boundaries": lambda inputs: {"seq_idx": None},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_is_caught(name):  # traps K1, K3
    inputs = packed(draw(2, 16, 1, 16))
    found = faults(ours(inputs | WRONG[name](inputs)), recurrence(inputs), inputs, largest_sum=16.0)
    assert {"y", "d_x", "d_b"} <= set(found)


def test_the_shipped_plan_cuts_every_head_into_whole_parts():
    for head_dim in (64, 128):
        plan = plan_for(head_dim, 128)
        assert head_dim % plan.scan.width == head_dim % plan.states.width == 0
