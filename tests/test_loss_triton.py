"""The kernels of the head's loss in 8 bits, interpreted: every number in its place, the zeros around, the row sums.

The interpreter rounds to 8 bits wrongly, without the carry: 1.99 becomes 1. Rounding is tests/test_gpu_fp8.py's.
"""

import pytest
import torch
from triton_cases import kernels

from model.loss import IGNORED

SCALE, DTYPE = 2.0**15, torch.float8_e5m2


def near(narrow, errors):
    """Whether each number is what it should be up to a carry, or the smallest number."""
    return ((narrow.double() - errors).abs() <= 0.5001 * errors.abs() + 2.0**-16).all()


def same(one, other):
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def drawn(rows, columns):
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (3 * torch.randn(rows, columns, generator=generator)).bfloat16()
    goals = torch.randint(0, columns, (rows,), generator=generator)
    goals[::5] = IGNORED
    return logits, goals


def exact(logits, goals):
    """Summed loss and scaled errors in float64, by their definition."""
    p = torch.softmax(logits.double(), -1)
    scored = goals != IGNORED
    losses = -p.log()[torch.arange(len(goals)), goals.clamp(min=0)][scored]
    one_hot = torch.zeros_like(p)
    one_hot[scored, goals[scored]] = 1.0
    return losses.sum(), (p - one_hot) * scored[:, None] * SCALE


# The last has more tiles below each other than are taken before the next column of tiles.
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (130, 70), (256, 48), (600, 83)])
def test_errors_are_in_both_places_and_zeros_around_them(rows, columns):
    logits, goals = drawn(rows, columns)
    wide_rows, wide_columns = (-(-size // 16) * 16 for size in (rows, columns))
    around = torch.full((columns, wide_rows + 48), 7.0).to(DTYPE)
    turned = around[:, 32 : 32 + wide_rows]
    nll, narrow = kernels("loss_triton").errors(logits, goals, turned, wide_columns, SCALE, IGNORED)
    total, errors = exact(logits, goals)
    # fp32's exponentials of differences of up to some tens.
    assert nll.item() == pytest.approx(total.item(), rel=1e-5)
    assert near(narrow[:, :columns], errors)
    assert same(turned[:, :rows], narrow[:, :columns].T)
    assert narrow.shape == (rows, wide_columns)
    assert not narrow[:, columns:].float().any()
    assert not turned[:, rows:].float().any()
    assert (around[:, :32].float() == 7).all()
    assert (around[:, 32 + wide_rows :].float() == 7).all()
    assert not narrow[goals == IGNORED].float().any()


def test_a_row_longer_than_what_is_summed_at_a_time(monkeypatch):
    loss_triton = kernels("loss_triton")
    monkeypatch.setattr(loss_triton, "STRETCH", 16)
    logits, goals = drawn(6, 70)
    logits[2, 65] = 60.0  # the largest comes last, and the sum before it must shrink
    logits[3, 1] = 60.0
    turned = torch.empty(70, 16, dtype=DTYPE)
    nll, narrow = loss_triton.errors(logits, goals, turned, 80, SCALE, IGNORED)
    total, errors = exact(logits, goals)
    assert nll.item() == pytest.approx(total.item(), rel=1e-5)
    assert near(narrow[:, :70], errors)


@pytest.mark.parametrize("row", [0, 1])  # the first is not scored
def test_nan_stays_nan_in_its_row_alone(row):
    logits, goals = drawn(16, 32)
    logits[row, 3] = float("nan")
    turned = torch.empty(32, 16, dtype=DTYPE)
    nll, narrow = kernels("loss_triton").errors(logits, goals, turned, 32, SCALE, IGNORED)
    assert nll.isnan()
    assert narrow.float().isnan().any(1).nonzero().flatten().tolist() == [row]
    assert turned.float().isnan().any(0).nonzero().flatten().tolist() == [row]
