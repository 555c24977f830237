"""The operator for all of Mamba-2 between its projections: its kernels interpreted, and whom it asks for weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_cases import Case, layout_of, packed_ids, relative_gap, tiny_model, tolerance
from torch import Tensor, nn
from triton_cases import kernels

from model.boundaries import Layout
from model.kernels.mamba2_core import mamba2_core
from model.mixers import Mixer, mamba2

TIME, D_MODEL = 21, 16
SPEC = {"mixer": "mamba2", "head_dim": 16, "d_state": 16, "chunk_size": 16}
RUNS: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
    ({}, {"seq_idx": packed_ids([7, 1, 1, 12], 2)}),
    ({"n_groups": 2, "d_conv": 3}, {"attention_mask": (torch.arange(TIME) >= torch.tensor([[0], [5]])).long()}),
]


@pytest.fixture
def interpreted(monkeypatch):
    """All kernels on a CPU, which the mixer then takes for one that they run on."""
    for room in ("conv_triton", "gated_norm_triton", "steps_triton", "ssd_triton"):
        kernels(room)
    monkeypatch.setattr(Mixer, "takes", lambda self, name, tensor: name in self.kernels_in_use)


def mixer_of(**changes: Any) -> Mixer:
    mixer = tiny_model(Case("mamba2", SPEC | changes), d_model=D_MODEL).model.layers[0].mixer
    with torch.no_grad():
        for parameter in mixer.parameters():
            # Vectors that all start as ones or zeros would hide a wrong axis.
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def outcome(mixer: Mixer, backend: str, rows: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and every gradient of one pass; padding's own output is nobody's."""
    mixer = copy.deepcopy(mixer).to(dtype)
    mixer.use_backend(backend)
    generator = torch.Generator().manual_seed(3)
    x, weights = (torch.randn(2, TIME, D_MODEL, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    x.requires_grad_()
    mixer.prepare(x, rows)
    y = mixer(x, rows) * (1 if rows.valid is None else rows.valid[:, :, None])
    (y * weights).sum().backward()
    assert x.grad is not None
    return {"output": y, "input gradient": x.grad} | {name: p.grad for name, p in mixer.named_parameters()}  # type: ignore[dict-item]


@pytest.mark.parametrize(("changes", "described"), RUNS)
def test_the_whole_core_equals_the_recurrence(changes, described, interpreted):  # traps K1, K3
    mixer = mixer_of(**changes)
    wanted = outcome(mixer, "reference", layout_of(2, TIME, **described), torch.float64)
    found = outcome(mixer, "triton", layout_of(2, TIME, **described), torch.float32)
    for name, right in wanted.items():
        assert relative_gap(found[name].double(), right) < tolerance(torch.float32, TIME), name


class Gathering:
    """What ZeRO-3 does to a module: its own weights are there while its forward runs, and nowhere else."""

    def __init__(self, module: nn.Module) -> None:
        self.whole = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
        module.register_forward_pre_hook(lambda owner, inputs: self._put(owner, self.whole))
        module.register_forward_hook(lambda owner, inputs, outputs: self._empty(owner))
        self._empty(module)

    def _put(self, owner: nn.Module, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            getattr(owner, name).data = value

    def _empty(self, owner: nn.Module) -> None:
        self._put(owner, {name: value.new_empty(0) for name, value in self.whole.items()})


def test_weights_are_asked_for_where_zero3_gathers_them(monkeypatch):
    seen: list[tuple[int, ...]] = []

    def core(zxbcdt: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        seen.extend(tuple(tensor.shape) for tensor in others[:6])
        return zxbcdt[..., : mixer.d_inner], zxbcdt

    monkeypatch.setattr(mamba2, "mamba2_core", core)
    monkeypatch.setattr(Mixer, "takes", lambda self, name, tensor: name == "triton")
    mixer = mixer_of()
    for module in mixer.modules():
        Gathering(module)
    mixer(torch.randn(1, 5, D_MODEL), layout_of(1, 5))
    # 32 channels inside, 16 each of B and C; 2 heads.
    assert seen == [(64, 4), (64,), (2,), (2,), (2,), (32,)]


def test_the_operator_keeps_its_promises_to_the_compiler(interpreted):
    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape).requires_grad_()

    # 2 x 16 channels inside, 16 each of B and C, one head.
    vectors = [draw(size) for size in (48, 1, 1, 1, 16)]
    arguments = (draw(1, 9, 65), draw(48, 4), *vectors, packed_ids([4, 1, 4]).int().contiguous(), None, 16, 16, 1, 1e-5)
    torch.library.opcheck(mamba2_core, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_it_stands_inside_a_compiled_block(interpreted):
    torch._dynamo.reset()
    block = tiny_model(Case("mamba2", SPEC | {"backend": "auto"}), d_model=D_MODEL).model.layers[0]
    block.mixer.kernels_in_use = ["triton"]
    x, rows = torch.randn(1, TIME, D_MODEL), layout_of(1, TIME, seq_idx=packed_ids([7, 14]))
    block.mixer.prepare(x, rows)
    wanted = block(x, rows)
    wanted.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
    block.zero_grad()
    block.compile(fullgraph=True, backend="aot_eager")
    found = block(x, rows)
    found.square().mean().backward()
    assert relative_gap(found, wanted) < 1e-5
    for name, parameter in block.named_parameters():
        assert relative_gap(parameter.grad, gradients[name]) < 1e-5, name
    torch._dynamo.reset()
