"""Kernel backends without a GPU: who is chosen, what is refused and how, what kernels are told of documents."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from typing import Any

import pytest
import torch
from model_cases import CASES, Case, layout_of, packed_ids, tiny_mixer, tiny_model, tokens
from pydantic import ValidationError
from torch.nn import functional
from torch.nn.attention.flex_attention import create_mask

from model.block import compile_parts
from model.kernels import limits
from model.kernels.flex import visible_blocks
from model.kernels.limits import KERNELS, absent_packages, limit_faults
from model.kernels.rows import FEWEST_EDGES, document_edges, document_numbers
from model.lm import model_backends
from model.loss import _errors, _errors_as_one
from model.mixers import MIXERS, Mixer, contract
from model.spec import AttentionSpec, GLASpec, Mamba2Spec

FITTING: dict[str, dict[str, Any]] = {
    "mamba2": {"mixer": "mamba2", "head_dim": 64, "d_state": 128, "chunk_size": 128},
    "gla": {"mixer": "gla", "n_heads": 1, "head_k_dim": 64, "head_v_dim": 128},
    "attention": {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 64},
}
NAMED = [(mixer, kernel) for mixer, room in MIXERS.items() for kernel in room.kernels]


def fitting(name: str, **changes: Any) -> Mixer:
    """A mixer of kernel sizes in a model of width 64."""
    return tiny_model(Case(name, FITTING[name] | changes), d_model=64).model.layers[0].mixer


def on_hopper(monkeypatch: pytest.MonkeyPatch, *absent: str, capability: tuple[int, int] = (9, 0)) -> None:
    """Let the choice believe that a GPU is there, and all packages but ``absent``."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    missing = {kernel: [one for one in facts.packages if one in absent] for kernel, facts in KERNELS.items()}
    monkeypatch.setattr(contract, "absent_packages", missing.__getitem__)


@pytest.mark.parametrize("name", MIXERS)
def test_auto_takes_every_kernel_that_is_installed_and_tested_here(name, monkeypatch):
    on_hopper(monkeypatch)
    assert fitting(name).kernels_in_use == [one for one in MIXERS[name].kernels if KERNELS[one].capabilities]


@pytest.mark.parametrize("name", MIXERS)
def test_auto_leaves_an_untested_machine_to_torch(name, monkeypatch):
    on_hopper(monkeypatch, capability=(8, 0))
    assert fitting(name).kernels_in_use == []


@pytest.mark.parametrize("absent", ["mamba_ssm", "causal_conv1d"])
def test_auto_does_without_a_kernel_whose_package_is_absent(absent, monkeypatch):
    on_hopper(monkeypatch, absent, "triton")
    assert fitting("mamba2").kernels_in_use == []


def test_auto_never_picks_a_kernel_that_has_passed_no_parity_test_on_this_gpu(monkeypatch):
    on_hopper(monkeypatch)
    untested = KERNELS | {"triton": dataclasses.replace(KERNELS["triton"], capabilities=())}
    monkeypatch.setattr(contract, "KERNELS", untested)
    assert fitting("mamba2").kernels_in_use == ["mamba_ssm"]
    assert fitting("mamba2", backend="triton").kernels_in_use == ["triton"]


def test_a_model_in_one_flat_file_does_without_our_triton_kernels(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if package else object())
    assert absent_packages("triton") == list(KERNELS["triton"].rooms)
    monkeypatch.setattr(limits, "__package__", "")
    assert absent_packages("triton") == list(KERNELS["triton"].rooms)
    assert absent_packages("mamba_ssm") == []


