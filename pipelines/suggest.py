"""The nearest valid name for one that is not valid."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

ALIASES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "batch_size": ("global_batch_size",),
    "train_batch_size": ("global_batch_size",),
    "per_device_train_batch_size": ("micro_batch_size",),
    "per_device_eval_batch_size": ("eval_batch_size",),
    "batch_size_per_gpu": ("micro_batch_size",),
    "steps": ("max_steps",),
    "num_steps": ("max_steps",),
    "n_steps": ("max_steps",),
    "total_steps": ("max_steps",),
    "train_steps": ("max_steps",),
    "iterations": ("max_steps",),
    "epochs": ("max_epochs", "max_steps"),
    "num_train_epochs": ("max_epochs", "max_steps"),
    "warmup": ("warmup_steps", "schedule.warmup_steps"),
    "warmup_steps": ("schedule.warmup_steps",),
    "warmup_ratio": ("warmup_steps", "schedule.warmup_steps"),
    "decay_steps": ("schedule.decay_steps",),
    "lr_scheduler": ("schedule",),
    "lr_scheduler_type": ("schedule",),
    "scheduler": ("schedule",),
    "clip": ("max_grad_norm",),
    "grad_clip": ("max_grad_norm",),
    "gradient_clipping": ("max_grad_norm",),
    "sequence_length": ("seq_len", "max_length"),
    "max_seq_length": ("max_length", "seq_len", "max_seq_len"),
    "block_size": ("seq_len", "max_length"),
    "context_length": ("seq_len", "max_length", "max_seq_len"),
    "max_new_tokens": ("max_completion_length",),
    "dtype": ("precision",),
    "fp16": ("precision",),
    "bf16": ("precision",),
    "zero_stage": ("deepspeed",),
    "zero": ("deepspeed",),
    "ds_config": ("deepspeed",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "save_steps": ("checkpoint_every_steps",),
    "save_every": ("checkpoint_every_steps",),
    "eval_steps": ("eval_every_steps",),
    "logging_steps": ("log_every_steps",),
    "save_total_limit": ("keep_checkpoints",),
    "hidden_size": ("d_model",),
    "intermediate_size": ("d_ff",),
    "num_hidden_layers": ("layers",),
    "n_layers": ("layers",),
    "num_layers": ("layers",),
    "num_attention_heads": ("n_heads",),
    "num_heads": ("n_heads",),
    "num_key_value_heads": ("n_kv_heads",),
    "max_position_embeddings": ("max_seq_len",),
    "gradient_accumulation_steps": ("micro_batch_size", "global_batch_size"),
    "grad_accum_steps": ("micro_batch_size", "global_batch_size"),
    "group_size": ("num_generations",),
    "lora_rank": ("rank", "adapter.rank"),
    "r": ("rank", "adapter.rank"),
    "lora_alpha": ("alpha", "adapter.alpha"),
    "target_modules": ("targets", "adapter.targets"),
    "parent": ("from",),
    "base_model": ("from",),
    "init_from": ("from",),
    "dataset": ("data",),
    "recipe": ("pipeline",),
    "config": ("pipeline",),
    "gpus": ("num_gpus",),
    "num_processes": ("num_gpus",),
    "dry_run": ("plan",),
    "run": ("stage",),
    "output_dir": ("runs",),
    "data_dir": ("data",),
}
"""What other programs call a field or an option, and what it may be called here, the likeliest first."""

_CUTOFF = 0.6


def suggestion(name: str, valid: Iterable[str], what: str) -> str:
    """``did you mean 'lr'?``, or the list of what is valid when nothing is near."""
    names = sorted(set(valid))
    near = nearest(name, names)
    if near is not None:
        return f"did you mean {near!r}?"
    return f"there is no {what} here" if not names else f"use one of {', '.join(names)}"


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that was meant: what another program calls it, the same words, or nearly the same letters."""
    names = {_folded(candidate): candidate for candidate in sorted(set(valid))}
    asked = _folded(name)
    known = [asked, *ALIASES.get(asked, ())]
    # A misspelt alias ("learnig_rate") is nearer to what it misspells than to any name of ours.
    known += [alias for word in difflib.get_close_matches(asked, ALIASES, n=1, cutoff=0.85) for alias in ALIASES[word]]
    for word in known:
        section, dot, field = word.partition(".")
        if section in names:
            return names[section] + dot + field
    near = difflib.get_close_matches(asked, names, n=1, cutoff=_CUTOFF)
    if near:
        return names[near[0]]
    words = set(asked.split("_"))
    # "rate" for "lr_rate", "layer_pattern" for "layers": a whole word in common beats letters in common.
    sharing = [found for found in names if words & set(found.split("_")) - {"max", "min", "steps", "size", "n"}]
    return names[sharing[0]] if len(sharing) == 1 else None


def options_in(words: Sequence[str]) -> list[str]:
    """The words that are options; what follows ``--`` is none, nor is a negative number."""
    end = words.index("--") if "--" in words else len(words)
    return [word for word in words[:end] if re.match(r"--?[A-Za-z]", word)]


def listed(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Unknown options for a message, each with the nearest known one, or with all that are known."""
    parts = []
    for word in unknown:
        near = nearest(word.lstrip("-"), known)
        # Whatever it is, it may be a secret: no more than the name of the option is repeated.
        parts.append(f"{word[:40]} (did you mean --{near.partition('.')[0]}?)" if near else word[:40])
    said = f"option{'s' if len(parts) > 1 else ''} {', '.join(parts)}"
    return said if "(did" in parts[0] else f"{said}; there are {', '.join(f'--{name}' for name in known)}"


def _folded(name: str) -> str:
    """``learningRate``, ``learning-rate`` and ``LEARNING_RATE`` are ``learning_rate``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
