# SPDX-License-Identifier: Apache-2.0
"""`RCCModel` and `RCCForCausalLM`: any known base model, with a compressor and a memory in front of its KV cache."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_rcc import RCCCache
from .checking_rcc import check_inputs, check_memory, check_not_packed
from .compressed_rcc import RCCMemory
from .compressing_rcc import compress_context
from .configuration_rcc import RCCConfig
from .decoding_rcc import decode_with_cache, last_columns
from .families_rcc import family_of, scale_logits
from .generation_rcc import RCCGenerationMixin
from .joint_rcc import decode_behind_context
from .pretrained_rcc import RCCPreTrainedModel
from .replicas_rcc import RCCReplicas
from .schemes_rcc import make_scheme
from .segments_rcc import HeadLength
from .windows_rcc import decode_windows


class RCCModel(RCCPreTrainedModel):
    """The base's backbone, which is compressor and decoder at once.

    With neither memory nor context it computes what the base computes, bit for bit.
    """

    _decoder_prefix = "language_model."

    def __init__(self, config: RCCConfig):
        super().__init__(config)
        family_of(config.text_config)
        self.language_model = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        self.scheme = make_scheme(config.scheme, config.scheme_options)
        self.scheme.build(self.language_model)
        for layer in self.language_model.layers:
            layer._can_checkpoint_with_cache = True  # ours is read-only while training
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @torch.no_grad()
    def compress(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: RCCMemory | None = None,
        ratio: int | None = None,
        max_slots: int | None = None,
        head_length: HeadLength | None = None,
        window: int | None = None,
        on_progress: Callable[[int], None] | None = None,
        replicas: RCCReplicas | None = None,
    ) -> RCCMemory:
        """Compress a context. What is behind its last whole segment stays in the memory as raw local tokens.

        Args:
            input_ids: `[B, T]`, padded on either side.
            attention_mask: `[B, T]`, 0 at padding; None if there is none.
            memory: append to this memory, which stays as it is; its local tokens come first.
            ratio: source tokens per slot (a divisor of `config.segment_length`); None for the configuration's.
            max_slots: instead of a ratio: the smallest ratio at which the whole memory has at most so many slots.
            head_length: tokens at the start of each row that stay raw in front of the slots (a system prompt, an
                attention sink): one number, or one for each row; None for `config.head_length`. A memory that is
                appended to keeps its own; where it is all there is so far, a length given here fills it up.
            window: leave up to so many tokens raw, at least one segment, as `generate` does with a long prompt: the
                local window of a stream. None compresses every whole segment.
            on_progress: called after every encoded batch with its number of source tokens.
            replicas: copies of this model on other devices (`replicate`) that take their share of the segments.

        Raises:
            TypeError: if the ids are no integers, or `memory` is no memory.
            ValueError: if a context has less than one segment (and no window is given), shapes, devices or dtypes do
                not fit, memory or replicas are another model's, or the ratio, the budget, the head or the window is
                impossible.
        """
        return compress_context(
            self,
            input_ids,
            attention_mask,
            memory,
            ratio=ratio,
            max_slots=max_slots,
            head_length=head_length,
            window=window,
            on_progress=on_progress,
            replicas=replicas,
        )

    def _replays(self) -> bool:
        """Whether layers are run again in backward, and so must not write into a cache."""
        checkpointing = self.language_model.layers[0].gradient_checkpointing
        return self.training and checkpointing and torch.is_grad_enabled()

    def _is_long(self, inputs: Tensor, memory: RCCMemory | None) -> bool:
        """Whether inputs behind a memory (or none) are more than a window and a head of raw tokens."""
        raw = inputs.shape[1] + (-self.config.head_length if memory is None else memory.num_local)
        return raw > self.config.window

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RCCCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        memory: RCCMemory | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        ratio: int | None = None,
        compress: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The base's forward; behind compressed memory with `memory`, `context_ids` or an `RCCCache`, and window by
        window for more tokens than `config.window` (see `windows_rcc.py`).

        Args:
            input_ids: local tokens `[B, T]`, or `inputs_embeds` `[B, T, D]`.
            attention_mask: `[B, T]` over the local tokens (with a cache that has been used, `[B, >= T]`: its last T).
            position_ids: as for the base (more than a window may be packed sequences, which are told apart by them);
                with memory positions follow from the memory and this is not used.
            memory: decode behind this memory, which is a constant. (What reads it gets gradients: the read adapters,
                and with wiring "add" the slot maps.)
            context_ids: compress `[B, N]` with the graph kept and decode behind it (the training path). Whole segments
                are compressed, the rest of the context stays raw in front of the local tokens, and so does its head
                of `config.head_length` tokens in front of the slots.
            context_mask: `[B, N]`, 0 at padding of the contexts, on either side; None if there is none.
            ratio: source tokens per slot for what this call compresses.
            compress: whether more than a window of tokens is decoded window by window; False keeps all of them raw, as
                the base would. None: True, but behind a memory False.

        Returns:
            `last_hidden_state` `[B, T, D]` of the local tokens.

        Raises:
            ValueError: if arguments exclude each other, or more positions are needed than the base has.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if context_mask is not None and context_ids is None:
            raise ValueError("context_mask has no effect without context_ids; the mask of input_ids is attention_mask")
        if context_ids is not None:
            if memory is not None or past_key_values is not None or use_cache:
                raise ValueError(
                    "context_ids is the training path: it takes no memory and no cache. To decode step by step, "
                    "call compress() and pass its result as memory"
                )
            check_inputs(self, context_ids, context_mask)
            check_not_packed(position_ids, attention_mask)
            return decode_behind_context(self, context_ids, context_mask, inputs, attention_mask, ratio, **kwargs)
        wants_cache = (not self.training if use_cache is None else use_cache) and not self._replays()
        if memory is not None:
            if past_key_values is not None:
                raise ValueError(
                    "give memory or past_key_values, not both: the cache holds the memory after the first call"
                )
            check_memory(self, memory)
            check_not_packed(position_ids, attention_mask)
            memory = memory.expand(len(inputs))
        if (
            past_key_values is None
            and (memory is None if compress is None else compress)
            and self._is_long(inputs, memory)
        ):
            check_inputs(self, inputs, None)
            mask = last_columns(attention_mask, inputs.shape[1])
            return decode_windows(self, inputs, mask, position_ids, memory, ratio, wants_cache, **kwargs)
        if memory is not None:
            past_key_values = RCCCache(len(self.language_model.layers), memory, read_only=not wants_cache)
        if self._replays():
            use_cache = False
            if past_key_values is not None and not getattr(past_key_values, "read_only", False):
                raise ValueError(
                    "past_key_values cannot be used while training with activation checkpointing: a replayed layer "
                    "would write into it twice. Leave it out (memory= works), or switch checkpointing off"
                )
        if isinstance(past_key_values, RCCCache):
            return decode_with_cache(self, past_key_values, inputs, attention_mask, **kwargs)
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class RCCForCausalLM(RCCPreTrainedModel, RCCGenerationMixin):
    """A causal language model of a known base family that reads long contexts through a compressed memory."""

    _decoder_prefix = "model.language_model."

    def __init__(self, config: RCCConfig):
        super().__init__(config)
        self.model = RCCModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def compress(self, input_ids: Tensor, *args, **kwargs) -> RCCMemory:
        """Compress a context `[B, T]`; arguments, result and errors are those of `RCCModel.compress`."""
        return self.model.compress(input_ids, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RCCCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        memory: RCCMemory | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        ratio: int | None = None,
        compress: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the local tokens, and their loss if `labels` `[B, T]` are given (-100 where nothing is asked).

        With `hidden_loss`, a function of the last hidden states `[B, T, D]`, the loss is what it returns, and there are
        no logits: those of all tokens at once may need more memory than all else.

        The other arguments are those of `RCCModel.forward`.

        Raises:
            ValueError: if `labels` have another shape than the local tokens.
        """
        loss_arguments = {n: kwargs.pop(n) for n in ("num_items_in_batch", "shift_labels") if n in kwargs}
        hidden_loss = kwargs.pop("hidden_loss", None)
        if labels is not None:
            expected = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
            if labels.shape != expected:
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}; the local tokens need {tuple(expected)} "
                    "(a context has no labels: what is compressed is not predicted)"
                )
            use_cache = False if use_cache is None else use_cache
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            memory=memory,
            context_ids=context_ids,
            context_mask=context_mask,
            ratio=ratio,
            compress=compress,
            **kwargs,
        )
        if hidden_loss is not None:
            return CausalLMOutputWithPast(loss=hidden_loss(outputs.last_hidden_state))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_logits(self.lm_head(outputs.last_hidden_state[:, kept]), self.config.text_config)
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["RCCForCausalLM", "RCCModel", "RCCPreTrainedModel"]
