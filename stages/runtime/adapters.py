"""Adapters on a model: attached to a quantised or plain base, proven to matter, written and read in PEFT's format.

The model that training sees is PEFT's wrapper around ours: ``base_model.model.<our name>``; an adapted projection holds
the base layer, and A and B under ``lora_A`` and ``lora_B`` (and DoRA's lengths under ``lora_magnitude_vector``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.spec import ModelSpec
from stages.runtime import rng
from stages.runtime.manifest import CheckpointError
from stages.runtime.qlora_config import AdapterConfig, saved_names, target_names

ADAPTER_NAME = "default"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
Logits = Callable[[], torch.Tensor]


def peft_config(spec: ModelSpec, adapter: AdapterConfig) -> Any:
    """``adapter`` in PEFT's terms for a model of ``spec``; modules go by their full names."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.method == "dora",
        target_modules=target_names(spec, adapter),
        modules_to_save=saved_names(spec, adapter) or None,
        bias="none",
    )


def attach(model: Any, config: Any) -> Any:
    """Wrap ``model`` with fresh adapters; A is drawn from torch's generator, B is zero. Adapters are fp32.

    A 4-bit base is recognised by its layers.
    """
    from peft import get_peft_model

    # PEFT asks for this mark before it looks at the layers. It must not stay: TRL would cast the adapters to bf16.
    model.is_loaded_in_4bit = True
    try:
        with warnings.catch_warnings():
            # transformers is renaming what PEFT asks it for.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped = get_peft_model(model, config)
    finally:
        del model.is_loaded_in_4bit
    faults = [name for name, parameter in trainable(wrapped).items() if parameter.dtype != torch.float32]
    assert not faults, f"adapters must be fp32, whatever the base: {faults}"
    return wrapped


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer gets, by name: adapters and modules that are trained whole."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is switched on by itself when adapters are probed: one adapted projection, or one module trained whole."""

    name: str
    parameters: dict[str, nn.Parameter]


def units(model: nn.Module) -> list[Unit]:
    """All adapted projections and saved modules of a wrapped model."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        for mark in (".lora_A.", ".lora_B.", ".lora_magnitude_vector.", ".modules_to_save."):
            owner, sign, _ = name.partition(mark)
            if sign:
                found.setdefault(owner, {})[name] = parameter
    return [Unit(owner, parameters) for owner, parameters in found.items()]


def probe(model: Any, base: torch.Tensor, logits: Logits, loss: Logits) -> list[str]:
    """Reasons why freshly attached adapters are not what they must be; none is as it should be.

    ``base`` is what ``logits()`` gave before they were attached: with the adapters off, and with them as they start,
    it must come again bit for bit (TRAPS T11). Then each unit alone is moved a little and must change ``logits()``,
    and with all of them moved every parameter must get a gradient of ``loss()`` that is finite and not all zero (TRAPS
    K8). Weights, gradients and random streams are left as found.
    """
    faults = []
    with _kept(model), rng.undisturbed():
        torch.manual_seed(0)
        with torch.no_grad():
            with switched_off(model):
                faults += [] if torch.equal(logits(), base) else ["the model with its adapters off is not the base"]
            faults += [] if torch.equal(logits(), base) else ["the model with untrained adapters is not the base"]
        for unit in units(model):
            with _kept(model, unit), torch.no_grad():
                _move(unit)
                if torch.equal(logits(), base):
                    faults.append(f"{unit.name} changes no output: its weight is read past its forward")
        faults += _gradient_faults(model, loss)
    return faults


def _gradient_faults(model: nn.Module, loss: Logits) -> list[str]:
    for unit in units(model):
        _move(unit)
    names, parameters = zip(*trainable(model).items(), strict=True)
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    return [
        f"{name} gets no gradient"
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.any())
    ]


@contextlib.contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """The base alone, inside."""
    with model.disable_adapter():
        yield


def save_adapter(directory: Path, model: Any, *, base: str) -> int:
    """Write the adapters of a wrapped model as PEFT reads them; returns the bytes of the weights' file.

    ``base`` is how the configuration names the model that they belong to. The files of equal adapters are equal.

    Raises:
        CheckpointError: for an adapter that is empty, or that reads back other than it is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = adapter_state(model)
    if not state or not any(bool(tensor.any()) for name, tensor in state.items() if "lora_B" in name):
        raise CheckpointError(f"the adapter for {directory.name} is empty: nothing was trained; train before saving")
    save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = model.peft_config[ADAPTER_NAME].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    # Sets have no order of their own.
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    text = json.dumps(plain, indent=1, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    (directory / WEIGHTS_FILE).chmod((directory / CONFIG_FILE).stat().st_mode)
    again = load_file(directory / WEIGHTS_FILE)
    if again.keys() != state.keys() or not all(torch.equal(again[name], state[name]) for name in state):
        raise CheckpointError(f"{directory / WEIGHTS_FILE} reads back other than it was written; save it again")
    return (directory / WEIGHTS_FILE).stat().st_size


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The adapters' weights by PEFT's names, on the host and contiguous."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: state[name].detach().cpu().contiguous() for name in sorted(state)}


def put_state(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Give a wrapped model the adapters of another one.

    Raises:
        CheckpointError: when a name is missing on either side.
    """
    from peft import set_peft_model_state_dict

    result: Any = set_peft_model_state_dict(model, state)
    missing = sorted(name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name)
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"the adapter does not fit the model: missing {missing}, unknown {sorted(result.unexpected_keys)}"
        )


def merged(model: Any, state: dict[str, torch.Tensor], config: Any) -> Any:
    """``model`` (plain linear layers, any base) with the adapters ``state`` added into its weights; in place."""
    wrapped = attach(model, config)
    put_state(wrapped, state)
    return wrapped.merge_and_unload(progressbar=False)


def _move(unit: Unit) -> None:
    """A step that is small against the layer's output and large against rounding."""
    with torch.no_grad():
        for name, parameter in unit.parameters.items():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.1)
            elif ".lora_A." not in name:
                parameter.mul_(1.0 + 0.1 * torch.rand_like(parameter))


@contextlib.contextmanager
def _kept(model: nn.Module, unit: Unit | None = None) -> Iterator[None]:
    """Put the trainable parameters back afterwards."""
    parameters = list((trainable(model) if unit is None else unit.parameters).values())
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
