"""On a CUDA machine: ``pytest -m gpu tests/test_gpu_fp8.py``. 8-bit layers against the same numbers on the CPU."""

import pytest
import torch
from torch import nn

from model import fp8

pytestmark = pytest.mark.gpu


def drawn(*shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def bits(parts):
    narrow, turned, unscale = (part.cpu() for part in parts)
    return narrow.view(torch.uint8), turned.view(torch.uint8), unscale


@pytest.mark.parametrize("dtype", [fp8.FORWARD, fp8.BACKWARD])
@pytest.mark.parametrize("shape", [(16, 16), (130, 70), (1040, 2064)])
def test_the_cast_is_the_processors_own_to_the_bit(dtype, shape):
    x = drawn(*shape).bfloat16()
    x[0, :4] = torch.tensor([100.0, -100.0, 0.0, 1e-9])
    for got, expected in zip(bits(fp8.cast_both(x.cuda(), dtype)), bits(fp8.cast_both(x, dtype)), strict=True):
        assert torch.equal(got, expected)


def test_part_of_a_larger_buffer_is_cast_as_its_copy_is():
    x = drawn(64, 256).bfloat16().cuda()[:, 64:160]
    parts = bits(fp8.cast_both(x, fp8.FORWARD)), bits(fp8.cast_both(x.clone().contiguous(), fp8.FORWARD))
    for got, expected in zip(*parts, strict=True):
        assert torch.equal(got, expected)


def test_nan_stays_nan_and_zeros_zeros():
    x = drawn(32, 32).bfloat16().cuda()
    x[3, 5] = float("nan")
    narrow, turned, _ = fp8.cast_both(x, fp8.FORWARD)
    assert narrow.float().isnan().nonzero().tolist() == [[3, 5]]
    assert turned.float().isnan().nonzero().tolist() == [[5, 3]]
    narrow, _, unscale = fp8.cast_both(torch.zeros_like(x), fp8.FORWARD)
    assert narrow.float().abs().sum() == 0
    assert unscale.isfinite()


@pytest.mark.parametrize("outputs", [1040, 1038])
@pytest.mark.parametrize("compiled", [False, True])
def test_products_and_gradients_are_those_of_the_same_numbers_in_fp32(compiled, outputs):
    results = []
    for device in ("cuda", "cpu"):
        linear = nn.Linear(1024, outputs, bias=False)
        with torch.no_grad():
            linear.weight.copy_(drawn(outputs, 1024, scale=0.02))
        linear = linear.to(device)
        linear.__class__ = fp8.Float8Linear
        if compiled and device == "cuda":
            linear.compile()
        x = drawn(2, 256, 1024).to(device, torch.bfloat16).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            y = linear(x)
        y.backward(drawn(2, 256, outputs, scale=1e-4).to(device, torch.bfloat16))
        results.append([part.detach().float().cpu() for part in (y, x.grad, linear.weight.grad)])
    for got, expected in zip(*results, strict=True):
        # bf16 results, and sums of 1,024 products that the forward product keeps in fewer bits than fp32.
        assert (got - expected).norm() / expected.norm() < 5e-3
