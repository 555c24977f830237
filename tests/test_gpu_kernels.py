"""On a CUDA machine, ``pytest -m gpu``: every kernel against the plain recurrence in fp64 (traps K1, K3).

B batch, T time, D d_model.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from model_cases import Case, packed_ids, tiny_model
from torch import Tensor

from model.block import Block
from model.boundaries import Layout, resolve_layout
from model.kernels import ssd_triton
from model.kernels.gla import gla_scan
from model.kernels.gla_core import gla_core
from model.kernels.limits import absent_packages
from model.mixers import MIXERS, Mixer, attention, gla, mamba2

pytestmark = pytest.mark.gpu

D_MODEL, BATCH, TIME = 256, 2, 333
LENGTHS = [130, 1, 77, 1, 1, 123]
SPECS: dict[str, dict[str, Any]] = {
    "mamba2-64x128": {"mixer": "mamba2", "head_dim": 64, "d_state": 128, "chunk_size": 128},
    "mamba2-groups-128x64": {"mixer": "mamba2", "head_dim": 128, "d_state": 64, "chunk_size": 64, "n_groups": 2},
    "gla-128": {"mixer": "gla", "n_heads": 2},
    "gla-64x128-low-rank": {
        "mixer": "gla", "n_heads": 3, "head_k_dim": 64, "head_v_dim": 128, "gate_rank": 16, "gate_normalizer": 1.0,
    },
    "attention-128": {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "output_gate": True},
    "attention-128-globals": {
        "mixer": "attention", "n_heads": 2, "n_kv_heads": 2, "qk_norm": True, "window": 50, "global_tokens": 4,
    },
    "attention-64-window": {
        "mixer": "attention", "n_heads": 3, "n_kv_heads": 3, "head_dim": 64, "qk_norm": True, "window": 50,
    },
}  # fmt: skip
EDGES = torch.tensor(LENGTHS).cumsum(0)[:-1].tolist()
LAYOUTS: dict[str, dict[str, Tensor]] = {
    "dense": {},
    "packed": {"seq_idx": packed_ids(LENGTHS, BATCH)},
    "left_padded": {"attention_mask": (torch.arange(TIME) >= torch.tensor([[0], [64]])).long()},
}
RUNS = [
    (name, kernel, how)
    for name, spec in SPECS.items()
    for kernel in MIXERS[spec["mixer"]].kernels
    for how in LAYOUTS
    # What these do not take goes through torch by rule, which the CPU tests compare.
    if not (kernel == "sdpa_cudnn" and ("window" in spec or how != "dense"))
    if not (kernel in ("varlen", "flash_attn") and "global_tokens" in spec)
    if not absent_packages(kernel)
    if not (spec["mixer"] == "attention" and how == "left_padded")
]
each_run = pytest.mark.parametrize(("name", "kernel", "how"), RUNS)
PACKED = [run for run in RUNS if run[2] == "packed"]
TOLERANCE = 4 * torch.finfo(torch.bfloat16).eps
"""Of the norm of a difference over the norm of what is wanted. A value passes some sixteen roundings to bf16, each off
by up to eps / 2 and independent: four times eps / 2 in all, and twice that for sums that cancel. It counts from what
the bf16 projections before and after the core cost, which the torch core shows with the same ones."""


@pytest.fixture(scope="module", autouse=True)
def few_configurations():
    """Two configurations of each kernel: tuning runs the same code with more tile sizes, and takes minutes."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, arguments: prune(self, arguments)[:2]
    yield
    Autotuner.prune_configs = prune


def mixer_of(name: str) -> Mixer:
    """A mixer on the GPU whose matrices are bf16 numbers, so that fp64 starts from the very same ones.

    Vectors that all start as ones or zeros would hide a wrong axis.
    """
    case = Case(name.partition("-")[0], SPECS[name])
    mixer = tiny_model(case, d_model=D_MODEL).model.layers[0].mixer.cuda()
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.bfloat16())
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def layout(described: dict[str, Tensor]) -> Layout:
    return resolve_layout(BATCH, TIME, torch.device("cuda"), **{n: t.cuda() for n, t in described.items()})


