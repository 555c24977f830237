"""Our convolution kernels, interpreted, against the layer's own sum in fp64 (traps K1, K3)."""

from __future__ import annotations

import pytest
import torch
from model_cases import layout_of, packed_ids, relative_gap, tolerance
from torch import Tensor
from torch.nn import functional
from triton_cases import kernels

from model.layers import CausalConv

BATCH, TIME, CHANNELS = 2, 19, 20
PACKED = packed_ids([3, 1, 2, 13], BATCH)
"""Boundaries inside a group of four tokens that are loaded together, and just before one that has none."""
HOLES = torch.tensor([[1] * TIME, [0, 0, 0] + [1] * 6 + [0] + [1] * 9])
CASES = [
    (4, {}, 16),
    (4, {"seq_idx": PACKED}, 32),
    (3, {"attention_mask": HOLES}, 32),
    (2, {"seq_idx": PACKED, "attention_mask": HOLES}, 32),
]


@pytest.fixture
def conv(monkeypatch):
    conv = kernels("conv_triton")
    # Stretches that end within documents, the last one short.
    monkeypatch.setattr(conv, "FORWARD_STRETCH", 8)
    monkeypatch.setattr(conv, "BACKWARD_STRETCH", 8)
    return conv


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def by_layer(x: Tensor, weight: Tensor, bias: Tensor, described: dict[str, Tensor], d_out: Tensor) -> list[Tensor]:
    """Output and gradients by x, weight (C, K) and bias in fp64, from the layer that trains on any machine."""
    layer = CausalConv(*weight.shape).double()
    layer.weight.data, layer.bias.data = weight[:, None].double(), bias.double()
    x = x.double().requires_grad_()
    y = functional.silu(layer(x, layout_of(BATCH, TIME, **described))[0])
    d_x, d_weight, d_bias = torch.autograd.grad(y, [x, layer.weight, layer.bias], d_out.double())
    return [y, d_x, d_weight[:, 0], d_bias]


def by_kernels(
    conv, x: Tensor, weight: Tensor, bias: Tensor, described: dict[str, Tensor], d_out: Tensor
) -> list[Tensor]:
    layout = layout_of(BATCH, TIME, **described)
    seq_idx = None if layout.doc_ids is None else layout.doc_ids.int()
    y = conv.conv_silu_forward(x, weight, bias, seq_idx, layout.valid)
    around = torch.full((BATCH, TIME, CHANNELS + 5), 7.0)
    into = around[..., 2:-3]
    d_weight, d_bias = conv.conv_silu_backward(d_out, x, weight, bias, seq_idx, layout.valid, into)
    assert around[..., :2].eq(7).all()
    assert around[..., -3:].eq(7).all()
    return [y, into, d_weight, d_bias]


@pytest.mark.parametrize(("taps", "described", "block"), CASES)
def test_output_and_gradients_are_the_layers(taps, described, block, conv, monkeypatch):
    monkeypatch.setattr(conv, "BLOCK", block)
    # Channels within wider rows, as the input projection leaves them.
    x, d_out = draw(BATCH, TIME, CHANNELS + 13)[..., 4 : 4 + CHANNELS], draw(BATCH, TIME, CHANNELS)
    weight, bias = draw(CHANNELS, taps), draw(CHANNELS)
    wanted = by_layer(x, weight, bias, described, d_out)
    found = by_kernels(conv, x, weight, bias, described, d_out)
    for got, right in zip(found, wanted, strict=True):
        assert got.shape == right.shape
        assert relative_gap(got.double(), right) < tolerance(torch.float32, taps) / 10


def test_a_tap_on_a_wrong_place_is_seen(conv):
    x, d_out = draw(BATCH, TIME, CHANNELS), draw(BATCH, TIME, CHANNELS)
    weight, bias = draw(CHANNELS, 4), draw(CHANNELS)
    wanted = by_layer(x, weight, bias, {}, d_out)
    found = by_kernels(conv, x, weight.flip(1), bias, {}, d_out)
    assert all(relative_gap(got.double(), right) > 0.1 for got, right in zip(found, wanted, strict=True))
