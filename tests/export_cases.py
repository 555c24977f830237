"""Tiny chimera-shaped models with a real tokenizer, and their GGUF files, for the export tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_run import make_tokens

from model.config import HybridConfig
from model.export.gguf import Precision, Read, write_gguf
from model.export.vocabulary import Vocabulary, read_vocabulary
from model.lm import HybridForCausalLM
from model.spec import ModelSpec

MAMBA2 = {"mixer": "mamba2", "d_state": 16, "head_dim": 16, "expand": 2, "d_conv": 4, "n_groups": 1, "chunk_size": 16}
ATTENTION = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "rope_theta": 5000.0}
VOCAB = 352
"""More rows than the tokenizer has ids."""


def chimera(mamba2: dict | None = None, attention: dict | None = None, **changes: Any) -> ModelSpec:
    plain = {
        "d_model": 64,
        "d_ff": 96,
        "vocab_size": VOCAB,
        "max_seq_len": 128,
        "layers": "(1*mamba2 1*attention)*2",
        "mixers": {"mamba2": MAMBA2 | (mamba2 or {}), "attention": ATTENTION | (attention or {})},
    }
    return ModelSpec.model_validate(plain | changes)


def random_model(spec: ModelSpec, seed: int = 5) -> HybridForCausalLM:
    """Every parameter drawn anew, so that no two heads, channels or norms are alike and nothing is one or zero."""
    torch.manual_seed(seed)
    model = HybridForCausalLM(HybridConfig.from_spec(spec, eos_token_id=0, pad_token_id=1)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    return model


def reader(model: HybridForCausalLM) -> Read:
    state = model.state_dict()
    return lambda name: state[name].float().numpy()


def save_gguf(path: Path, model: HybridForCausalLM, vocabulary: Vocabulary, precision: Precision) -> Path:
    write_gguf(path, model.config.spec, reader(model), vocabulary, precision, name="tiny")
    return path


def our_logits(model: HybridForCausalLM, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def make_model(directory: Path, tokens: Path, model: HybridForCausalLM) -> Path:
    """A finished training stage in ``directory/output``; returns ``directory``."""
    output = directory / "output"
    model.save_pretrained(output)
    for path in (tokens / "output" / "tokenizer").iterdir():
        shutil.copyfile(path, output / path.name)
    return directory


def tokens_and_vocabulary(directory: Path) -> tuple[Path, Vocabulary]:
    tokens = make_tokens(directory)
    return tokens, read_vocabulary(tokens / "output" / "tokenizer")
