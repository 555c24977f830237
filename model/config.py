"""The model's configuration as transformers wants it, validated through ``ModelSpec``."""

from __future__ import annotations

import difflib
import inspect
from typing import Any, ClassVar

from pydantic import ValidationError
from transformers import PretrainedConfig

from model.spec import UNFIT, ModelSpec

# Keys that transformers itself hands over or writes into config.json without declaring a field for them.
FOREIGN_KEYS = frozenset(
    "model_type torch_dtype num_labels name_or_path _name_or_path _commit_hash output_attentions attn_implementation "
    "experts_implementation auto_map quantization_config".split()
)


class HybridConfig(PretrainedConfig):
    """``ModelSpec``'s fields under their own names, the token ids, and nothing else.

    ``hidden_size``, ``intermediate_size``, ``max_position_embeddings`` and ``tie_word_embeddings`` are other names of
    ``d_model``, ``d_ff``, ``max_seq_len`` and ``tie_embeddings``, for libraries that ask for them.

    Raises:
        ValueError: for an unknown key, or for what ``ModelSpec`` refuses; every fault in one message.
    """

    model_type = "pedigree_hybrid"
    has_no_defaults_at_init = True  # transformers before 5.23 builds an empty one to compare with otherwise
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tie_embeddings",
    }

    d_model: int
    d_ff: int
    vocab_size: int
    max_seq_len: int
    layers: str | list[str]
    mixers: dict[str, Any]
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse what nobody reads, let transformers take its own keys, then validate the rest."""
        self._refuse_unknown(kwargs)
        super().__post_init__(**kwargs)
        try:
            spec = self.spec
        except ValidationError as error:
            raise ValueError(_readable(error)) from None
        self.mixers = spec.model_dump()["mixers"]

    @classmethod
    def from_spec(
        cls,
        spec: ModelSpec,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> HybridConfig:
        """The configuration of ``spec`` with the tokenizer's ids."""
        fields: dict[str, Any] = spec.model_dump()
        return cls(**fields, bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)

    @property
    def spec(self) -> ModelSpec:
        """The validated model section that these fields stand for."""
        return ModelSpec.model_validate({name: getattr(self, name) for name in ModelSpec.model_fields})

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks, under the name that other libraries ask for."""
        return self.spec.n_layers

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        known = set(inspect.signature(PretrainedConfig).parameters) | FOREIGN_KEYS | set(self.attribute_map)
        faults = []
        for name in sorted(set(kwargs) - known):
            near = difflib.get_close_matches(name, [*ModelSpec.model_fields, *known], n=1)
            hint = f"did you mean {near[0]}?" if near else f"set one of {sorted(ModelSpec.model_fields)}"
            faults.append(f"field {name} must be a field of the model; got {kwargs[name]!r}; {hint}")
        if faults:
            raise ValueError("; ".join(faults))


def _readable(error: ValidationError) -> str:
    lines = []
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == UNFIT:
            lines.append(f"{path}: {fault['msg']}")
            continue
        lines.append(f"{path}: {fault['msg']}; got {fault['input']!r}" if path else fault["msg"])
    return "\n".join(lines)
