# SPDX-License-Identifier: Apache-2.0
"""How `generate` meets memory: which cache it gets, and which of its modes cannot work."""

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.utils import logging

from .cache_rcc import RCCCache
from .checking_rcc import check_memory
from .configuration_rcc import RCCConfig
from .positions_rcc import check_positions
from .rolling_rcc import Rolling
from .segments_rcc import HeadLength, count_segments

logger = logging.get_logger(__name__)

ARGUMENTS = {
    "memory": None,
    "ratio": None,
    "head_length": None,
    "compress": None,
    "rolling": False,
    "max_slots": None,
    "when_full": "error",
}
"""What `generate` takes beside the library's arguments, with its defaults."""


class RCCGenerationMixin(GenerationMixin):
    """Overrides of `GenerationMixin`; everything else of `generate` is the library's.

    `generate(prompt, memory=memory)` decodes behind a memory; `generate(long_prompt)` compresses what does not fit
    `config.window`. A prompt that fits, without memory, takes the base's own path. Further arguments of `generate`:

    - `ratio`: source tokens per slot for what is compressed;
    - `head_length`: tokens at the start of a long prompt that stay raw in front of the slots (see `compress`);
    - `compress`: False keeps a long prompt raw, as the base would;
    - `rolling`: True goes on compressing while text is generated: whenever the raw tokens outgrow the window, the
      oldest segment becomes slots. `max_slots` and `when_full` bound them (see `Rolling`).
    """

    config: RCCConfig
    model: nn.Module

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit does not work with RCC models (the library does not look for their layers inside "
                "the base's backbone). Leave it out, or pass an assistant_model"
            )
        own = {name: model_kwargs.pop(name, default) for name, default in ARGUMENTS.items()}
        memory, compress, rolling = own["memory"], own["compress"] is not False, _rolling(own)
        given = model_kwargs.get("past_key_values")
        prompt_length = _prompt_length(generation_config, model_kwargs)
        why = self._reason(memory, prompt_length, own, rolling, model_kwargs.get("attention_mask"))
        if why is None or (memory is None and (isinstance(given, RCCCache) or _is_used(given))):
            unused = [name for name in ("ratio", "head_length", "rolling") if own[name] not in (None, False)]
            if unused:
                logger.warning_once(f"{', '.join(unused)}: no effect on a call of generate() that compresses nothing")
            if generation_config.use_cache is False:  # each step is a call over the whole text, which outgrows a window
                model_kwargs["compress"] = False
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        _check_modes(generation_config, given, self.generation_config, why)
        if rolling is not None and generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "rolling=True and assisted generation (or prompt lookup) exclude each other: rejected tokens could not "
                "be taken back once they are compressed. Leave one of them out"
            )
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if memory is not None:
            check_memory(self.model, memory)
            memory = memory.expand(batch_size * copies)
        head_length = self._resolve_head_length(own["head_length"], memory, copies)
        ratio = self.config.check_ratio(own["ratio"])
        if rolling is not None:
            rolling.check(self.model.scheme, self.config.segment_length // ratio)
        self._check_room(memory, head_length, prompt_length, max_cache_length + 1 - prompt_length, ratio, rolling)
        model_kwargs["past_key_values"] = RCCCache(
            self.config.text_config.num_hidden_layers,
            memory,
            compress_prompt=compress,
            rolling=rolling,
            ratio=ratio,
            head_length=head_length,
        )
        return None

    def _reason(self, memory, prompt_length: int, own: dict, rolling, mask) -> str | None:
        """Why a call needs a cache of ours; None if the base's own path will do."""
        if memory is not None:
            return "a memory"
        head = own["head_length"] if isinstance(own["head_length"], int) else self.config.head_length
        if own["compress"] is not False and prompt_length - head > self.config.window:
            return f"a prompt of {prompt_length} tokens, longer than the window of {self.config.window},"
        if rolling is not None:
            return "rolling=True"
        if mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all()):
            return "a prompt that is padded on the right"
        return None

    def _resolve_head_length(self, given: HeadLength | None, memory, copies: int) -> HeadLength:
        """Raw tokens in front of the slots, for every row of the expanded batch."""
        if memory is not None:
            if given is not None:
                raise ValueError(
                    f"head_length={given} has no effect behind a memory, which has a head of {memory.num_head} tokens. "
                    "Leave it out"
                )
            return 0
        if given is None or isinstance(given, int):
            return self.config.head_length if given is None else given
        return torch.as_tensor(given).repeat_interleave(copies)

    def _check_room(self, memory, head_length, prompt_length: int, new_tokens: int, ratio: int, rolling) -> None:
        """Refuse before the first step what would run out of positions, or of slots, in the midst of generation."""
        config, slots, head = self.config, 0, 0
        if memory is None:
            head = min(prompt_length, int(torch.as_tensor(head_length).max()))
            prompt_length -= head
        else:
            slots, head, prompt_length = memory.num_slots, memory.num_head, prompt_length + memory.num_local
        # the last new token is not decoded any more
        read = prompt_length + (new_tokens - 1 if rolling is not None else 0)
        segments = count_segments(read, config.segment_length, config.window)
        slots += segments * (config.segment_length // ratio)
        local = prompt_length + new_tokens - segments * config.segment_length
        if rolling is not None and rolling.max_slots is not None:
            if rolling.when_full == "error" and slots > rolling.max_slots:
                raise ValueError(
                    f"memory, prompt and {new_tokens} new tokens come to {slots} slots, and max_slots is "
                    f"{rolling.max_slots}. Allow more, use a higher ratio, or choose when_full='drop' or 'recompress'"
                )
            slots = min(slots, rolling.max_slots)
        if config.fit_positions and config.slot_positions is not None:
            slots = min(slots, config.slot_positions)
        check_positions(config, head + slots + local, ratio=ratio)

    def _validate_model_kwargs(self, model_kwargs):
        """As the library, which looks for our arguments among those of `forward`."""
        super()._validate_model_kwargs({name: v for name, v in model_kwargs.items() if name not in ARGUMENTS})

    def init_continuous_batching(self, *args, **kwargs):
        """Not supported: it packs requests into one row, in which memories would mix.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "RCC models do not support continuous batching (requests packed into one row would read each other's "
            "memory). Call generate() on a padded batch."
        )


def _rolling(own: dict) -> Rolling | None:
    if own["rolling"]:
        if own["compress"] is False:
            raise ValueError("rolling=True and compress=False exclude each other; leave one of them out")
        return Rolling(max_slots=own["max_slots"], when_full=own["when_full"])
    for name in ("max_slots", "when_full"):
        if own[name] != ARGUMENTS[name]:
            raise ValueError(f"{name}={own[name]!r} has no effect without rolling=True")
    return None


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
