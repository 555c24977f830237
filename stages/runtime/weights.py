"""What stages hand each other: weights as safetensors in Hugging Face layout, tokenizer and licence beside them.

Nothing here is pickled (TRAPS O3). Under ZeRO-3 each parameter is gathered alone, so that no rank ever holds more than
one whole parameter on its device.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.tokenizer import INFO_FILE, TOKEN_BYTES_FILE, TOKENIZER_FILES
from stages.runtime import distributed
from stages.runtime.manifest import MANIFEST, CheckpointError, sealed_digest, verify_manifest
from stages.runtime.parents import unchanged

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).resolve().parents[2]
LICENSE = "MODEL_LICENSE"


def save_weights(directory: Path, model: Any, tokenizer_dir: Path | None) -> None:
    """Write ``model`` (a transformers model, not its engine) with tokenizer and licence; collective over all ranks.

    Weights keep the dtype that the model holds them in. They are read back and compared bit for bit at once. No
    manifest is written: the lifecycle seals the folder that this one is in.

    Raises:
        CheckpointError: when what was written differs from the model, or the tokenizer or licence is missing.
    """
    state = _gathered_state(model)
    distributed.on_rank_zero(lambda: _write(directory, model, state, tokenizer_dir))


def load_weights(directory: Path, model: Any, digest: str | None = None) -> str:
    """Verify ``directory`` against its manifest, then load its safetensors into ``model``, name for name.

    The manifest lies in ``directory`` or in its parent (a sealed output that holds the model in a folder). Collective;
    returns the manifest's SHA-256, which must be ``digest`` where rank 0 gives one. Values are cast to the dtype that
    the model holds.

    Raises:
        CheckpointError: for a faulty file, names or shapes that do not fit the model, or another output that took the
            place of this one since ``digest`` was recorded or while it was read.
    """
    sealed = next((folder for folder in (directory, directory.parent) if (folder / MANIFEST).is_file()), directory)
    began = distributed.on_rank_zero(lambda: digest or sealed_digest(sealed))
    with unchanged(sealed, began):
        found = distributed.on_rank_zero(lambda: verify_manifest(sealed))
        _load(directory, model)
        # Nobody looks whether it is still the same before everybody has read it.
        distributed.barrier()
    return found


def _load(directory: Path, model: Any) -> None:
    stored = dict(_stored_tensors(directory))
    targets = dict(model.named_parameters()) | _persistent_buffers(model)
    tied = _tied_names(model)
    faults = [f"{name} is missing" for name in sorted(targets.keys() - stored.keys() - tied)]
    faults += [f"{name} is not in the model" for name in sorted(stored.keys() - targets.keys() - tied)]
    for name in sorted(stored.keys() & targets.keys()):
        shape = getattr(targets[name], "ds_shape", targets[name].shape)
        if tuple(stored[name].get_shape()) != tuple(shape):
            faults.append(f"{name} has shape {stored[name].get_shape()}, the model {list(shape)}")
    if faults:
        raise CheckpointError(f"{directory} does not fit the model: {'; '.join(faults)}; check the model section")
    _copy_in(stored, targets)


def _gathered_state(model: Any) -> dict[str, torch.Tensor]:
    """Names to whole tensors on the host, on rank 0; an empty dict on other ranks when parameters are partitioned."""
    whole = model.state_dict(keep_vars=True)
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return {name: tensor.detach() for name, tensor in whole.items()}
    state: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, tensor in whole.items():
        # One copy for tied names: the writer recognises a tie by its shared memory.
        if id(tensor) not in seen:
            with _gathered([tensor]):
                seen[id(tensor)] = tensor.detach().to("cpu", copy=True) if distributed.rank() == 0 else tensor.detach()
        state[name] = seen[id(tensor)]
    return state if distributed.rank() == 0 else {}


@contextlib.contextmanager
def _gathered(tensors: list[Any], modifier_rank: int | None = None) -> Iterator[None]:
    """Make partitioned parameters whole for a moment; nothing for plain tensors."""
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield


def _write(directory: Path, model: Any, state: dict[str, torch.Tensor], tokenizer_dir: Path | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    # A copy of the dict: save_pretrained empties the one it is given.
    model.save_pretrained(directory, state_dict=dict(state))
    for path in directory.glob("*.safetensors"):
        # safetensors writes for the owner alone; a server under another user must be able to read a model.
        path.chmod((directory / "config.json").stat().st_mode)
    if tokenizer_dir is not None:
        _copy_tokenizer(tokenizer_dir, directory)
    # Last, so that whatever came to lie there is compared.
    _compare(directory, state, _tied_names(model))
    licence = REPOSITORY / LICENSE
    if not licence.is_file():
        raise CheckpointError(f"{licence} is missing and must accompany every copy of the weights; restore it")
    shutil.copyfile(licence, directory / LICENSE)


def _copy_tokenizer(source: Path, directory: Path) -> None:
    if not (source / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{source} must hold a tokenizer; got no tokenizer_config.json; run the tokenizer stage")
    # By name: a parent's folder holds its weights too, and they must not come along.
    for name in (*TOKENIZER_FILES, INFO_FILE, TOKEN_BYTES_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _compare(directory: Path, state: dict[str, torch.Tensor], tied: set[str]) -> None:
    import torch

    stored = dict(_stored_tensors(directory))
    lost = sorted(state.keys() - stored.keys() - tied)
    if lost:
        raise CheckpointError(f"{directory} lacks {lost} after writing; save again on a healthy disk")
    for name, reader in stored.items():
        written, held = reader.read(), state[name].detach().cpu()
        # Compared as bytes, so that a NaN equals itself and a changed dtype does not pass.
        same = written.dtype == held.dtype and written.shape == held.shape
        if not same or not torch.equal(_as_bytes(written), _as_bytes(held)):
            raise CheckpointError(f"{directory}: {name} reads back different from the model; save again")


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


class _Stored:
    """One tensor of a safetensors file, read when asked for."""

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self._name = name

    def get_shape(self) -> list[int]:
        return self._file.get_slice(self._name).get_shape()

    def read(self) -> torch.Tensor:
        return self._file.get_tensor(self._name)


def _stored_tensors(directory: Path) -> Iterator[tuple[str, _Stored]]:
    from safetensors import safe_open

    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{directory} must hold *.safetensors; found none; name a finished training stage")
    for path in paths:
        file = safe_open(path, framework="pt")
        yield from ((name, _Stored(file, name)) for name in file.keys())  # noqa: SIM118 - not a mapping


def _tied_names(model: Any) -> set[str]:
    """Names that the model reads from another one's memory, such as a tied head."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def _persistent_buffers(model: Any) -> dict[str, torch.Tensor]:
    names = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def _copy_in(stored: dict[str, _Stored], targets: dict[str, torch.Tensor]) -> None:
    import torch

    for name in sorted(stored.keys() & targets.keys()):
        target = targets[name]
        with _gathered([target], modifier_rank=0), torch.no_grad():
            if distributed.rank() == 0 or not hasattr(target, "ds_id"):
                target.copy_(stored[name].read())
