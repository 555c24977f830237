"""8-bit linear layers, on the CPU, where their products are computed from the same 8-bit numbers in fp32."""

import pytest
import torch
from torch import nn

from model import fp8
from model.layers import ResidualProjection


def drawn(*shape, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def rounded(x, dtype):
    """``x`` as its 8-bit format holds it, in float64, by the format's definition: so many bits after the first."""
    bits, least = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}[dtype]
    factor = torch.finfo(dtype).max / x.double().abs().max()
    scaled = x.double() * factor
    exponent = torch.floor(torch.log2(scaled.abs().clamp(min=2.0**least))).clamp(min=least)
    step = 2.0 ** (exponent - bits)
    return torch.round(scaled / step) * step / factor


def layer(inputs=64, outputs=48):
    plain = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        plain.weight.copy_(drawn(outputs, inputs, scale=0.02))
    plain.__class__ = fp8.Float8Linear
    return plain


@pytest.mark.parametrize("outputs", [48, 43])
def test_output_and_gradients_are_products_of_rounded_operands(outputs):
    linear, x, d_y = layer(64, outputs), drawn(2, 16, 64).requires_grad_(), drawn(2, 16, outputs, scale=1e-4)
    y = linear(x)
    y.backward(d_y)
    rows, weight = rounded(x.detach().flatten(0, 1), fp8.FORWARD), rounded(linear.weight.detach(), fp8.FORWARD)
    errors = rounded(d_y.flatten(0, 1), fp8.BACKWARD)
    for got, expected in (
        (y.flatten(0, 1), rows @ weight.T),
        (x.grad.flatten(0, 1), errors @ weight),
        (linear.weight.grad, errors.T @ rows),
    ):
        # fp32 rounding of the scale can move a value across a rounding border; few do, and by one step each.
        apart = (got.double() - expected).norm() / expected.norm()
        assert apart < 2e-3


def test_rounding_is_far_coarser_than_that_bound():
    x = drawn(16, 64)
    assert (rounded(x, fp8.FORWARD) - x).norm() / x.norm() > 1e-2


def test_magnitudes_of_gradients_do_not_matter():
    linear = layer()
    found = []
    for scale in (1.0, 2.0**-40):
        x = drawn(16, 64).requires_grad_()
        linear(x).backward(drawn(16, 48) * scale)
        found.append(x.grad / scale)
    assert torch.equal(*found)


@pytest.mark.parametrize("columns", [128, 96])
def test_the_cast_does_not_depend_on_how_the_largest_number_is_sought(columns):
    x = drawn(48, columns)
    x[17, 70] = -9.0
    for got, expected in zip(fp8.cast_both(x, fp8.FORWARD, by_rows=False), fp8.cast_both(x, fp8.FORWARD), strict=True):
        assert torch.equal(got.float(), expected.float())
    assert got == torch.tensor(9.0) / 448


def test_zeros_give_zeros_and_nan_is_not_hidden():
    linear = layer()
    assert torch.equal(linear(torch.zeros(16, 64)), torch.zeros(16, 48))
    x = drawn(16, 64)
    x[3, 5] = float("nan")
    assert linear(x).isnan().any()


def test_evaluation_is_the_layer_it_was():
    linear, x = layer(), drawn(7, 64)
    with torch.no_grad():
        assert torch.equal(linear(x), nn.functional.linear(x, linear.weight))


def test_rows_that_tensor_cores_cannot_take_are_refused():
    with pytest.raises(ValueError, match="multiple of 16 in fp8; got 7 rows; set seq_len"):
        layer()(drawn(7, 64))


def test_autocast_decides_the_dtype():
    linear = layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(drawn(16, 64))
    assert y.dtype == torch.bfloat16
    y.backward(drawn(16, 48).bfloat16())
    gradient = linear.weight.grad
    assert not torch.equal(gradient, gradient.bfloat16().float()), "the weight's gradient is as precise as the weight"


def test_conversion_takes_large_plain_layers_alone_and_keeps_names():
    blocks = nn.ModuleDict(
        {
            "large": nn.Linear(1024, 2048, bias=False),
            "residual": ResidualProjection(2048, 1024),
            "small": nn.Linear(1024, 64, bias=False),
            "odd": nn.Linear(1030, 1024, bias=False),
        }
    )
    names = list(blocks.state_dict())
    assert fp8.convert_to_fp8(blocks) == ["large", "residual"]
    assert list(blocks.state_dict()) == names
    assert isinstance(blocks["residual"], ResidualProjection)
    assert type(blocks["small"]) is nn.Linear


# torch's own compiler makes an instance of the class that stands for a function of ours.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_a_compiled_layer_gives_the_same():
    linear, x = layer(), drawn(16, 64)
    plain = linear(x)
    plain.sum().backward()
    expected = linear.weight.grad.clone()
    linear.weight.grad = None
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, plain)
    assert torch.equal(linear.weight.grad, expected)


def test_kept_casts_are_used_until_they_are_dropped(monkeypatch):
    linear, x = layer(), drawn(16, 64)
    model, expected = nn.Sequential(linear), linear(x)
    casts = []
    monkeypatch.setattr(
        fp8, "cast_both", lambda *given, real=fp8.cast_both, **how: casts.append(given) or real(*given, **how)
    )
    fp8.keep_casts(model, torch.float32)
    with torch.no_grad():
        linear.weight *= 2.0
    for _ in range(2):
        fp8.keep_casts(model, torch.float32)
        assert torch.equal(linear(x), expected), "the weight that was cast"
    assert len(casts) == 1 + 2, "the weight once, its input twice"
    fp8.drop_casts(model)
    assert torch.equal(linear(x), 2 * expected), "the weight as it is now"


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_a_compiled_layer_takes_kept_casts_too():
    linear, x = layer(), drawn(16, 64)
    linear.compile(fullgraph=True, backend="aot_eager")
    plain = linear(x)
    fp8.keep_casts(linear, torch.float32)
    y = linear(x)
    y.sum().backward()
    assert torch.equal(y, plain)
    with torch.no_grad():
        linear.weight *= 2.0
    fp8.drop_casts(linear)
    fp8.keep_casts(linear, torch.float32)
    assert torch.equal(linear(x), 2 * plain)
