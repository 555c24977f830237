"""Our Triton scan of Mamba-2 on one GPU: against the recurrence in fp64, then its time, forward and backward apart.

    python benchmarks/ssd.py                      # the shipped plan, parity and times
    python benchmarks/ssd.py --explore            # also every plan of a small list, with the time of each kernel
    python benchmarks/ssd.py --yardstick          # mamba-ssm beside it, whose autotuning takes a minute or two

Times are medians over repeated passes between CUDA events; all inputs together are far larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import RESULTS, table, write_result

SHAPES = {"hybrid_1b3": (8, 4096, 64, 64, 1, 128), "chimera_700m": (16, 4096, 48, 64, 1, 128)}
"""Presets by batch, time, heads, head_dim, groups, d_state."""
SMALL = [(2, 333, 4, 64, 1, 128), (1, 130, 2, 128, 1, 64), (2, 200, 4, 64, 2, 64), (1, 129, 2, 128, 1, 128)]
NAMES = ("y", "d_x", "d_step", "d_rate", "d_b", "d_c", "d_skip")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", action="append", choices=sorted(SHAPES), help="of which shape; default: all")
    parser.add_argument("--document-tokens", type=int, default=700, help="mean length of packed documents")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--explore", action="store_true", help="time other plans too, kernel by kernel")
    parser.add_argument("--yardstick", action="store_true", help="time mamba-ssm in the same run")
    parser.add_argument("--no-parity", action="store_true", help="skip the comparison with the recurrence")
    parser.add_argument("--result", type=Path, default=RESULTS / "ssd.json")
    arguments = parser.parse_args(argv)
    rows = [] if arguments.no_parity else parity()
    if rows:
        print(table(rows), flush=True)
    timed = [row for name in arguments.preset or SHAPES for row in times(name, arguments)]
    print(table(timed), flush=True)
    if arguments.explore:
        rows += explore(SHAPES[(arguments.preset or list(SHAPES))[0]])
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
    write_result(arguments.result, rows + timed, settings)
    return 0


def draw(shape: tuple[int, ...], document_tokens: int | None) -> dict[str, Any]:
    """Random inputs as the model's layer makes them: x, B and C views of one buffer, steps and rates of its start."""
    import torch

    batch, time, heads, width, groups, states = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Any:
        return torch.randn(*size, generator=generator, device="cuda")

    buffer = normal(batch, time, heads * width + 2 * groups * states).bfloat16()
    x, b, c = buffer.split([heads * width, groups * states, groups * states], -1)
    seq_idx = None
    if document_tokens is not None:
        starts = torch.rand(batch, time, generator=generator, device="cuda") < 1 / document_tokens
        seq_idx = starts.int().cumsum(1, dtype=torch.int32)
    return {
        "x": x.unflatten(-1, (heads, width)),
        "step": torch.nn.functional.softplus(normal(batch, time, heads) - 4.0),
        "rate": -torch.linspace(1.0, 16.0, heads, device="cuda"),
        "b": b.unflatten(-1, (groups, states)),
        "c": c.unflatten(-1, (groups, states)),
        "skip": normal(heads),
        "seq_idx": seq_idx,
    }


def gradients(inputs: dict[str, Any], d_y: Any, plan: Any = None) -> dict[str, Any]:
    """Of every input, in buffers that held nothing finite before."""
    import torch

    from model.kernels.ssd_triton import ssd_backward

    outs = [torch.full_like(inputs[name], float("nan")) for name in ("x", "b", "c")]
    d_step, d_rate, d_skip = ssd_backward(d_y, *inputs.values(), *outs, plan=plan)
    return dict(zip(NAMES[1:], (outs[0], d_step, d_rate, outs[1], outs[2], d_skip), strict=True))


def parity() -> list[dict[str, Any]]:
    """Norm of the difference from fp64's results over their norm, for every small shape, dense and packed."""
    import torch

    from model.kernels.ssd_triton import ssd_forward

    rows = []
    for shape in SMALL:
        for document_tokens in (None, 20):
            inputs = draw(shape, document_tokens)
            d_y = torch.randn(shape[:4], device="cuda").bfloat16()
            y = ssd_forward(*inputs.values())
            ours = {"y": y, **gradients(inputs, d_y)}
            again = {"y": ssd_forward(*inputs.values()), **gradients(inputs, d_y)}
            wanted = recurrence(inputs, d_y)
            gaps = {n: float((ours[n].double() - wanted[n]).norm() / wanted[n].norm()) for n in NAMES}
            same = all(torch.equal(ours[n], again[n]) for n in NAMES)
            rows.append({"shape": "x".join(map(str, shape)), "packed": document_tokens is not None, **gaps})
            rows[-1] |= {"same_bits_twice": same, "passes": same and max(gaps.values()) < 0.02}
    return rows


