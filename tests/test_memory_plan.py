"""Memory of the kernel path against what torch's partitioner decides to keep, and figures worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional

from model import cost
from model.activations import _kernel_block_bytes
from model.block import Block
from model.boundaries import resolve_layout
from model.mixers import Mixer, attention
from model.presets import preset
from model.spec import ModelSpec
from stages.pretrain import PretrainConfig
from stages.runtime import settings

MIXERS: dict[str, dict[str, Any]] = {
    "m": {"mixer": "mamba2", "d_state": 64, "head_dim": 64, "backend": "mamba_ssm"},
    "g": {"mixer": "gla", "n_heads": 4, "head_k_dim": 64, "head_v_dim": 128, "backend": "fla"},
    "gated": {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "output_gate": True},
    "normed": {
        "mixer": "attention",
        "n_heads": 4,
        "n_kv_heads": 4,
        "head_dim": 128,
        "qk_norm": True,
        "output_gate": True,
    },
}


def spec_of(word: str) -> ModelSpec:
    dims = {"d_model": 256, "d_ff": 384, "vocab_size": 96, "max_seq_len": 512}
    return ModelSpec.model_validate({**dims, "layers": word, "mixers": {word: MIXERS[word]}})


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In the place of cuDNN's kernel, which keeps the same: q, k, v, o and a sum a query."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Fills with the tensors that the forward pass of a block hands to backward; kernels run in shape alone."""
    found: list[torch.Tensor] = []
    # DeepSpeed's ZeRO-3 leaves its own function there for the rest of the process.
    monkeypatch.setattr(functional, "linear", torch._C._nn.linear)
    monkeypatch.setattr(Mixer, "takes", lambda self, name, tensor: name in self.kernels_in_use)
    monkeypatch.setattr(attention, "attend_cudnn", sdpa)

    def partition(module: Any, inputs: Any, *, num_fwd_outputs: int, **named: Any) -> Any:
        parts = min_cut_rematerialization_partition(module, inputs, num_fwd_outputs=num_fwd_outputs, **named)
        outputs = next(node for node in parts[0].graph.nodes if node.op == "output").args[0]
        found.extend(
            node.meta["val"] for node in outputs[num_fwd_outputs:] if isinstance(node.meta["val"], torch.Tensor)
        )
        return parts

    def backend(module: Any, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func

        def plain(graph: Any, _: Any) -> Any:
            return make_boxed_func(graph.forward)

        return aot_module_simplified(
            module, inputs, fw_compiler=plain, bw_compiler=plain, partition_fn=partition,
            decompositions=select_decomp_table(),
        )  # fmt: skip

    monkeypatch.setattr(
        Block, "trace", lambda self: self.compile(fullgraph=True, dynamic=False, backend=backend), False
    )
    return found


@pytest.mark.parametrize(("word", "residual"), [*((word, "bf16") for word in MIXERS), ("gated", "fp32")])
def test_a_compiled_block_keeps_what_the_plan_counts(word, residual, kept):
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec, batch, time = spec_of(word), 3, 320
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        block = Block(spec.mixers[word], spec)
        block.mixer.use_backend("sdpa_cudnn" if spec.mixers[word].mixer == "attention" else MIXERS[word]["backend"])
        x = torch.empty(batch, time, 256, dtype=torch.bfloat16 if residual == "bf16" else torch.float32)
        layout = resolve_layout(batch, time, x.device)
        with torch.autocast("cpu", torch.bfloat16):
            block.mixer.prepare(x, layout)
            block.trace()
            block(x.requires_grad_(), layout)
    # What has a row a token; weights, their casts and the rotary angles of all rows have not.
    rows = [tensor for tensor in kept if tensor.numel() % (batch * time) == 0 and tensor.numel() >= batch * time]
    measured = sum(tensor.numel() * tensor.element_size() for tensor in rows) / (batch * time)
    path = cost.Path(kernels=True, residual=residual, packed=False)
    assert measured == pytest.approx(_kernel_block_bytes(spec, spec.mixers[word], "bf16", path), rel=1e-3)


def test_packed_rows_keep_a_key_and_a_value_for_every_query_head():
    spec = spec_of("gated")  # 4 query heads and 2 of keys, 64 wide: 2 x 2 x 64 more elements of 2 bytes
    packed, dense = (
        cost.activation_bytes(spec, 64, 1, False, "bf16", cost.Path(kernels=True, packed=how)) for how in (True, False)
    )
    assert packed - dense == 64 * 2 * (2 * 64) * 2


def test_our_own_scan_keeps_neither_the_convolutions_result_nor_the_steps():
    path = cost.Path(kernels=True)
    kept = {}
    for backend in ("mamba_ssm", "triton"):
        spec = ModelSpec.model_validate(
            spec_of("m").model_dump() | {"mixers": {"m": MIXERS["m"] | {"backend": backend}}}
        )
        kept[backend] = cost.activation_bytes(spec, 64, 1, False, "bf16", path)
    # 512 inner and 2 x 64 state channels in bf16; 8 heads in fp32.
    assert kept["mamba_ssm"] - kept["triton"] == 64 * (2 * (512 + 2 * 64) + 4 * 8)


def test_eight_bit_products_keep_half_the_bytes_of_their_inputs():
    model = preset("hybrid_1b3")
    bf16, fp8, several = (
        cost.memory_per_gpu(
            model, zero_stage=1, world_size=1, micro_batch_size=8, seq_len=4096, precision=precision,
            path=cost.Path(kernels=True, residual="bf16"), accumulation_steps=steps,
        )
        for precision, steps in (("bf16", 1), ("fp8", 1), ("fp8", 2))
    )  # fmt: skip
    assert fp8.activations_bytes < bf16.activations_bytes
    # All projections but twelve of keys and values (2048 x 512), which stay in bf16.
    sizes = 24 * 3 * 2048 * 4096 + 18 * (2048 * 8512 + 4096 * 2048) + 6 * 3 * 2048 * 2048
    assert fp8.casts_bytes == sizes + 2 * 12 * 2048 * 512
    assert bf16.casts_bytes == 2 * (sizes + 12 * 2048 * 512)
    # Between micro-batches they stay both as they are and turned.
    assert several.casts_bytes == fp8.casts_bytes + sizes


def test_with_one_micro_step_gradients_do_not_stand_beside_activations():
    facts = {"zero_stage": 1, "world_size": 1, "micro_batch_size": 8, "seq_len": 4096, "path": cost.Path(kernels=True)}
    one, several = (cost.memory_per_gpu(preset("hybrid_1b3"), **facts, accumulation_steps=n) for n in (1, 4))
    gradients = cost.gradient_bytes(preset("hybrid_1b3"), zero_stage=1, world_size=1)
    assert one.gradients_bytes == 0
    assert several.total_bytes - one.total_bytes == gradients + several.buffers_bytes
    tiny = cost.memory_per_gpu(
        preset("hybrid_1b3"), **facts | {"seq_len": 8, "micro_batch_size": 1}, accumulation_steps=1
    )
    assert (tiny.gradients_bytes, tiny.activations_bytes) == (gradients, 0)


# Kernel of Mamba-2, precision, whether rows are packed, and bytes allocated at most in a whole step on one H200
# (2026-11-22). When mamba_ssm was measured, SwiGLU's product (2 bytes of d_ff a token and block) was still kept.
MEASURED = [
    ("mamba_ssm", "bf16", False, 88_273_516_032 - 24 * 2 * 4096 * 8 * 4096),
    ("mamba_ssm", "bf16", True, 89_513_061_376 - 24 * 2 * 4096 * 8 * 4096),
    ("triton", "bf16", False, 75_907_027_968),
    ("triton", "bf16", True, 77_145_786_880),
    ("triton", "fp8", False, 69_688_764_928),
]


@pytest.mark.parametrize(("kernel", "precision", "packed", "measured"), MEASURED)
def test_the_plan_is_within_a_tenth_of_what_a_gpu_allocated(kernel, precision, packed, measured):
    fields = preset("hybrid_1b3").model_dump()
    fields["mixers"]["mamba2"]["backend"] = kernel
    estimate = cost.memory_per_gpu(
        ModelSpec.model_validate(fields), zero_stage=1, world_size=1, micro_batch_size=8, seq_len=4096,
        precision=precision, path=cost.Path(kernels=True, residual="bf16", packed=packed), accumulation_steps=1,
    )  # fmt: skip
    assert estimate.total_bytes == pytest.approx(measured, rel=0.1)


def test_the_plan_says_which_path_it_assumes():
    plain = {
        "kind": "pretrain",
        "seq_len": 4096,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "max_steps": 9,
        "lr": 1e-4,
    }
    plans = [
        settings.plan(PretrainConfig.model_validate(plain | more), preset("hybrid_1b3"), 1, length=4096)
        for more in ({"compile": True, "residual": "bf16"}, {"compile": True}, {})
    ]
    assert [plan["memory_assumes"] for plan in plans] == [
        *["kernels in compiled blocks"] * 2,
        "PyTorch operators, uncompiled",
    ]
    narrow, wide, torch_path = (plan["memory_per_gpu_bytes"] for plan in plans)
    assert narrow < wide < torch_path
