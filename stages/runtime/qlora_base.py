"""The base of QLoRA: linear projections stored in four bits, everything else as it was, all of it frozen.

NF4 has sixteen levels at the quantiles of a normal distribution; each block of weights is divided by its largest
magnitude, and with double quantisation those magnitudes are stored in eight bits (Dettmers et al. 2023,
arXiv:2305.14314, section 3). Weights are dequantised for each product, so no arithmetic is done in four bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class BaseBytes:
    """Bytes of the frozen base as it is held, and of the same parameters in fp32; buffers and codes included."""

    held: int
    fp32: int


def quantise(model: nn.Module, names: Collection[str], *, blocksize: int, double_quant: bool) -> BaseBytes:
    """Put NF4 layers in the place of the linear layers ``names`` and freeze the whole model, in place.

    The result depends on the weights alone: ranks, and a run that is resumed, build the same base.

    Raises:
        ValueError: for a name that is no plain ``nn.Linear`` without a bias.
    """
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or layer.bias is not None:
            raise ValueError(f"{name} must be a linear layer without a bias to be quantised; got {layer}")
        model.set_submodule(name, _nf4(layer, blocksize, double_quant))
    model.requires_grad_(False)
    return base_bytes(model)


def copy_dequantised(quantised: nn.Module, plain: nn.Module) -> None:
    """Give ``plain``, the same model with linear layers, the values that the NF4 layers of ``quantised`` stand for.

    ``quantised`` may be wrapped with adapters.
    """
    import bitsandbytes as bnb

    layers = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): layer
        for name, layer in quantised.named_modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    }
    with torch.no_grad():
        for name, layer in layers.items():
            weight: Any = plain.get_submodule(name).weight
            weight.copy_(dequantised_weight(layer))


def dequantised_weight(layer: Any) -> torch.Tensor:
    """The weight (outputs, inputs) that an NF4 layer multiplies with, in fp32."""
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def base_bytes(model: nn.Module) -> BaseBytes:
    """Bytes of the frozen parameters: packed codes, block magnitudes, and whatever was not quantised."""
    held: dict[int, int] = {}
    fp32 = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        state = getattr(parameter, "quant_state", None)
        fp32 += 4 * (parameter.numel() if state is None else state.shape.numel())
        for tensor in [parameter, *([] if state is None else _state_tensors(state))]:
            # Code books are shared by the layers.
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return BaseBytes(sum(held.values()), fp32)


def _nf4(linear: nn.Linear, blocksize: int, double_quant: bool) -> nn.Module:
    import bitsandbytes as bnb

    weight = linear.weight.detach()
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        # Left open, the dtype of whatever comes first would be kept for good.
        compute_dtype=torch.float32,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",
    )
    # On CPUs with AVX512-BF16 the layer would repack itself when it is first evaluated, and round to bf16 from then on.
    layer.support_avx512bf16_for_cpu = False
    packed: Any = bnb.nn.Params4bit(
        weight.float(),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=layer,
    )
    # Moving it is what packs it.
    layer.weight = packed.to(weight.device)
    return layer


def _state_tensors(state: Any) -> list[torch.Tensor]:
    """Block magnitudes and code books; the magnitudes' own where they are quantised too."""
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [state.absmax, state.code, *nested]