def test_auto_does_without_a_kernel_that_does_not_take_the_sizes(monkeypatch):
    on_hopper(monkeypatch)
    assert fitting("mamba2", d_state=16).kernels_in_use == []
    assert fitting("gla", head_v_dim=32).kernels_in_use == []
    assert fitting("attention", window=5, global_tokens=2).kernels_in_use == ["sdpa_cudnn", "flex"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_auto_is_torch_on_a_cpu_and_says_so(case, monkeypatch):  # trap K2
    on_hopper(monkeypatch)
    assert tiny_mixer(case, torch.float32).backend_on(torch.device("cpu"), torch.bfloat16) == "torch"
    assert model_backends(tiny_model(case))[1] == f"layer 1: {case.spec['mixer']} on torch"


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_auto_with_kernels_computes_on_a_cpu_what_torch_computes(name, dtype, monkeypatch):
    on_hopper(monkeypatch)
    mixer, x = fitting(name).to(dtype), torch.randn(1, 20, 64).to(dtype)
    layout = layout_of(1, 20, seq_idx=packed_ids([7, 1, 12]))
    mixer.prepare(x, layout)
    auto = mixer(x, layout)
    mixer.use_backend("torch")
    assert torch.equal(auto, mixer(x, layout_of(1, 20, seq_idx=packed_ids([7, 1, 12]))))


@pytest.mark.parametrize(("name", "kernel"), NAMED)
def test_a_named_kernel_on_a_cpu_is_an_error(name, kernel, monkeypatch):  # trap K2
    on_hopper(monkeypatch)
    mixer = fitting(name, backend=kernel)
    wanted = rf"backend of \w+ must fit device and precision; {kernel} takes bfloat16 or float16 on cuda; got .* on cpu"
    with pytest.raises(ValueError, match=wanted):
        mixer.backend_on(torch.device("cpu"), torch.bfloat16)
    described = {} if kernel == "sdpa_cudnn" else {"seq_idx": packed_ids([7, 13])}
    for call in (mixer.prepare, mixer):
        with pytest.raises(ValueError, match=wanted):
            call(torch.randn(1, 20, 64), layout_of(1, 20, **described))


@pytest.mark.parametrize(("kernel", "package"), [("triton", "triton"), ("mamba_ssm", "causal_conv1d"), ("fla", "fla")])
def test_a_named_kernel_that_is_not_installed_is_an_error(kernel, package, monkeypatch):  # trap K2
    on_hopper(monkeypatch, package)
    name = next(name for name, one in NAMED if one == kernel)
    model = tiny_model(Case(name, FITTING[name] | {"backend": kernel}), d_model=64)
    wanted = rf"must name what is installed; got {kernel}, which needs {package}; install the gpu extra, or set backend"
    with pytest.raises(ValueError, match=wanted):
        model_backends(model)
    with pytest.raises(ValueError, match=wanted):
        model(tokens(1, 8))


@pytest.mark.parametrize(("name", "kernel"), NAMED)
def test_calls_with_a_state_go_through_torch_by_rule(name, kernel, monkeypatch):
    on_hopper(monkeypatch)
    mixer, x = fitting(name, backend=kernel), torch.randn(1, 20, 64)
    by_rule = mixer(x, layout_of(1, 20), mixer.new_state())
    mixer.use_backend("torch")
    assert torch.equal(by_rule, mixer(x, layout_of(1, 20), mixer.new_state()))


WRONG = [
    (Mamba2Spec, {"mixer": "mamba2", "backend": "mamba_ssm", "head_dim": 96}, "head_dim", "got 96; set 64 or 128, or"),
    (Mamba2Spec, {"mixer": "mamba2", "backend": "mamba_ssm", "d_state": 16}, "d_state", "got 16; set 64, or backend"),
    (Mamba2Spec, {"mixer": "mamba2", "backend": "mamba_ssm", "chunk_size": 512}, "chunk_size", "got 512; set 256, or"),
    (Mamba2Spec, {"mixer": "mamba2", "backend": "triton", "d_state": 96}, "d_state", "got 96; set 64 or 128, or"),
    (Mamba2Spec, {"mixer": "mamba2", "backend": "mamba_ssm", "d_conv": 5}, "d_conv", "got 5; set 4, or backend torch"),
    (GLASpec, {"mixer": "gla", "n_heads": 2, "backend": "fla", "head_k_dim": 80}, "head_k_dim", "set 64 or 128, or"),
    (AttentionSpec, {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "backend": "sdpa_cudnn", "head_dim": 256},
     "head_dim", "must be one of [64, 128] for backend sdpa_cudnn; got 256; set 128, or backend torch"),
    (AttentionSpec, {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "backend": "varlen", "window": 9,
                     "global_tokens": 4}, "global_tokens", "must be one of [0] for backend varlen; got 4; set 0, or"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "fields", "name", "told"), WRONG)
def test_sizes_that_a_named_kernel_does_not_take_are_refused_with_the_nearest(section, fields, name, told):
    with pytest.raises(ValidationError) as error:
        section(**fields)
    (fault,) = error.value.errors()
    assert fault["loc"] == (name,)
    assert told in fault["msg"]
    section(**fields | {"backend": "auto"})


def test_every_kernel_of_a_mixer_has_its_facts_and_its_place_in_the_spec():
    assert {kernel for _, kernel in NAMED} == set(KERNELS)
    for name, kernel in NAMED:
        assert list(limit_faults(kernel, FITTING[name])) == []
        assert fitting(name, backend=kernel).backend == kernel


def test_document_edges_lay_the_rows_end_to_end():
    # Two rows of six tokens: documents of 2, 3 and 1, then of 1 and 5.
    layout = layout_of(2, 6, seq_idx=torch.tensor([[0, 0, 1, 1, 1, 2], [5, 7, 7, 7, 7, 7]]))
    edges = document_edges(layout, 2, 6)
    assert edges.dtype == torch.int32
    assert edges[:6].tolist() == [0, 2, 5, 6, 7, 12]
    assert edges[6:].eq(12).all()
    assert len(edges) == FEWEST_EDGES
    assert document_edges(layout_of(2, 6), 2, 6)[:4].tolist() == [0, 6, 12, 12]
    numbers = document_numbers(layout)
    assert numbers is not None
    assert numbers.tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("rows", [
    {},
    {"seq_idx": packed_ids([7, 1, 40, 552], 2)},
    {"seq_idx": torch.stack([packed_ids([130, 470])[0], packed_ids([256, 128, 216])[0]])},
    {"position_ids": (torch.arange(600) + 3)[None].expand(2, -1)},
    {"position_ids": torch.cat([torch.arange(5, 300), torch.arange(2, 307)])[None].expand(2, -1)},
], ids=["whole", "packed", "two rows", "later positions", "documents that begin later"])  # fmt: skip
@pytest.mark.parametrize(("window", "global_tokens"), [(None, 0), (2, 0), (16, 3), (200, 130), (2000, 4)])
def test_visible_blocks_are_the_mask(rows, window, global_tokens):  # trap K3
    layout = layout_of(2, 600, **rows)
    blocks = visible_blocks(layout, window, global_tokens)
    mask = create_mask(blocks.mask_mod, 2, 1, 600, 600, device="cpu")
    wanted = layout.attention_mask(window, global_tokens)
    wanted = torch.ones(600, 600).tril().bool() if wanted is None else wanted
    assert torch.equal(mask, wanted.expand(2, 1, 600, 600))
    tiles = functional.pad(mask[:, 0], (0, 40, 0, 40)).unflatten(2, (5, 128)).unflatten(1, (5, 128)).transpose(2, 3)
    # What the blocks leave out holds nothing to see, and what needs no mask is seen whole.
    assert torch.equal(blocks.to_dense().expand(2, 1, 5, 5)[:, 0].bool(), tiles.flatten(3).any(3))
    whole = torch.zeros(2, 5, 5, dtype=torch.bool)
    for row, query in itertools.product(range(2), range(5)):
        at = (row % blocks.shape[0], 0, query)
        whole[row, query, blocks.full_kv_indices[at][: blocks.full_kv_num_blocks[at]].long()] = True
    assert not (whole & ~tiles.flatten(3).all(3)).any()
    if global_tokens == 0:
        assert torch.equal(whole, tiles.flatten(3).all(3))


def test_document_edges_grow_by_doubling():
    # Every token a document of its own: 100 edges and the end.
    edges = document_edges(layout_of(1, 100, seq_idx=torch.arange(100)[None]), 1, 100)
    assert len(edges) == 128
    assert edges[:101].tolist() == list(range(101))
    assert edges[101:].eq(100).all()


ROWS: list[dict[str, Any]] = [
    {},
    {"seq_idx": packed_ids([7, 1, 12, 20], 2)},
    {"attention_mask": (torch.arange(40) >= torch.tensor([[0], [9]])).long()},
]


# The tracer looks at tensors that have no gradient of their own.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_blocks_are_whole_graphs_that_change_nothing(case):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = tiny_model(case), tokens(2, 40)
    losses = [model(ids, labels=ids, return_logits=False, **rows).loss for rows in ROWS]
    compile_parts(model, backend="eager")
    for rows, wanted in zip(ROWS, losses, strict=True):
        loss = model(ids, labels=ids, return_logits=False, **rows).loss
        loss.backward()
        assert torch.allclose(loss, wanted, rtol=1e-5)
    # Both layers share one form for each kind of rows; one more is the loss.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(ROWS) + 1
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fusible_form_of_the_loss_equals_the_one_in_place(dtype):
    logits = 5 * torch.randn(9, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    goal = torch.tensor([3, -100, 32, 0, 7, 7, -100, 1, 30])
    for got, wanted in zip(_errors_as_one(logits, goal), _errors(logits.clone(), goal), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)
