"""On a CUDA machine: ``pytest -m gpu tests/test_gpu_loss.py``. The loss by chunks against cross-entropy in fp64."""

import pytest
import torch
from torch.nn import functional

from model import loss

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradients_summed_over_chunks_are_those_of_all_logits(compiled, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cuda", 128 * 640)  # 384 rows make three chunks
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((384, 256), (640, 256)))
    targets = torch.randint(0, 640, (384,), generator=generator)
    targets[::7] = loss.IGNORED
    exact = [(part * 0.1).double().requires_grad_() for part in (hidden, weight)]
    expected = functional.cross_entropy(exact[0] @ exact[1].T, targets, ignore_index=loss.IGNORED, reduction="sum")
    (2 * expected).backward()

    head = loss.LMHead(256, 640).cuda()
    with torch.no_grad():
        head.weight.copy_(weight * 0.1)
    rows = (hidden * 0.1).cuda().requires_grad_()
    if compiled:
        head.compile_loss()
    with torch.autocast("cuda", torch.bfloat16):
        total = head(rows, targets.cuda())
    (2 * total).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-3)
    assert head.weight.grad.dtype == torch.float32
    for got, one in zip((rows.grad, head.weight.grad), exact, strict=True):
        # Operands and errors are rounded to 8 bits of mantissa, each off by at most 2**-9 of itself.
        assert (got.double().cpu() - one.grad).norm() / one.grad.norm() < 2**-7
