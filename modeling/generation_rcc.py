# SPDX-License-Identifier: Apache-2.0
"""How `generate` meets memory: which cache it gets, and which of its modes cannot work."""

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging

from .cache_rcc import RCCCache
from .cache_static_rcc import RCCStaticCache
from .compressed_rcc import RCCMemory
from .compressing_rcc import check_memory
from .configuration_rcc import RCCConfig
from .positions_rcc import check_positions
from .segments_rcc import Grid, count_segments, join_masks

logger = logging.get_logger(__name__)


class RCCGenerationMixin(GenerationMixin):
    """Overrides of `GenerationMixin`; everything else of `generate` is the library's.

    `generate(prompt, memory=memory)` decodes behind a memory; `generate(long_prompt)` compresses what does not fit
    `config.window`. A prompt that fits, without memory, takes the base's own path.
    """

    config: RCCConfig
    model: nn.Module

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        memory, ratio = model_kwargs.pop("memory", None), model_kwargs.pop("ratio", None)
        given = model_kwargs.get("past_key_values")
        prompt_length = _prompt_length(generation_config, model_kwargs)
        is_long = prompt_length > self.config.window
        if memory is None and (isinstance(given, RCCCache) or not is_long or _is_used(given)):
            if ratio is not None:
                logger.warning_once("ratio has no effect on a call of generate() that compresses nothing")
            if isinstance(given, RCCStaticCache):
                new_tokens = generation_config.max_new_tokens or max_cache_length + 1 - prompt_length
                given.check_continuation(self.config, prompt_length - given.get_seq_length() + new_tokens - 1)
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        what = f"a prompt of {prompt_length} tokens, longer than the window of {self.config.window},"
        _check_modes(generation_config, given, self, what if memory is None else "a memory")
        if ratio is not None:
            self.config.check_ratio(ratio)
        slots = local = 0
        if memory is not None:
            check_memory(self.model, memory)
            memory = memory.expand(
                batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            )
            slots, local = memory.num_slots, memory.num_local
        new_tokens = max_cache_length + 1 - prompt_length
        self._check_room(slots, local + prompt_length, new_tokens, ratio)
        model_kwargs["past_key_values"] = self._new_cache(
            generation_config, memory, ratio, prompt_length, new_tokens, model_kwargs.get("attention_mask")
        )
        return None

    def _new_cache(
        self, generation_config, memory, ratio, prompt_length: int, new_tokens: int, mask: Tensor | None
    ) -> RCCCache:
        num_layers = self.config.text_config.num_hidden_layers
        if generation_config.cache_implementation != "static":
            return RCCCache(num_layers, memory, compress_prompt=True, ratio=ratio)
        needed = self._count_entries(memory, mask, prompt_length, ratio) + new_tokens - 1
        # as the library does for its own: no shorter than the last one, for which a step may have been compiled
        length = max(needed, generation_config.max_cache_len or 0, getattr(self, "_previous_max_cache_length", 0))
        self._previous_max_cache_length = length
        return RCCStaticCache(num_layers, length, memory, compress_prompt=True, ratio=ratio)

    def _count_entries(self, memory: RCCMemory | None, mask: Tensor | None, width: int, ratio: int | None) -> int:
        """Slots and raw tokens, padding included, once a prompt of padded length `width` is decoded."""
        slots, local_mask, prompt_width = 0, None, width
        if memory is not None:
            slots, local_mask, width = sum(memory.slot_counts), memory.local_mask, memory.num_local + width
        if mask is not None or local_mask is not None:
            rows = memory.batch_size if mask is None else len(mask)
            mask = join_masks(local_mask, width - prompt_width, mask, prompt_width, rows, "cpu")
        like = torch.empty(1 if mask is None else len(mask), width)
        grid = Grid.of(like, mask, self.config.segment_length, self.config.window)
        if grid.num_segments:
            width = max(grid.local_lengths)
            slots += max(grid.counts) * (grid.segment_length // self.config.check_ratio(ratio))
        return slots + width

    def _check_room(self, slots: int, prompt_length: int, new_tokens: int, ratio: int | None) -> None:
        """Refuse before the first step what would run out of positions in the midst of generation."""
        segment = self.config.segment_length
        segments, ratio = count_segments(prompt_length, segment, self.config.window), self.config.check_ratio(ratio)
        slots += segments * (segment // ratio)
        if self.config.fit_positions and self.config.slot_positions is not None:
            slots = min(slots, self.config.slot_positions)
        check_positions(self.config, slots + prompt_length - segments * segment + new_tokens, ratio=ratio)

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """What a static cache is given as mask: for ours the columns of the next tokens, since it makes the rest."""
        if not isinstance(past_key_values, RCCCache):
            return create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs)
        if attention_mask is None or kwargs.get("is_first_iteration"):
            return attention_mask
        query_length = inputs_embeds.shape[1]
        # the mask grows with each token; one token that generate() made is real, and a step then has no mask to grow
        return None if query_length == 1 else attention_mask[:, -query_length:].contiguous()

    def init_continuous_batching(self, *args, **kwargs):
        """Not supported: it packs requests into one row, in which memories would mix.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "RCC models do not support continuous batching (requests packed into one row would read each other's "
            "memory). Call generate() on a padded batch."
        )


def _prompt_length(generation_config, model_kwargs: dict) -> int:
    for name, axis in (("position_ids", -1), ("attention_mask", 1), ("inputs_embeds", 1)):
        if model_kwargs.get(name) is not None:
            return model_kwargs[name].shape[axis]
    return generation_config._mask_length


def _is_used(cache) -> bool:
    return cache is not None and cache.get_seq_length() > 0


def _check_modes(generation_config, given, model, what: str) -> None:
    implementation, attention = generation_config.cache_implementation, model.config.text_config._attn_implementation
    # what the base's generation_config.json names is no wish of the caller: Gemma 2 has a cache_implementation there
    usable = (None, "dynamic", "dynamic_full", "static", model.generation_config.cache_implementation)
    problem = None
    if given is not None:
        problem = f"past_key_values (a {type(given).__name__}, which cannot hold memory)"
    elif generation_config.use_cache is False:
        problem = "use_cache=False"
    elif implementation not in usable:
        problem = f"cache_implementation={implementation!r}"
    elif implementation == "static" and attention not in ("eager", "sdpa"):  # others take masks of other kinds
        problem = f"cache_implementation='static' on attn_implementation={attention!r} ('sdpa' and 'eager' work)"
    elif generation_config.prefill_chunk_size is not None:
        problem = f"prefill_chunk_size={generation_config.prefill_chunk_size}"
    if problem:
        raise ValueError(f"generate() with {what} makes its own cache and does not work with {problem}; leave that out")
