"""The hybrid language model on transformers' ``PreTrainedModel`` and ``GenerationMixin``.

B batch, T time, D d_model, V vocab_size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from model import init
from model.block import Block
from model.boundaries import resolve_layout
from model.cache import HybridCache
from model.config import HybridConfig
from model.layers import RMSNorm
from model.loss import LMHead, mean_nll, nll_of_logits, shifted_labels
from model.mixers import MIXERS, Mixer


class HybridPreTrainedModel(PreTrainedModel):
    """What transformers has to know about the architecture."""

    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)  # type: ignore[assignment]
    _skip_keys_device_placement = ("past_key_values",)  # type: ignore[assignment]
    _supports_sdpa = True
    _is_stateful = True
    """A recurrent state cannot be rolled back, so decoding that crops the cache is refused by ``generate``."""
    _keep_in_fp32_modules_strict = {  # noqa: RUF012 - transformers' own attribute
        rf"mixer\.{name}" for mixer in MIXERS.values() for name in mixer.initialisers
    }

    def _init_weights(self, module: nn.Module) -> None:
        init.initialise(module, self.config.initializer_range, self.config.num_hidden_layers)


class HybridModel(HybridPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        spec = config.spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.d_model)
        self.layers = nn.ModuleList(Block(mixer_spec, spec) for mixer_spec in spec.layer_mixers)
        self.norm = RMSNorm(spec.d_model, spec.norm_eps)
        self.gradient_checkpointing = False
        self.residual_dtype: torch.dtype | None = None
        """Of the stream that blocks add to; none is the embedding's own (fp32 under autocast)."""
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) after the final norm; see ``HybridForCausalLM.forward`` for the arguments."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given; got both or none")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x if self.residual_dtype is None else x.to(self.residual_dtype)
        cache = self._cache(past_key_values, use_cache)
        layout = resolve_layout(
            x.shape[0],
            x.shape[1],
            x.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens=_document_edges(cu_seq_lens_q, cu_seq_lens_k),
            past=None if cache is None else cache.columns,
            past_tokens=None if cache is None else cache.tokens,
        )
        if cache is None:
            for block in self.layers:
                cast(Block, block).mixer.prepare(x, layout)
        hidden = [x]
        for index, block in enumerate(self.layers):
            x = block(x, layout, None if cache is None else cache.layer(index, cast(Block, block).mixer.new_state))
            hidden.append(x)
        if cache is not None:
            cache.advance(layout, x.shape[0], x.shape[1])
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cast(Any, cache),
            hidden_states=(*hidden[:-1], x) if output_hidden_states else None,
        )

    def _cache(self, given: Any, use_cache: bool | None) -> HybridCache | None:
        if given is not None and not isinstance(given, HybridCache):
            raise ValueError(
                f"field past_key_values must be a HybridCache; got {type(given).__name__}; set HybridCache() or nothing"
            )
        if given is None and not use_cache:
            return None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "field use_cache must be false under activation checkpointing, whose second pass would feed the states "
                "twice; got true; set use_cache=False or call model.eval()"
            )
        return HybridCache() if given is None else given


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """The model with its head: next-token logits, the loss, and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = LMHead(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V), and the loss where ``labels`` are given.

        Args:
            input_ids: (B, T); or ``inputs_embeds`` (B, T, D) in their place.
            attention_mask: (B, past + T), 0 at padding. Padding leaves no trace in any row.
            position_ids: (B, T), restarting at 0 where a document starts; documents never see each other.
            seq_idx: (B, T), a document number a token; goes before ``position_ids`` in saying where documents start.
            cu_seq_lens_q: (n + 1,), document edges of a single row, as the padding-free collator gives them;
                ``cu_seq_lens_k`` must equal it, and the two maximal lengths are not needed.
            labels: (B, T), equal to ``input_ids`` or -100. The model shifts them: the token at t is scored on the label
                at t + 1.
            num_items_in_batch: what the summed NLL is divided by; the number of scored tokens when not given.
            logits_to_keep: only the last so many positions (0 means all), or the positions of an index tensor.
            return_logits: false leaves the logits out and takes the loss in chunks that never hold all of them.

        Raises:
            ValueError: for descriptions of the rows that contradict each other or the cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.last_hidden_state
        logits = self.lm_head(_kept(hidden, logits_to_keep)) if return_logits else None
        loss = None if labels is None else self._loss(hidden, logits, labels, num_items_in_batch, logits_to_keep)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        return result.to_tuple() if return_dict is False else result

    def _loss(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"field labels must be {tuple(hidden.shape[:2])}; got {tuple(labels.shape)}")
        targets = _kept(shifted_labels(labels), logits_to_keep)
        if logits is not None:
            total = nll_of_logits(logits.flatten(0, 1), targets.flatten())
        elif isinstance(self.lm_head, LMHead):
            total = self.lm_head(_kept(hidden, logits_to_keep).flatten(0, 1), targets.flatten())
        else:
            # An adapter or a resized head took our head's place and knows only how to give logits.
            total = nll_of_logits(self.lm_head(_kept(hidden, logits_to_keep)).flatten(0, 1), targets.flatten())
        return mean_nll(total, targets, num_items_in_batch)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                "field cache_implementation must be none: recurrent states need HybridCache; "
                f"got {generation_config.cache_implementation}"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HybridCache()


def model_backends(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """One line a layer: which mixer, and what computes it in training where products are in ``dtype``.

    Raises:
        ValueError: if a layer's config names a kernel that cannot run where the layer is.
    """
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    return [
        f"layer {index}: {mixer.spec.mixer} on {mixer.backend_on(next(mixer.parameters()).device, dtype)}"
        for index, mixer in enumerate(mixers)
    ]


def register() -> None:
    """Tell the Auto classes of the architecture; safe to call twice."""
    AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
    AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)


def _document_edges(edges_q: Tensor | None, edges_k: Tensor | None) -> Tensor | None:
    if edges_q is not None and edges_k is not None and not torch.equal(edges_q, edges_k):
        raise ValueError("field cu_seq_lens_k must equal cu_seq_lens_q; got other edges; set both alike")
    return edges_k if edges_q is None else edges_q


def _kept(tensor: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, Tensor):
        return tensor[:, logits_to_keep]
    return tensor[:, -logits_to_keep:] if logits_to_keep else tensor
