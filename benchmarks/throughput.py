"""Training tokens a second on one GPU: our whole step under DeepSpeed ZeRO-1, the forward and backward pass alone, and
where the time goes by kind of kernel; beside it transformers' GraniteMoeHybrid of the same sizes in the same process.

    python benchmarks/throughput.py --preset hybrid_1b3 --micro-batch-size 8 --yardstick --breakdown

A step is forward and backward of each of its ``--micro-batches``, clipping and fused AdamW, with its one read of the
gradient norm; ``fwd_bwd`` is one micro-batch alone. ``tokens_per_s`` counts all of them. Both sides take random
tokens, fp32 parameters and bf16 autocast; the yardstick runs as the library ships it, so without compilation, and
without the output gate that it lacks. MFU counts the hybrid's own FLOPs and divides by ``peak_flops``, the dense bf16
peak of the vendor's data sheet, in fp8 too.
"""

from __future__ import annotations

import argparse
import collections
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, provenance, table, write_result

KERNEL_CLASSES = {
    "gated linear attention": ("gla", "chunk_fwd_kernel_h", "chunk_bwd_kernel_dh", "chunk_local_cumsum"),
    "state space": (
        *("chunk_scan", "chunk_state", "state_passing", "bmm_chunk", "chunk_cumsum"),  # mamba-ssm's
        *("prepare_kernel", "scan_kernel", "states_kernel", "between_kernel", "within_kernel"),  # ours
        *("gather_heads_kernel", "steps_kernel", "steps_backward_kernel"),
    ),
    "convolution": ("causal_conv1d", "conv_silu_kernel", "conv_silu_backward_kernel"),
    "gated norm": ("gated_norm_kernel", "gated_norm_backward_kernel"),
    "attention": ("sdpa", "fmha", "flash", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "scaled_mm"),
    "optimizer and clipping": ("adam", "multi_tensor", "lpnorm"),
    "8-bit casts": ("cast_kernel", "scale_kernel"),
    "loss": ("row_kernel", "error_kernel"),
    "fused elementwise": ("triton",),
}
"""Kinds of kernel by parts of their names; the first that fits counts, and what fits none is ``other``."""
TOKEN_IDS = {"eos_token_id": 0, "pad_token_id": 1}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", default="hybrid_1b3")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--micro-batches", type=int, default=1, help="forward and backward passes of a step")
    parser.add_argument("--steps", type=int, default=8, help="steps measured")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before, compilation included")
    parser.add_argument("--precision", choices=["bf16", "fp8", "fp8_torchao"], default="bf16")
    parser.add_argument("--residual", choices=["fp32", "bf16"], default="fp32", help="a recipe's pretrain.residual")
    parser.add_argument("--backend", action="append", default=[], metavar="MIXER=NAME", help="mamba2=mamba_ssm, say")
    parser.add_argument("--document-tokens", type=int, help="also step on packed documents of this mean length")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--yardstick", action="store_true", help="measure transformers' model too")
    parser.add_argument("--breakdown", action="store_true", help="profile one step of each")
    parser.add_argument("--kernels", type=int, default=0, help="print so many of the slowest kernels too")
    parser.add_argument("--commit", help="commit of the tree, where it is no checkout")
    parser.add_argument("--result", type=Path, default=RESULTS / "throughput.json")
    arguments = parser.parse_args(argv)
    rows, shares = measure(arguments)
    print(table(rows))
    if shares:
        print(table(shares))
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
    origin = provenance(arguments.commit)
    write_result(arguments.result, [row | origin for row in rows] + shares, settings)
    return 0


def measure(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    import torch

    from stages.runtime import distributed
    from stages.runtime.engine import prepare_environment

    prepare_environment()
    distributed.init_process_group()
    rows, shares = [], []
    for build in (our_model, yardstick_model) if arguments.yardstick else (our_model,):
        torch.manual_seed(0)
        name, model = build(arguments)
        for scope, document_tokens, step in scopes(model, arguments):
            micro_batches = arguments.micro_batches if scope == "step" else 1
            rows.append(row(arguments, name, scope, micro_batches, step) | {"document_tokens": document_tokens})
            print(rows[-1], flush=True)
            if arguments.breakdown and scope == "step" and document_tokens is None:
                shares += breakdown(name, step, arguments.kernels)
        del model, step
        gc.collect()
        torch.cuda.empty_cache()
    return rows, shares


def scopes(model: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, int | None, Callable[[], None]]]:
    """Scope, mean document length and a function that runs one; the engine is built when the second is asked for."""
    import torch

    dense = random_batch(arguments, model.config.vocab_size, None)
    n_tokens = float(dense["input_ids"].numel())

    def forward_backward() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**dense, num_items_in_batch=n_tokens, return_logits=False, use_cache=False).loss
        loss.backward()

    yield "fwd_bwd", None, forward_backward
    model.zero_grad(set_to_none=True)
    engine = engine_of(model, arguments)

    def step(batch: dict[str, Any]) -> None:
        for _ in range(arguments.micro_batches):
            engine.accumulate(batch, n_tokens * arguments.micro_batches)
        require_taken(engine.step(1e-4, refuse_nonfinite))

    yield "step", None, lambda: step(dense)
    if arguments.document_tokens and hasattr(model, "model"):
        packed = random_batch(arguments, model.config.vocab_size, arguments.document_tokens)
        yield "step", arguments.document_tokens, lambda: step(packed)


def refuse_nonfinite(norm: float) -> str | None:
    return None if math.isfinite(norm) else f"gradient norm {norm}"


def require_taken(outcome: tuple[float, str | None]) -> None:
    """A step that was left out costs no optimizer, and measures nothing.

    Raises:
        RuntimeError: for such a step.
    """
    if outcome[1] is not None:
        raise RuntimeError(f"the step was left out: {outcome[1]}")


def engine_of(model: Any, arguments: argparse.Namespace) -> Any:
    from model import init
    from stages.runtime import ds_config
    from stages.runtime.engine import TrainingEngine
    from stages.runtime.optimizer import adamw, parameter_groups

    config = ds_config.engine_config(
        ds_config.engine_facts("zero1"),
        global_batch_size=arguments.micro_batch_size * arguments.micro_batches,
        micro_batch_size=arguments.micro_batch_size,
        world_size=1,
        max_grad_norm=1.0,
        precision="bf16",
    )
    groups = parameter_groups(model, weight_decay=0.1, decay_embeddings=False, exempt=init.no_decay)
    return TrainingEngine(model, adamw(groups, betas=(0.9, 0.95), eps=1e-8), config)


def our_model(arguments: argparse.Namespace) -> tuple[str, Any]:
    """Our preset on the GPU, compiled by blocks."""
    import torch

    from model.block import compile_parts
    from model.config import HybridConfig
    from model.lm import HybridForCausalLM, model_backends
    from model.presets import preset
    from stages.runtime.pretraining_engine import prepare_model

    spec = with_backends(preset(arguments.preset), arguments.backend)
    with torch.device("cuda"):
        model: Any = HybridForCausalLM(HybridConfig.from_spec(spec, **TOKEN_IDS)).train()
    prepare_model(model, recipe_fields(arguments))
    if arguments.precision == "fp8_torchao":
        to_torchao_fp8(model.model)
    if not arguments.eager:
        compile_parts(model)
    print("\n".join(model_backends(model)))
    return "pedigree", model


def with_backends(spec: Any, chosen: Sequence[str]) -> Any:
    """``spec`` with ``mixer=backend`` for each of ``chosen``."""
    backends = dict(one.split("=", 1) for one in chosen)
    fields = spec.model_dump()
    for mixer in fields["mixers"].values():
        mixer["backend"] = backends.get(mixer["mixer"], mixer["backend"])
    return type(spec)(**fields)


def recipe_fields(arguments: argparse.Namespace) -> argparse.Namespace:
    """What of a recipe's pretrain stage decides how the model computes."""
    precision = "bf16" if arguments.precision == "fp8_torchao" else arguments.precision
    return argparse.Namespace(precision=precision, residual=arguments.residual, activation_checkpointing=False)