def results(mixer: Mixer, backend: str, described: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and every gradient of one pass over fixed inputs, under autocast where ``dtype`` is bf16; in fp64."""
    mixer = copy.deepcopy(mixer)
    mixer = mixer if dtype == torch.bfloat16 else mixer.double()
    mixer.use_backend(backend)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, TIME, D_MODEL, generator=generator).bfloat16().to("cuda", dtype).requires_grad_()
    weights = torch.randn(BATCH, TIME, D_MODEL, generator=generator).bfloat16().to("cuda", dtype)
    rows = layout(described)
    if rows.valid is not None:
        weights = weights * rows.valid[:, :, None]
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        mixer.prepare(x, rows)
        y = mixer(x, rows)
    (y * weights).sum().backward()
    assert x.grad is not None
    found = {"output": y if rows.valid is None else y * rows.valid[:, :, None], "input gradient": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in mixer.named_parameters() if p.grad is not None}
    assert len(found) == 2 + len(list(mixer.parameters())), "a parameter got no gradient"
    return {name: tensor.detach().double() for name, tensor in found.items()}


def gaps(got: dict[str, Tensor], wanted: dict[str, Tensor], edges: list[int]) -> dict[str, float]:
    """Of each result the norm of the difference over the norm; outputs and input gradients document by document."""
    found = {}
    for name, right in wanted.items():
        per_token = name in ("output", "input gradient")
        pieces = zip(
            *(part.tensor_split(edges, 1) if per_token else [part] for part in (got[name], right)), strict=True
        )
        found |= {f"{name} {number}": float((a - b).norm() / b.norm()) for number, (a, b) in enumerate(pieces)}
    return found


def faults(
    mixer: Mixer, kernel: str, given: dict[str, Tensor], told: dict[str, Tensor] | None = None
) -> dict[str, str]:
    """What of ``kernel``'s results is not the fp64 recurrence's on the rows ``given``; ``told`` are other rows."""
    edges = EDGES if "seq_idx" in given else []
    wanted = results(mixer, "reference", given, torch.float64)
    ours = gaps(results(mixer, kernel, given if told is None else told, torch.bfloat16), wanted, edges)
    core = gaps(results(mixer, "torch", given, torch.bfloat16), wanted, edges)
    # A document's first output is (q k) v, and normalised: where q k is next to nothing, its gradient is all rounding.
    assert max(core.values()) < TOLERANCE, "these inputs measure nothing"
    print(f"\n{kernel}: worst {max(ours.values()):.4f}, torch core in bf16 {max(core.values()):.4f}")
    return {name: f"{gap:.4f} over {core[name]:.4f}" for name, gap in ours.items() if not gap < TOLERANCE + core[name]}


@each_run
def test_a_kernel_equals_the_recurrence_in_output_and_all_gradients(name, kernel, how):  # trap K1
    assert faults(mixer_of(name), kernel, LAYOUTS[how]) == {}


@pytest.mark.parametrize(("name", "kernel", "how"), PACKED)
def test_a_boundary_off_by_one_is_caught(name, kernel, how):  # trap K3
    mixer = mixer_of(name)
    for edge in range(len(EDGES)):
        moved = list(LENGTHS)
        moved[edge], moved[edge + 1] = moved[edge] + 1, moved[edge + 1] - 1
        found = faults(mixer, kernel, LAYOUTS[how], {"seq_idx": packed_ids(moved, BATCH)})
        assert any(name.startswith("output") for name in found), f"edge {edge} moved and not seen: {found}"


def broken(kernel: Any, position: int, axis: int) -> Any:
    def faulty(*arguments: Any) -> Any:
        changed = list(arguments)
        changed[position] = changed[position].flip(axis)
        return kernel(*changed)

    return faulty


FAULTS = [
    # Steps that decay another head; decays and B on the wrong axis; keys' heads turned round.
    ("mamba2-64x128", "mamba_ssm", mamba2, "ssd_scan", 1, 2),
    ("mamba2-64x128", "mamba_ssm", mamba2, "ssd_scan", 2, 0),
    ("mamba2-64x128", "mamba_ssm", mamba2, "ssd_scan", 3, 3),
    ("mamba2-64x128", "mamba_ssm", mamba2, "conv_silu", 1, 1),
    # Taps, channels' biases, steps, decays, skips and the norm's weights turned round.
    *(("mamba2-64x128", "triton", mamba2, "mamba2_core", number, int(number == 1)) for number in range(1, 7)),
    ("mamba2-groups-128x64", "triton", ssd_triton, "ssd_forward", 1, 2),
    ("mamba2-groups-128x64", "triton", ssd_triton, "ssd_forward", 3, 2),
    ("mamba2-groups-128x64", "triton", ssd_triton, "ssd_forward", 4, 3),
    # Decays of another channel, then of another head; keys of another token.
    *(
        ("gla-128", kernel, gla, f"gla_by_{kernel}", *at)
        for kernel in ("fla", "triton")
        for at in ((3, 3), (3, 2), (1, 1))
    ),
    ("attention-128", "sdpa_cudnn", attention, "attend_cudnn", 1, 1),
    ("attention-64-window", "varlen", attention, "attend_varlen", 1, 2),
    ("attention-128-globals", "flex", attention, "attend_flex", 1, 2),
]


@pytest.mark.parametrize(("name", "kernel", "room", "call", "position", "axis"), FAULTS)
def test_a_tensor_on_a_wrong_axis_is_caught(name, kernel, room, call, position, axis, monkeypatch):  # trap K1
    monkeypatch.setattr(room, call, broken(getattr(room, call), position, axis))
    assert "output 0" in faults(mixer_of(name), kernel, {})


GRADIENT_FAULTS = [
    ("conv_triton", "conv_silu_backward", 0, 1, "input gradient 0"),
    ("conv_triton", "conv_silu_backward", 2, 1, "gradient of conv1d.weight 0"),
    ("steps_triton", "steps_backward", 0, 2, "gradient of dt_bias 0"),
    ("ssd_triton", "ssd_backward", 2, 2, "gradient of A_log 0"),
    ("gated_norm_triton", "gated_norm_backward", 3, 0, "input gradient 0"),
]


@pytest.mark.parametrize(("room", "call", "position", "axis", "seen"), GRADIENT_FAULTS)
def test_a_backward_kernel_that_is_handed_something_else_is_caught(room, call, position, axis, seen, monkeypatch):
    module = importlib.import_module(f"model.kernels.{room}")
    monkeypatch.setattr(module, call, broken(getattr(module, call), position, axis))
    found = faults(mixer_of("mamba2-64x128"), "triton", {})
    assert seen in found
    assert not any(name.startswith("output") for name in found)


@pytest.mark.parametrize("name", ["mamba2-64x128", "gla-128"])
def test_gradients_are_the_same_bits_each_time(name):
    mixer = mixer_of(name)
    first, again = (results(mixer, "triton", LAYOUTS["packed"], torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("name", "kernel", "how"), PACKED)
def test_a_document_leaves_no_trace_in_another(name, kernel, how):  # trap K3
    mixer = mixer_of(name).bfloat16()
    mixer.use_backend(kernel)
    rows, x = layout(LAYOUTS[how]), torch.randn(BATCH, TIME, D_MODEL, device="cuda").bfloat16()
    before = mixer(x, rows).double()
    x[:, EDGES[1] : EDGES[2]] += 3.0
    after = mixer(x, rows).double()
    assert not torch.equal(before[:, EDGES[1] : EDGES[2]], after[:, EDGES[1] : EDGES[2]])
    # mamba-ssm's decays are differences of running sums over a chunk: what they pass over moves a rounding here and
    # there, and a state that leaks moves everything.
    allowed = torch.finfo(torch.bfloat16).eps / 4 if kernel == "mamba_ssm" else 0.0
    for kept in (slice(0, EDGES[1]), slice(EDGES[2], TIME)):
        assert (after - before)[:, kept].norm() <= allowed * before[:, kept].norm()


COMPILED = [(name, "auto") for name in ("attention-128", "attention-64-window", "attention-128-globals")] + [
    (name, kernel) for name in ("mamba2-64x128", "gla-128") for kernel in MIXERS[name.partition("-")[0]].kernels
]


@pytest.mark.parametrize("how", ["dense", "packed"])
@pytest.mark.parametrize(("name", "backend"), COMPILED)
def test_a_compiled_block_equals_the_eager_one(name, backend, how):
    torch._dynamo.reset()
    case = Case(name.partition("-")[0], SPECS[name])
    block: Block = tiny_model(case, d_model=D_MODEL).model.layers[0].cuda()
    block.mixer.use_backend(backend)
    assert block.mixer.kernels_in_use
    x, rows = torch.randn(BATCH, TIME, D_MODEL, device="cuda"), layout(LAYOUTS[how])
    found = []
    for compiled in (False, True):
        if compiled:
            block.compile(fullgraph=True, dynamic=False)
        given = x.clone().requires_grad_()
        block.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            block.mixer.prepare(given, rows)
            y = block(given, rows)
        y.float().square().mean().backward()
        found.append({"output": y, "input gradient": given.grad})
        found[-1] |= {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
    assert max(gaps(found[1], found[0], []).values()) < TOLERANCE


def test_operators_keep_their_promises_to_the_compiler():
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, half: bool = True) -> Tensor:
        tensor = torch.rand(*shape, generator=generator, device="cuda")
        return (tensor.bfloat16() if half else tensor).requires_grad_()

    ids = packed_ids([40, 1, 59], 1).int().cuda()
    vectors = [draw(size, half=False) for size in (512, 4, 4, 4, 256)]
    edges = torch.tensor([0, 40, 41, 100, 100], dtype=torch.int32, device="cuda")
    calls = [
        (mamba2.conv_silu, (draw(1, 100, 64), draw(64, 4, half=False), draw(64, half=False), ids)),
        (mamba2.ssd_scan, (
            draw(1, 100, 2, 64), draw(1, 100, 2, half=False), draw(2, half=False), draw(1, 100, 1, 128),
            draw(1, 100, 1, 128), draw(2, half=False), ids, 64,
        )),
        # 2 x 256 channels inside, B and C of 128 each, 4 heads of 64.
        (mamba2.mamba2_core, (draw(1, 100, 772), draw(512, 4, half=False), *vectors, ids, None, 64, 128, 1, 1e-5)),
        *((scan, (
            draw(1, 100, 2, 64), draw(1, 100, 2, 64), draw(1, 100, 2, 128), draw(1, 100, 2, 64, half=False),
            edges, 0.125,
        )) for scan in (gla_scan, gla_core)),
    ]  # fmt: skip
    for operator, arguments in calls:
        torch.library.opcheck(
            operator, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )
