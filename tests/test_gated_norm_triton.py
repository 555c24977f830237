"""Our gated norm's and step sizes' kernels, interpreted, against torch in fp64 (trap K1)."""

from __future__ import annotations

import pytest
import torch
from model_cases import relative_gap, tolerance
from torch import Tensor
from torch.nn import functional
from triton_cases import kernels

from model.layers import GatedRMSNorm

BATCH, TIME, WIDTH, HEADS = 2, 7, 24, 3
EPS = 1e-5


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


@pytest.mark.parametrize("n_groups", [1, 2])
def test_the_gated_norm_is_the_layers(n_groups, monkeypatch):
    norm = kernels("gated_norm_triton")
    # Programs that share out the rows unevenly; groups of 24 and 12 are no powers of two.
    monkeypatch.setattr(norm, "CHANNELS_AT_ONCE", 3 * BATCH * 32)
    y, z, d_out = draw(BATCH, TIME, WIDTH), draw(BATCH, TIME, WIDTH + 9, scale=2)[..., 3 : 3 + WIDTH], draw(2, 7, WIDTH)
    layer = GatedRMSNorm(WIDTH, n_groups, EPS).double()
    layer.weight.data = draw(WIDTH).double()
    wide = [y.double().requires_grad_(), z.double().requires_grad_()]
    out = layer(*wide)
    wanted = [out, *torch.autograd.grad(out, [*wide, layer.weight], d_out.double())]

    weight, around = layer.weight.detach().float(), torch.full((BATCH, TIME, WIDTH + 5), 7.0)
    d_z = around[..., 4:-1]
    got = norm.gated_norm_forward(y, z, weight, n_groups, EPS)
    d_y, d_weight = norm.gated_norm_backward(d_out, y, z, weight, n_groups, EPS, d_z)
    assert around[..., :4].eq(7).all()
    assert around[..., -1:].eq(7).all()
    for found, right in zip([got, d_y, d_z, d_weight], wanted, strict=True):
        assert relative_gap(found.double(), right) < tolerance(torch.float32, WIDTH) / 10


@pytest.mark.parametrize("padded", [False, True])
def test_step_sizes_are_softplus_and_zero_at_padding(padded):
    steps = kernels("steps_triton")
    # From e^-40, where 1 + e^x is 1 in fp32, to where softplus is the identity.
    dt, bias = torch.linspace(-40, 40, BATCH * TIME * (HEADS + 2)).view(BATCH, TIME, HEADS + 2)[..., 1:-1], draw(HEADS)
    valid = torch.arange(TIME) >= torch.tensor([[0], [3]]) if padded else None
    counts = torch.ones(BATCH, TIME) if valid is None else valid
    wide = [dt.double().requires_grad_(), bias.double().requires_grad_()]
    wanted = torch.where(
        counts[..., None] > 0,
        functional.softplus(wide[0] + wide[1], threshold=100),
        torch.zeros((), dtype=torch.double),
    )
    d_step = draw(BATCH, TIME, HEADS)
    d_dt, d_bias = torch.autograd.grad(wanted, wide, d_step.double())

    step, into = steps.steps_forward(dt, bias, valid), torch.empty(BATCH, TIME, HEADS + 1)
    found = steps.steps_backward(d_step, dt, bias, valid, into[..., 1:])
    # Exponents of 40 carry an absolute rounding of 40 eps each.
    assert torch.allclose(step.double(), wanted, rtol=200 * torch.finfo(torch.float32).eps, atol=0)
    assert torch.allclose(into[..., 1:].double(), d_dt, rtol=200 * torch.finfo(torch.float32).eps, atol=1e-30)
    assert relative_gap(found.double(), d_bias) < tolerance(torch.float32, BATCH * TIME) / 10