def to_torchao_fp8(blocks: Any) -> None:
    """torchao's dynamic tensorwise fp8 in the projections that ours takes."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    from model.fp8 import takes

    def is_large(module: Any, name: str) -> bool:
        return takes(module.in_features, module.out_features)

    convert_to_float8_training(blocks, config=Float8LinearConfig(), module_filter_fn=is_large)


def yardstick_model(arguments: argparse.Namespace) -> tuple[str, Any]:
    """transformers' GraniteMoeHybrid with the preset's sizes and without what it lacks, behind our model's call."""
    import torch
    from torch import nn
    from transformers import GraniteMoeHybridForCausalLM

    from model.export.granite import granite_config
    from model.presets import preset
    from model.spec import ModelSpec

    fields = preset(arguments.preset).model_dump()
    for mixer in fields["mixers"].values():
        mixer |= {"output_gate": False} if mixer["mixer"] == "attention" else {"chunk_size": 256}
    config = granite_config(ModelSpec(**fields), **TOKEN_IDS)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        library: Any = GraniteMoeHybridForCausalLM(config).float().train()

    class Yardstick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.library, self.config = library, config
            self.get_input_embeddings = library.get_input_embeddings
            self.get_output_embeddings = library.get_output_embeddings

        def forward(self, input_ids: Any, labels: Any, num_items_in_batch: float, **ours: Any) -> Any:
            return self.library(input_ids, labels=labels, use_cache=False, num_items_in_batch=num_items_in_batch)

    return "transformers GraniteMoeHybrid", Yardstick()


def random_batch(arguments: argparse.Namespace, vocab_size: int, document_tokens: int | None) -> dict[str, Any]:
    """Random tokens; with a mean length given, documents that end after each token with a chance of one in it."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (arguments.micro_batch_size, arguments.seq_len)
    ids = torch.randint(5, vocab_size, shape, generator=generator).cuda()
    batch = {"input_ids": ids, "labels": ids}
    if document_tokens is not None:
        starts = torch.rand(shape, generator=generator) < 1 / document_tokens
        batch["seq_idx"] = starts.long().cumsum(1).cuda()
    return batch


def row(
    arguments: argparse.Namespace, name: str, scope: str, micro_batches: int, step: Callable[[], None]
) -> dict[str, Any]:
    """Time ``step`` and say how fast it is, in the words of every throughput row."""
    import torch

    from model.cost import training_flops_per_token
    from model.presets import preset
    from stages.runtime.progress import peak_flops

    started = time.perf_counter()
    for _ in range(arguments.warm_up):
        step()
    torch.cuda.synchronize()
    warm_up_s = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(arguments.steps):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / arguments.steps
    tokens_per_s = micro_batches * arguments.micro_batch_size * arguments.seq_len / seconds
    peak = peak_flops(torch.cuda.get_device_name())
    flops = tokens_per_s * training_flops_per_token(preset(arguments.preset), arguments.seq_len)
    return {
        "implementation": name,
        "preset": arguments.preset,
        "scope": scope,
        "precision": arguments.precision if name == "pedigree" else "bf16",
        "tokens_per_s": round(tokens_per_s),
        "micro_batch_size": arguments.micro_batch_size,
        "micro_batches": micro_batches,
        "seq_len": arguments.seq_len,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "residual": arguments.residual if name == "pedigree" else "fp32",
        "mfu": round(flops / peak, 4) if peak and name == "pedigree" else None,
        "peak_flops": peak,
        "warm_up_s": round(warm_up_s, 1),
    }


def breakdown(name: str, step: Callable[[], None], kernels: int) -> list[dict[str, Any]]:
    """Milliseconds of one step by kind of kernel, most first, and of no kernel at all (``idle``)."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    spent: collections.Counter[str] = collections.Counter()
    single: collections.Counter[str] = collections.Counter()
    for event in profiler.key_averages():
        spent[kernel_class(event.key)] += event.self_device_time_total
        single[f"x{event.count} [{kernel_class(event.key)}] {event.key[:120]}"] += event.self_device_time_total
    for kernel, us in single.most_common(kernels):
        print(f"{us / 1e3:9.2f} ms {kernel}")
    kernel_times = [event.time_range for event in profiler.events() if event.device_type == DeviceType.CUDA]
    spent["idle"] = round(idle_us([(time.start, time.end) for time in kernel_times]))
    total = sum(spent.values())
    return [
        {"implementation": name, "kernels": kind, "ms": round(us / 1e3, 2), "share": round(us / total, 4)}
        for kind, us in spent.most_common()
    ]


def idle_us(spans: Sequence[tuple[float, float]]) -> float:
    """Microseconds between the first start and the last end of ``spans`` (start, end) that none of them covers."""
    idle, until = 0.0, math.inf
    for start, end in sorted(spans):
        idle += max(0.0, start - until)
        until = end if until == math.inf else max(until, end)
    return idle


def kernel_class(kernel: str) -> str:
    lowered = kernel.lower()
    return next((kind for kind, parts in KERNEL_CLASSES.items() if any(part in lowered for part in parts)), "other")


if __name__ == "__main__":
    raise SystemExit(main())
