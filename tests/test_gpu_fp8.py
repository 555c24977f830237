"""On a CUDA machine: ``pytest -m gpu tests/test_gpu_fp8.py``. 8-bit layers and head against the same on the CPU."""

import pytest
import torch
from torch import nn

from model import fp8, loss

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


def logits_of(rows, columns):
    generator = torch.Generator(device="cuda").manual_seed(rows)
    logits = (4 * torch.randn(rows, columns, device="cuda", generator=generator)).bfloat16()
    goals = torch.randint(0, columns, (rows,), device="cuda", generator=generator)
    goals[::7] = loss.IGNORED
    return logits, goals


@pytest.mark.parametrize("shape", [(16, 16), (300, 1003), (1100, 50304), (130, 200_000)])
def test_the_heads_errors_are_the_processors_own_in_both_places(shape):
    (logits, goals), (rows, columns) = logits_of(*shape), shape
    wide = fp8.padded(rows)
    around = torch.full((columns, wide + 128), 7.0, device="cuda").to(fp8.BACKWARD)
    nll, narrow = fp8._errors(logits, goals, around[:, 64 : 64 + wide])
    turned = torch.empty(columns, wide, dtype=fp8.BACKWARD)
    expected, errors = fp8._errors(logits.cpu(), goals.cpu(), turned)
    # Exponentials differ in fp32's last bits, which seldom move a number across a border of 8 bits.
    assert nll.item() == pytest.approx(expected.item(), rel=1e-5)
    # As numbers: what is not scored may be a zero of either sign.
    apart = narrow.float().cpu() != errors.float()
    assert apart.float().mean() < 1e-3
    assert ((narrow.float().cpu() - errors.float()).abs() <= 0.25 * errors.float().abs() + 2**-16).all()
    bits_turned = around.view(torch.uint8)[:, 64 : 64 + wide]
    assert torch.equal(bits_turned[:, :rows], narrow.view(torch.uint8)[:, :columns].T)
    assert not bits_turned[:, rows:].any()
    assert not narrow.view(torch.uint8)[:, columns:].any()
    assert (around[:, :64].float() == 7).all()
    assert (around[:, 64 + wide :].float() == 7).all()


def test_the_heads_errors_beyond_two_to_the_31_are_those_of_their_rows_alone():
    logits, goals = logits_of(21_504, 100_003)  # 2**31 is the 21,475th row
    turned = torch.empty(100_003, 21_504, dtype=fp8.BACKWARD, device="cuda")
    _, narrow = fp8._errors(logits, goals, turned)
    alone = torch.empty(100_003, 256, dtype=fp8.BACKWARD, device="cuda")
    _, expected = fp8._errors(logits[-256:].clone(), goals[-256:], alone)
    assert torch.equal(narrow[-256:].view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(turned[:, -256:].view(torch.uint8), alone.view(torch.uint8))


def test_nan_of_a_logit_reaches_its_row_of_errors_alone():
    logits, goals = logits_of(32, 64)
    logits[3, 5] = float("nan")
    turned = torch.empty(64, 32, dtype=fp8.BACKWARD, device="cuda")
    nll, narrow = fp8._errors(logits, goals, turned)
    assert nll.isnan()
    assert narrow.float().isnan().any(1).nonzero().flatten().tolist() == [3]
    assert turned.float().isnan().any(0).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("vocab_size", [2064, 2051])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_heads_loss_and_gradients_are_those_of_the_same_numbers_on_the_cpu(vocab_size, chunked, monkeypatch):
    if chunked:  # 900 tokens: chunks of 128, stretches of 384
        for device in ("cuda", "cpu"):
            monkeypatch.setitem(fp8.LOGIT_ELEMENTS, device, 128 * vocab_size)
            monkeypatch.setitem(fp8.TURNED_ELEMENTS, device, 400 * vocab_size)
    goals = torch.randint(0, vocab_size, (900,), generator=torch.Generator().manual_seed(0))
    goals[::5] = loss.IGNORED
    results, plain = [], None
    for device in ("cuda", "cpu"):
        head = loss.LMHead(1024, vocab_size).to(device)
        with torch.no_grad():
            head.weight.copy_(drawn(vocab_size, 1024, scale=0.1))
        if device == "cuda":
            with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                plain = head(drawn(900, 1024).cuda(), goals.cuda())
        assert fp8.convert_to_fp8(nn.ModuleList([head])) == ["0"]
        x = drawn(900, 1024).to(device).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            total = head(x, goals.to(device))
        total.backward()
        results.append([part.detach().float().cpu() for part in (total, x.grad, head.weight.grad)])
    assert results[0][0].item() == pytest.approx(plain.item(), rel=1e-5), "the loss is as exact as in bf16"
    for got, expected in zip(*results, strict=True):
        # Logits are rounded to bf16 in another order of sums, and what is rounded to 8 bits after them differs by that.
        assert (got - expected).norm() / expected.norm() < 2e-2


def test_a_head_outside_of_autocast_is_refused():
    head = loss.LMHead(1024, 2048).cuda()
    fp8.convert_to_fp8(nn.ModuleList([head]))
    with pytest.raises(ValueError, match=r"under autocast in half precision; got torch\.float32"):
        head(torch.zeros(16, 1024, device="cuda"), torch.zeros(16, dtype=torch.long, device="cuda"))
