"""What the mixers hand to kernels and make of their answers, with slow stand-ins that keep the kernels' promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import CASES, Case, layout_of, packed_ids, relative_gap, tiny_mixer, tolerance
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from model.boundaries import Layout
from model.mixers import MIXERS, Mixer, attention, gla, mamba2

TIME = 43
ROWS: dict[str, dict[str, Tensor]] = {
    "dense": {},
    "packed": {"seq_idx": packed_ids([7, 1, 1, 15, 19], 2)},
    "left_padded": {"attention_mask": (torch.arange(TIME) >= torch.tensor([[0], [9]])).long()},
}
RUNS = [(case, kernel) for case in CASES for kernel in MIXERS[case.spec["mixer"]].kernels]


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Token by token, tap by tap."""
    outputs = []
    for t in range(x.shape[1]):
        y = bias.expand_as(x[:, 0])
        for shift in range(min(weight.shape[1], t + 1)):
            seen = torch.ones(x.shape[0]) if seq_idx is None else (seq_idx[:, t] == seq_idx[:, t - shift])
            y = y + weight[:, -1 - shift] * x[:, t - shift] * seen[:, None]
        outputs.append(torch.nn.functional.silu(y))
    return torch.stack(outputs, 1)


def ssd_scan(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, seq_idx: Tensor | None, chunk_size: int
) -> Tensor:
    rows = layout_of(*x.shape[:2], **({} if seq_idx is None else {"seq_idx": seq_idx}))
    y, _ = mamba2.ssd_recurrence(x * step[..., None], rate * step, b, c, rows, None, chunk_size)
    return y + skip[:, None] * x


def mamba2_core(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    rate: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    seq_idx: Tensor | None,
    valid: Tensor | None,
    head_dim: int,
    d_state: int,
    n_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    counts = torch.ones(zxbcdt.shape[:2]) if valid is None else valid
    width, shared = len(norm_weight), n_groups * d_state
    z, xbc, dt = zxbcdt.split([width, width + 2 * shared, len(rate)], -1)
    x, b, c = conv_silu(xbc * counts[:, :, None], conv_weight, conv_bias, seq_idx).split([width, shared, shared], -1)
    step = (1 + (dt + dt_bias).exp()).log() * counts[:, :, None]
    b, c = (part.unflatten(-1, (n_groups, d_state)) for part in (b, c))
    y = ssd_scan(x.unflatten(-1, (-1, head_dim)), step, rate, b, c, skip, seq_idx, 64).flatten(2)
    gated = (y * z * z.sigmoid()).unflatten(-1, (n_groups, -1))
    normed = gated / (gated.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed.flatten(-2) * norm_weight, y


def gla_by_fla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor | None, scale: float) -> Tensor:
    parts = [part if edges is None else part.flatten(0, 1)[None] for part in (scale * q, k, v, log_decay)]
    rows = layout_of(*parts[0].shape[:2], **({} if edges is None else {"seq_idx": numbers(edges)[None]}))
    return gla.gla_recurrence(*parts, rows, None, 64)[0].view(v.shape)


def gla_by_triton(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, edges: Tensor | None, scale: float) -> Tensor:
    return gla_by_fla(q, k, v, log_decay, edges, scale)


def numbers(edges: Tensor) -> Tensor:
    """Which document each token belongs to."""
    return torch.searchsorted(edges[1:].long(), torch.arange(int(edges[-1])), right=True)


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.attend_by_query(q, k, v, None)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, window: int | None) -> Tensor:
    ids = numbers(edges).view(q.shape[0], q.shape[2])
    distance = torch.arange(TIME)[:, None] - torch.arange(TIME)
    seen = (distance >= 0) & (distance < (window or TIME)) & (ids[:, :, None] == ids[:, None, :])
    return attention.attend_by_query(q, k, v, seen[:, None])


def attend_flash(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, window: int | None) -> Tensor:
    return attend_varlen(q, k, v, edges, window)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    mask = create_mask(blocks.mask_mod, q.shape[0], 1, TIME, TIME, device="cpu")
    return attention.attend_by_query(q, k, v, mask)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins in every kernel's place, on a CPU and in fp64; the list fills with the names of those called."""
    called: list[str] = []

    def put(room: Any, stand_in: Any) -> None:
        def counted(*arguments: Any) -> Any:
            called.append(stand_in.__name__)
            return stand_in(*arguments)

        monkeypatch.setattr(room, stand_in.__name__, counted)

    for room, stand_ins in (
        (mamba2, (mamba2_core, conv_silu, ssd_scan)),
        (gla, (gla_by_fla, gla_by_triton)),
        (attention, (attend_cudnn, attend_varlen, attend_flash, attend_flex)),
    ):
        for stand_in in stand_ins:
            put(room, stand_in)
    monkeypatch.setattr(Mixer, "takes", lambda self, name, tensor: name in self.kernels_in_use)
    # The kernels themselves take these in fp32.
    monkeypatch.setattr(Tensor, "float", lambda self: self.double())
    return called


def outcome(mixer: Mixer, backend: str, rows: Layout) -> dict[str, Tensor]:
    """Output and every gradient of one pass; padding's own output is nobody's."""
    mixer.use_backend(backend)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, TIME, 32, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, TIME, 32, generator=generator, dtype=torch.float64)
    if rows.valid is not None:
        weights = weights * rows.valid[:, :, None]
    mixer.zero_grad()
    mixer.prepare(x, rows)
    y = mixer(x, rows) * (1 if rows.valid is None else rows.valid[:, :, None])
    (y * weights).sum().backward()
    assert x.grad is not None
    return {"output": y, "input gradient": x.grad} | {name: p.grad for name, p in mixer.named_parameters()}  # type: ignore[dict-item]


def expected(case: Case, kernel: str, how: str) -> list[str]:
    """Which stand-ins the docstrings of the mixers promise for a call."""
    if kernel == "triton":
        return ["gla_by_triton" if case.spec["mixer"] == "gla" else "mamba2_core"]
    if kernel == "mamba_ssm":
        return ["conv_silu", "ssd_scan"]
    if kernel == "fla":
        return ["gla_by_fla"]
    windowed, globals_too = "window" in case.spec, "global_tokens" in case.spec
    by_rule = how == "left_padded" or (kernel == "sdpa_cudnn" and (windowed or how == "packed"))
    if by_rule or (kernel in ("varlen", "flash_attn") and globals_too):
        return []
    return ["attend_" + {"sdpa_cudnn": "cudnn", "flash_attn": "flash"}.get(kernel, kernel)]


@pytest.mark.parametrize("how", ROWS)
@pytest.mark.parametrize(("case", "kernel"), RUNS, ids=[f"{case}-{kernel}" for case, kernel in RUNS])
def test_a_kernel_in_its_place_gives_the_recurrence(case, kernel, how, calls):  # traps K1, K3
    mixer = tiny_mixer(case)
    wanted = outcome(mixer, "reference", layout_of(2, TIME, **ROWS[how]))
    assert calls == []
    found = outcome(mixer, kernel, layout_of(2, TIME, **ROWS[how]))
    assert calls == expected(case, kernel, how)
    assert max(relative_gap(found[name], wanted[name]) for name in wanted) < tolerance(torch.float64, TIME)
