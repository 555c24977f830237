"""Every mixer's fast path against its recurrence, and the recurrences against sums written out (trap K1)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from model_cases import CASES, Case, layout_of, packed_ids, relative_gap, tiny_mixer, tolerance
from torch import Tensor

from model.boundaries import Layout
from model.cache import RecurrentState
from model.mixers import MIXERS, Mixer
from model.mixers.attention import attend_by_query
from model.mixers.gla import gla_chunked, gla_recurrence
from model.mixers.mamba2 import ssd_chunked, ssd_recurrence

CASE_IDS = [str(case) for case in CASES]
each_case = pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
LENGTHS = {"one_document": None, "packed": [7, 1, 16, 19]}
TIME = 43


def run(mixer: Mixer, backend: str, layout: Layout, *, with_state: bool) -> dict[str, Tensor]:
    """Output, state and every gradient of one pass over fixed random inputs."""
    mixer.use_backend(backend)
    generator = torch.Generator().manual_seed(3)
    dtype = next(mixer.parameters()).dtype
    x = torch.randn(2, TIME, 32, generator=generator).to(dtype).requires_grad_()
    state = mixer.new_state() if with_state else None
    y = mixer(x, layout, state)
    weights = torch.randn(y.shape, generator=generator).to(dtype)
    mixer.zero_grad()
    (y * weights).sum().backward()
    assert x.grad is not None
    results = {"output": y, "input gradient": x.grad}
    results |= {f"gradient of {name}": p.grad for name, p in mixer.named_parameters() if p.grad is not None}
    assert len(results) == 2 + len(list(mixer.parameters())), "a parameter got no gradient"
    if isinstance(state, RecurrentState) and state.mixer_state is not None:
        results["state"] = state.mixer_state
    return results


def worst_gap(mixer: Mixer, described: dict[str, Any], *, with_state: bool = False) -> float:
    fast = run(mixer, "torch", layout_of(2, TIME, **described), with_state=with_state)
    slow = run(mixer, "reference", layout_of(2, TIME, **described), with_state=with_state)
    assert fast.keys() == slow.keys()
    return max(relative_gap(fast[name], slow[name]) for name in slow)


@each_case
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_fast_path_equals_recurrence_in_outputs_and_all_gradients(
    case: Case, lengths: list[int] | None, dtype: torch.dtype
) -> None:  # trap K1
    described = {} if lengths is None else {"seq_idx": packed_ids(lengths, 2)}
    assert worst_gap(tiny_mixer(case, dtype), described) < tolerance(dtype, TIME)


@each_case
def test_fast_path_leaves_the_state_of_the_recurrence(case: Case) -> None:  # trap K1
    assert worst_gap(tiny_mixer(case), {}, with_state=True) < tolerance(torch.float64, TIME)


def broken_cores(mixer: Mixer) -> dict[str, Any]:
    """Cores fed with one of their tensors reversed along one axis: wrong axis, wrong gate, wrong order."""
    core = mixer.backends["torch"]
    seen: dict[str, tuple[int, ...]] = {}

    def spy(*args: Any) -> Any:
        seen.update({name: tuple(arg.shape) for name, arg in named(core, args).items() if isinstance(arg, Tensor)})
        return core(*args)

    type(mixer).backends = {**mixer.backends, "spy": spy}
    run(mixer, "spy", layout_of(2, TIME), with_state=False)
    faults = [(name, axis) for name, shape in seen.items() for axis, size in enumerate(shape) if size > 1]
    return {f"{name} reversed on axis {axis}": reversed_core(core, name, axis) for name, axis in faults}


def named(core: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(inspect.signature(core).bind(*args).arguments)


def reversed_core(core: Any, name: str, axis: int) -> Any:
    def broken(*args: Any) -> Any:
        arguments = named(core, args)
        return core(**{**arguments, name: arguments[name].flip(axis)})

    return broken


@each_case
def test_comparison_notices_any_tensor_on_a_wrong_axis(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:  # trap K1
    mixer = tiny_mixer(case)
    monkeypatch.setattr(type(mixer), "backends", dict(mixer.backends))
    right = mixer.backends["torch"]
    faults = broken_cores(mixer)
    assert len(faults) >= 9
    missed = []
    for fault, core in faults.items():
        type(mixer).backends = {"torch": core, "reference": type(mixer).backends["reference"]}
        if worst_gap(mixer, {}) < 1e-3:
            missed.append(fault)
    type(mixer).backends = {"torch": right}
    assert not missed


@each_case
def test_comparison_notices_a_lost_boundary(case: Case) -> None:  # trap K1
    mixer = tiny_mixer(case)
    torn = run(mixer, "torch", layout_of(2, TIME), with_state=False)
    kept = run(mixer, "reference", layout_of(2, TIME, seq_idx=packed_ids([7, 1, 16, 19], 2)), with_state=False)
    assert relative_gap(torn["output"], kept["output"]) > 1e-3


@each_case
@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 33])
def test_any_length_equals_recurrence(case: Case, time: int) -> None:
    mixer = tiny_mixer(case)
    x = torch.randn(2, time, 32, dtype=torch.float64)
    with torch.no_grad():
        fast = mixer(x, layout_of(2, time))
        mixer.use_backend("reference")
        assert relative_gap(fast, mixer(x, layout_of(2, time))) < tolerance(torch.float64, time)


def test_mamba2_recurrence_is_the_sum_of_decayed_products() -> None:
    generator = torch.Generator().manual_seed(0)
    batch, time, heads, width, groups, states = 1, 6, 4, 3, 2, 5
    x, b, c = (
        torch.randn(batch, time, *shape, generator=generator, dtype=torch.float64)
        for shape in ((heads, width), (groups, states), (groups, states))
    )
    log_decay = -torch.rand(batch, time, heads, generator=generator, dtype=torch.float64)
    initial = torch.randn(batch, heads, width, states, generator=generator, dtype=torch.float64)
    y, _ = ssd_recurrence(x, log_decay, b, c, layout_of(batch, time), initial, 4)
    for t in range(time):
        for head in range(heads):
            group = head // (heads // groups)
            wanted = log_decay[0, : t + 1, head].sum().exp() * initial[0, head] @ c[0, t, group]
            for s in range(t + 1):
                gate = log_decay[0, s + 1 : t + 1, head].sum().exp()
                wanted = wanted + gate * (c[0, t, group] @ b[0, s, group]) * x[0, s, head]
            assert torch.allclose(y[0, t, head], wanted, rtol=0, atol=1e-13)


def test_gla_recurrence_decays_each_key_channel_by_its_own_gate() -> None:
    # Two tokens, two key channels with gates 1/2 and 1/4, one value channel.
    k = torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).view(1, 2, 1, 2)
    v = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    q = torch.tensor([[1.0, 1.0], [1.0, 3.0]]).view(1, 2, 1, 2)
    log_decay = torch.tensor([[0.9, 0.9], [0.5, 0.25]]).log().view(1, 2, 1, 2)
    o, state = gla_recurrence(q, k, v, log_decay, layout_of(1, 2), None, 4)
    # S_1 = (1, 10); S_2 = (1/2 + 200, 10/4 + 2000); o_1 = 11; o_2 = 200.5 + 3 * 2002.5
    assert torch.allclose(o.flatten(), torch.tensor([11.0, 6208.0]))
    assert torch.allclose(state.flatten(), torch.tensor([200.5, 2002.5]))


def test_attention_recurrence_is_a_softmax_over_the_tokens_before() -> None:
    q = torch.zeros(1, 2, 3, 4)
    v = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1).expand(1, 1, 3, 4)
    o = attend_by_query(q, torch.randn(1, 1, 3, 4), v, None)
    # Zero queries weigh all visible values alike: 1, (1 + 2) / 2, (1 + 2 + 6) / 3.
    assert torch.allclose(o[0, 0, :, 0], torch.tensor([1.0, 1.5, 3.0]))
    assert torch.equal(o[:, 0], o[:, 1])


RECURRENCES = {"ssd": (ssd_chunked, ssd_recurrence), "gla": (gla_chunked, gla_recurrence)}
DECAY_AT = {"ssd": 1, "gla": 3}
"""Which argument of the core holds the log decays."""
PACKED_LENGTHS = [30, 3, 37, 30]


def decayed_inputs(name: str, strong: float, every_token: bool) -> list[Tensor]:
    """Inputs of a core whose tokens, all or one in ten, decay by up to ``strong`` and the rest by up to 0.01."""
    generator = torch.Generator().manual_seed(0)
    widths = {"ssd": ((2, 8), (2,), (1, 8), (1, 8)), "gla": ((2, 8),) * 4}[name]
    inputs = [torch.randn(1, 100, *shape, generator=generator) for shape in widths]
    decay = inputs[DECAY_AT[name]]
    chosen = torch.rand(decay.shape, generator=generator) < (1.0 if every_token else 0.1)
    inputs[DECAY_AT[name]] = -torch.where(chosen, strong, 0.01) * torch.rand(decay.shape, generator=generator)
    return inputs


def core_results(core: Any, inputs: list[Tensor], layout: Layout, dtype: torch.dtype) -> list[Tensor]:
    """Output, last state and every gradient in fp64, computed in ``dtype``."""
    inputs = [part.to(dtype).requires_grad_() for part in inputs]
    output, state = core(*inputs, layout, None, 64)
    gradients = torch.autograd.grad(output.square().sum() + state.square().sum(), inputs)
    return [part.detach().double() for part in (output, state, *gradients)]


@pytest.mark.parametrize("name", RECURRENCES)
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
@pytest.mark.parametrize("every_token", [True, False], ids=["every_token", "some_tokens"])
@pytest.mark.parametrize("strong", [0.0, 1e-6, 3.0, 16.0, 60.0, 200.0, 2e3, 1e4])
def test_chunked_form_is_exact_at_any_decay(name: str, packed: bool, every_token: bool, strong: float) -> None:
    # At 1e4 every factor of exp(b_i) exp(-b_j) would overflow; at 1e-6 nothing decays; weak decays after strong ones
    # are lost where they are a difference of running sums.
    layout = layout_of(1, 100, **({"seq_idx": packed_ids(PACKED_LENGTHS)} if packed else {}))
    inputs = decayed_inputs(name, strong, every_token)
    chunked, recurrence = RECURRENCES[name]
    got = core_results(chunked, inputs, layout, torch.float32)
    wanted = core_results(recurrence, inputs, layout, torch.float64)
    # exp(-s) of a sum with relative error eps is off by s exp(-s) eps at most, which is below eps for every s: what is
    # left is the rounding of some hundred products, a squared one at the gradients, whatever the decay.
    for mine, right in zip(got, wanted, strict=True):
        assert relative_gap(mine, right) < 2 * 100**0.5 * torch.finfo(torch.float32).eps


def test_ssd_is_finite_at_decays_that_underflow() -> None:
    x, b, c = torch.randn(1, 40, 2, 4), torch.randn(1, 40, 1, 4), torch.randn(1, 40, 1, 4)
    log_decay = torch.full((1, 40, 2), -1e4, requires_grad=True)
    y, state = ssd_chunked(x, log_decay, b, c, layout_of(1, 40), None, 16)
    (y.sum() + state.sum()).backward()
    assert log_decay.grad is not None
    assert all(torch.isfinite(part).all() for part in (y, state, log_decay.grad))
    # Nothing is left of the past: y_t = (C_t . B_t) x_t.
    assert torch.allclose(y, (c * b).sum(-1, keepdim=True) * x, atol=1e-5)


@pytest.mark.parametrize(("chunked", "recurrence", "widths"), [
    (ssd_chunked, ssd_recurrence, (4, None, 4, 4)),
    (gla_chunked, gla_recurrence, (4, 4, 4, 4)),
])  # fmt: skip
@pytest.mark.parametrize("lengths", [[30, 34], [1, 31, 20, 12], [40, 24, 1]])
def test_strong_decays_stay_finite_across_a_boundary(  # trap K3
    chunked: Any, recurrence: Any, widths: tuple[int | None, ...], lengths: list[int]
) -> None:
    # A document that decays by e^-90 and more before the boundary: a factor taken across it would be infinite.
    generator = torch.Generator().manual_seed(3)
    layout = layout_of(1, sum(lengths), seq_idx=packed_ids(lengths))
    tensors = [torch.randn(1, sum(lengths), 2, *([w] if w else []), generator=generator) for w in widths]
    decay_at = 1 if chunked is ssd_chunked else 3
    tensors[decay_at] = -3 - 2 * tensors[decay_at].abs()
    results = []
    for core, dtype in ((chunked, torch.float32), (recurrence, torch.float64)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        output = core(*inputs, layout, None, 32)[0]
        # The last state goes unused, as in training.
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for mine, right in zip(*results, strict=True):
        assert relative_gap(mine.double(), right) < tolerance(torch.float32, sum(lengths)) * 104


@pytest.mark.parametrize("name", MIXERS)
def test_unknown_backend_is_refused_by_name(name: str) -> None:  # trap K2
    mixer = tiny_mixer(next(case for case in CASES if case.name == name))
    with pytest.raises(ValueError, match=r"backend of \w+ must be auto or one of .*got flash"):
        mixer.use_backend("flash")


@pytest.mark.parametrize("name", ["mamba2", "gla"])
def test_chunk_size_never_changes_the_result(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    x = torch.randn(1, 50, 32, dtype=torch.float64)
    outputs = [
        tiny_mixer(Case(name, case.spec | {"chunk_size": size}))(x, layout_of(1, 50)) for size in (1, 3, 8, 64, 1024)
    ]
    assert max(relative_gap(output, outputs[0]) for output in outputs) < tolerance(torch.float64, 50)