def recurrence(inputs: dict[str, Any], d_y: Any) -> dict[str, Any]:

    from model.boundaries import resolve_layout
    from model.mixers.mamba2 import ssd_recurrence

    names = ("x", "step", "rate", "b", "c", "skip")
    leaves = {n: inputs[n].double().detach().clone().requires_grad_() for n in names}
    x, seq_idx = leaves["x"], inputs["seq_idx"]
    packed = {} if seq_idx is None else {"seq_idx": seq_idx.long()}
    layout = resolve_layout(*x.shape[:2], x.device, **packed)
    step = leaves["step"]
    y, _ = ssd_recurrence(x * step[..., None], leaves["rate"] * step, leaves["b"], leaves["c"], layout, None, 64)
    y = y + leaves["skip"][:, None] * x
    y.backward(d_y.double())
    return {"y": y.detach(), **{f"d_{n}": leaf.grad for n, leaf in leaves.items()}}


def times(preset: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of each implementation, dense and packed."""
    import torch

    from model.kernels import ssd, ssd_triton

    rows = []
    for document_tokens in (None, arguments.document_tokens):
        inputs = draw(SHAPES[preset], document_tokens)
        d_y = torch.randn(SHAPES[preset][:4], device="cuda").bfloat16()
        *parts, seq_idx = inputs.values()
        outs = [torch.empty_like(inputs[name]) for name in ("x", "b", "c")]
        passes: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "ours": (
                lambda inputs=inputs: ssd_triton.ssd_forward(*inputs.values()),
                lambda inputs=inputs, d_y=d_y, outs=outs: ssd_triton.ssd_backward(d_y, *inputs.values(), *outs),
            )
        }
        if arguments.yardstick:
            y = ssd.ssd_scan(*parts, seq_idx, 256)
            passes["mamba_ssm"] = (
                lambda parts=parts, seq_idx=seq_idx: ssd.ssd_scan(*parts, seq_idx, 256),
                lambda d_y=d_y, parts=parts, y=y, seq_idx=seq_idx: ssd.ssd_scan_gradients(d_y, *parts, y, seq_idx, 256),
            )
            compare(inputs, d_y, y, passes["mamba_ssm"][1]())
        for name, (forward, backward) in passes.items():
            spent = median_ms(forward, arguments.repeats), median_ms(backward, arguments.repeats)
            rows.append({"preset": preset, "implementation": name, "document_tokens": document_tokens})
            rows[-1] |= {"forward_ms": spent[0], "backward_ms": spent[1], "total_ms": sum(spent)}
    return rows


def compare(inputs: dict[str, Any], d_y: Any, y: Any, theirs: tuple[Any, ...]) -> None:
    """Print how far ours and mamba-ssm's results are apart at the full shape."""
    from model.kernels.ssd_triton import ssd_forward

    ours = {"y": ssd_forward(*inputs.values()), **gradients(inputs, d_y)}
    wanted = dict(zip(NAMES, (y, *theirs), strict=True))
    gaps = {n: float((ours[n].float() - wanted[n].float()).norm() / wanted[n].float().norm()) for n in NAMES}
    print("from mamba_ssm:", {name: round(gap, 5) for name, gap in gaps.items()}, flush=True)


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    import torch

    for _ in range(3):
        call()
    edges = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in edges:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in edges)


def plans(base: Any) -> dict[str, Any]:
    """The shipped plan and others that change one kernel each, by name."""
    from model.kernels.tiles import Tiles

    found = {"shipped": base}
    for kernel, warps, stages in [
        *(("scan", w, s) for w, s in ((4, 1), (4, 3))),
        *(("states", w, s) for w, s in ((4, 3), (4, 6), (8, 4))),
        *(("between", w, s) for w, s in ((4, 1), (8, 2), (8, 3))),
        *(("within", w, s) for w, s in ((4, 1), (4, 3))),
    ]:
        tiles = replace(getattr(base, kernel), warps=warps, stages=stages)
        found[f"{kernel} warps {warps} stages {stages}"] = replace(base, **{kernel: tiles})
    found["states width 32"] = replace(base, states=replace(base.states, width=32))
    for stages in (1, 2):
        tiles = {name: replace(getattr(base, name), warps=8, stages=stages) for name in ("between", "within")}
        found[f"chunks of 128 stages {stages}"] = replace(
            base, backward_size=128, states=Tiles(warps=8, stages=stages + 1), **tiles
        )
    for heads in (16, 64):
        found[f"heads {heads}"] = replace(base, heads_per_block=heads)
    return found


def explore(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """Microseconds of each kernel under each plan; a plan that does not run says why."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from model.kernels.ssd_triton import plan_for, ssd_backward, ssd_forward

    inputs, rows = draw(shape, None), []
    d_y = torch.randn(shape[:4], device="cuda").bfloat16()
    outs = [torch.empty_like(inputs[name]) for name in ("x", "b", "c")]
    for name, plan in plans(plan_for(shape[3], shape[5])).items():
        try:
            for repeat in range(2):
                with profile(activities=[ProfilerActivity.CUDA]) as found:
                    for _ in range(1 + 4 * repeat):
                        ssd_forward(*inputs.values(), plan=plan)
                        ssd_backward(d_y, *inputs.values(), *outs, plan=plan)
                    torch.cuda.synchronize()
        except Exception as error:
            print(f"{name}: {type(error).__name__} {str(error)[:200]}", flush=True)
            continue
        spent = {event.key: event.device_time_total / 5 for event in found.key_averages()}
        rows.append({"plan": name} | {key[:16]: value for key, value in spent.items() if value > 5})
        print({key: value if key == "plan" else round(value) for key, value in rows[-1].items()}, flush=True)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
