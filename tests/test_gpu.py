"""On a CUDA machine: ``pytest -m gpu tests/test_gpu.py``. The three systems at full size, a few steps each."""

import pytest
import torch

from model.config import HybridConfig
from model.lm import HybridForCausalLM
from model.presets import PRESETS

pytestmark = pytest.mark.gpu


def packed_rows(vocab_size: int, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens in documents of uneven lengths, packed; labels as the loader gives them."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, vocab_size, (rows, length), generator=generator)
    starts = torch.rand(rows, length, generator=generator) < 1 / 300
    starts[:, 0] = True
    seq_idx = starts.long().cumsum(1) - 1
    first = torch.where(starts, torch.arange(length), 0).cummax(1).values
    labels = input_ids.masked_fill(starts, -100)
    batch = {"input_ids": input_ids, "labels": labels, "position_ids": torch.arange(length) - first}
    return {name: tensor.cuda() for name, tensor in batch.items()} | {"seq_idx": seq_idx.int().cuda()}


@pytest.mark.parametrize("name", ["chimera_700m", "hybrid_1b3", "helix_900m"])
def test_a_preset_learns_a_batch_by_heart(name):
    spec = PRESETS[name]
    with torch.device("cuda"):
        model = HybridForCausalLM(HybridConfig.from_spec(spec, eos_token_id=0, pad_token_id=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    batch = packed_rows(spec.vocab_size, rows=2, length=1024)
    losses = []
    for _ in range(8):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        absent = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert absent == []
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated()
    print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, peak {peak / 2**30:.1f} GiB, micro-batch 2 x 1024")
    # A uniform guess costs log(vocab_size); eight steps on one batch must beat it by more than a nat.
    assert losses[-1] < torch.log(torch.tensor(float(spec.vocab_size))).item() - 1
