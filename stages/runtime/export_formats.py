"""The folders of an export: each is whole by itself, with tokenizer and licence beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tokenizer import INFO_FILE, TOKEN_BYTES_FILE, TOKENIZER_FILES
from model.export.gguf import Precision, write_gguf
from model.export.granite import granite_config, granite_state_dict
from model.export.remote_code import AUTO_MAP, FILE, remote_code
from model.export.vocabulary import read_vocabulary
from model.spec import ModelSpec
from stages.runtime.manifest import CheckpointError
from stages.runtime.weights import LICENSE, REPOSITORY

if TYPE_CHECKING:
    import torch

_BESIDE = (INFO_FILE, TOKEN_BYTES_FILE, "generation_config.json")


def write_huggingface(source: Path, directory: Path) -> None:
    """The model as it was trained, byte for byte, with its code in one file for programs that lack our package."""
    directory.mkdir()
    for path in sorted(source.glob("*.safetensors*")):
        shutil.copyfile(path, directory / path.name)
    config = json.loads((source / "config.json").read_bytes())
    _write_json(directory / "config.json", config | {"auto_map": AUTO_MAP})
    (directory / f"{FILE}.py").write_text(remote_code(), encoding="utf-8")
    _copy_beside(source, directory)


def write_granite(source: Path, directory: Path, spec: ModelSpec, model: Any) -> None:
    """The weights of ``model`` under GraniteMoeHybrid's names; transformers loads it without any other code."""
    from safetensors.torch import save_file

    directory.mkdir()
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = granite_config(spec, **ids)
    config.architectures = ["GraniteMoeHybridForCausalLM"]
    config.dtype = model.dtype
    config.save_pretrained(directory)
    tensors: dict[str, torch.Tensor] = granite_state_dict(model)
    if spec.tie_embeddings:
        del tensors["lm_head.weight"]
    path = directory / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod((directory / "config.json").stat().st_mode)
    _copy_beside(source, directory)


def write_gguf_file(source: Path, path: Path, spec: ModelSpec, precision: Precision, name: str) -> None:
    """One GGUF file, read from ``source`` tensor by tensor; its folder gets the licence."""
    path.parent.mkdir(exist_ok=True)
    write_gguf(path, spec, tensor_reader(source), read_vocabulary(source), precision, name=name)
    _copy_licence(path.parent)


def tensor_reader(directory: Path) -> Callable[[str], np.ndarray]:
    """A function from a parameter's name to its values in float32, read from the safetensors of ``directory``."""
    from safetensors import safe_open

    places = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        places.update(dict.fromkeys(file.keys(), file))

    def read(name: str) -> np.ndarray:
        if name not in places:
            raise CheckpointError(f"{directory} must hold {name}; it does not; make the parent anew")
        # Through torch, since numpy has no bfloat16.
        return places[name].get_tensor(name).float().numpy()

    return read


def _copy_beside(source: Path, directory: Path) -> None:
    for name in (*TOKENIZER_FILES, *_BESIDE):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    _copy_licence(directory)


def _copy_licence(directory: Path) -> None:
    licence = REPOSITORY / LICENSE
    if not licence.is_file():
        raise CheckpointError(f"{licence} is missing and must accompany every copy of the weights; restore it")
    shutil.copyfile(licence, directory / LICENSE)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
