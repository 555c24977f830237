"""Weights between stages: safetensors, tokenizer and licence, equal bit for bit, whole or partitioned."""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from stages.runtime import distributed, weights
from stages.runtime.checkpoint import CheckpointError, load_weights, save_weights, write_manifest

ROOT = Path(__file__).resolve().parent.parent


def tiny(seed: int = 0, *, tied: bool = True, hidden: int = 16) -> Any:
    """A model of another family than ours, so that nothing here leans on our own classes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tokenizer_folder(path: Path) -> Path:
    path.mkdir()
    (path / "tokenizer_config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    (path / "manifest.json").write_text("the tokenizer's own")
    return path


def saved(directory: Path, model: Any) -> Path:
    save_weights(directory, model, None)
    write_manifest(directory)
    return directory


def equal(one: Any, other: Any) -> bool:
    import torch

    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("tied", [True, False])
def test_loaded_weights_equal_saved_ones_bit_for_bit(tmp_path, tied):
    model, other = tiny(0, tied=tied), tiny(1, tied=tied)
    assert not equal(model, other)
    load_weights(saved(tmp_path / "out", model), other)
    assert equal(model, other)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


def test_the_folder_loads_with_transformers_alone(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny(0)
    saved(tmp_path / "out", model)
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_weights_keep_the_dtype_they_are_held_in(tmp_path):
    import torch
    from safetensors.torch import load_file

    model = tiny(0)
    model.model.norm.to(torch.float64)
    model.lm_head.to(torch.bfloat16)
    saved(tmp_path / "out", model)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.float64
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    "written", [lambda held: held.view(dtype("int32")), lambda held: held.reshape(4, 4), lambda held: held + 1]
)
def test_a_tensor_written_with_another_dtype_shape_or_value_is_refused(tmp_path, written):
    model = tiny(0)
    real = model.save_pretrained

    def save(directory: Path, state_dict: dict[str, Any]) -> None:
        name = "model.norm.weight"
        real(directory, state_dict=state_dict | {name: written(state_dict[name])})

    model.save_pretrained = save
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight reads back different from the model"):
        save_weights(tmp_path / "out", model, None)


def dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def test_tokenizer_and_licence_go_with_the_weights_and_nothing_is_pickled(tmp_path):
    save_weights(tmp_path / "out", tiny(), tokenizer_folder(tmp_path / "tokenizer"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "MODEL_LICENSE"} <= names
    assert "manifest.json" not in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert (tmp_path / "out/MODEL_LICENSE").read_bytes() == (ROOT / "MODEL_LICENSE").read_bytes()


def test_a_missing_licence_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "REPOSITORY", tmp_path)
    with pytest.raises(CheckpointError, match="MODEL_LICENSE is missing"):
        save_weights(tmp_path / "out", tiny(), None)


def test_a_folder_that_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold a tokenizer; got no tokenizer_config\.json"):
        save_weights(tmp_path / "out", tiny(), tmp_path)


def test_a_flipped_byte_is_found_before_a_weight_is_touched(tmp_path):
    folder = saved(tmp_path / "out", tiny(0))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    other = tiny(1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has another SHA-256"):
        load_weights(folder, other)
    assert equal(other, tiny(1))


def test_weights_without_a_manifest_are_refused(tmp_path):
    save_weights(tmp_path / "out", tiny(), None)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load_weights(tmp_path / "out", tiny())


def test_a_manifest_one_folder_up_covers_the_model_below(tmp_path):
    save_weights(tmp_path / "output/model", tiny(0), None)
    digest = write_manifest(tmp_path / "output")
    other = tiny(1)
    assert load_weights(tmp_path / "output/model", other) == digest
    assert equal(other, tiny(0))


def test_names_and_shapes_that_do_not_fit_are_all_named(tmp_path):
    folder = saved(tmp_path / "out", tiny(0, tied=False))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[16\], the model \[32\]"):
        load_weights(folder, tiny(hidden=32, tied=False))
    smaller = tiny(1, tied=False)
    del smaller.model.layers[1]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not in the model"):
        load_weights(folder, smaller)


def test_what_reads_back_different_is_refused(tmp_path, monkeypatch):
    model = tiny(0)
    real = type(model).save_pretrained

    def lossy(self: Any, folder: Path, state_dict: dict[str, Any]) -> None:
        state_dict["model.norm.weight"] = state_dict["model.norm.weight"] + 1e-3
        real(self, folder, state_dict=state_dict)

    monkeypatch.setattr(type(model), "save_pretrained", lossy)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight reads back different"):
        save_weights(tmp_path / "out", model, None)


def partitioned_round_trip(directory: Path) -> tuple[bool, bool]:
    """Two ranks under ZeRO-3 save, and load into another partitioned model; does either differ from the plain one?"""
    import deepspeed
    from safetensors.torch import load_file

    distributed.init_process_group()
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    engine = deepspeed.initialize(model=tiny(0), config=config)[0]
    shard = engine.module.model.norm.weight
    assert shard.numel() == 0, "the parameter must be partitioned for this test to mean anything"
    save_weights(directory / "out", engine.module, None)
    digest = distributed.on_rank_zero(lambda: write_manifest(directory / "out"))
    other = deepspeed.initialize(model=tiny(1), config=config)[0]
    # What rank 0's record says counts: the others may have read theirs before it was written.
    load_weights(directory / "out", other.module, digest if distributed.rank() == 0 else "0" * 64)
    save_weights(directory / "again", other.module, None)
    distributed.barrier()
    plain = {name: value for name, value in tiny(0).state_dict().items() if name != "lm_head.weight"}
    answers = []
    for name in ("out", "again"):
        stored = load_file(directory / name / "model.safetensors")
        answers.append(stored.keys() == plain.keys() and all(bool((stored[key] == plain[key]).all()) for key in plain))
    distributed.close_process_group()
    return answers[0], answers[1]


def test_partitioned_weights_are_gathered_whole_and_load_back(tmp_path):
    assert run_ranks(2, partitioned_round_trip, tmp_path) == [(True, True), (True, True)]
