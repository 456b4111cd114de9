# SPDX-License-Identifier: Apache-2.0
"""How `generate` meets memory: which cache it gets, and which of its modes cannot work."""

from torch import nn
from transformers import GenerationMixin
from transformers.utils import logging

from .cache_rcc import RCCCache
from .compressing_rcc import check_memory
from .configuration_rcc import RCCConfig
from .positions_rcc import check_positions
from .segments_rcc import count_segments

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
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        what = f"a prompt of {prompt_length} tokens, longer than the window of {self.config.window},"
        _check_modes(generation_config, given, self.generation_config, what if memory is None else "a memory")
        if ratio is not None:
            self.config.check_ratio(ratio)
        slots = local = 0
        if memory is not None:
            check_memory(self.model, memory)
            memory = memory.expand(
                batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            )
            slots, local = memory.num_slots, memory.num_local
        self._check_room(slots, local + prompt_length, max_cache_length + 1 - prompt_length, ratio)
        model_kwargs["past_key_values"] = RCCCache(
            self.config.text_config.num_hidden_layers, memory, compress_prompt=True, ratio=ratio
        )
        return None

    def _check_room(self, slots: int, prompt_length: int, new_tokens: int, ratio: int | None) -> None:
        """Refuse before the first step what would run out of positions in the midst of generation."""
        segment = self.config.segment_length
        segments, ratio = count_segments(prompt_length, segment, self.config.window), self.config.check_ratio(ratio)
        slots += segments * (segment // ratio)
        if self.config.fit_positions and self.config.slot_positions is not None:
            slots = min(slots, self.config.slot_positions)
        check_positions(self.config, slots + prompt_length - segments * segment + new_tokens, ratio=ratio)

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


def _check_modes(generation_config, given, defaults, what: str) -> None:
    # what the base's generation_config.json names is no wish of the caller: Gemma 2 has a cache_implementation there
    usable = (None, "dynamic", "dynamic_full", defaults.cache_implementation)
    problem = None
    if given is not None:
        problem = f"past_key_values (a {type(given).__name__}, which cannot hold memory)"
    elif generation_config.use_cache is False:
        problem = "use_cache=False"
    elif generation_config.cache_implementation not in usable:
        problem = f"cache_implementation={generation_config.cache_implementation!r}"
    elif generation_config.prefill_chunk_size is not None:
        problem = f"prefill_chunk_size={generation_config.prefill_chunk_size}"
    if problem:
        raise ValueError(f"generate() with {what} makes its own cache and does not work with {problem}; leave that out")
