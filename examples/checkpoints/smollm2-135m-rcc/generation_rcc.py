# SPDX-License-Identifier: Apache-2.0
"""How `generate` meets memory: which cache it gets, and which of its modes cannot work."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging

from .cache_rcc import RCCCache
from .cache_static_rcc import RCCStaticCache
from .checking_rcc import check_memory
from .compressed_ops_rcc import head_lengths, head_sizes
from .configuration_rcc import RCCConfig
from .planning_rcc import Plan
from .rolling_rcc import Rolling
from .segments_rcc import HeadLength, expand_head_length

logger = logging.get_logger(__name__)

ARGUMENTS = {
    "memory": None,
    "ratio": None,
    "head_length": None,
    "window": None,
    "compress": None,
    "rolling": False,
    "max_slots": None,
    "when_full": "error",
}
"""What `generate` takes beside the library's arguments, with its defaults."""

STATIC_STEP = 256
"""Static caches have a multiple of so many entries: each length compiles a step of its own, which takes far longer than
to look past the entries that are too many, and few memories and prompts are equally long."""


class RCCGenerationMixin(GenerationMixin):
    """Overrides of `GenerationMixin`; everything else of `generate` is the library's.

    `generate(prompt, memory=memory)` decodes behind a memory; `generate(long_prompt)` compresses what does not fit
    `config.window`. A prompt that fits, without memory, takes the base's own path. Further arguments of `generate`:

    - `ratio`: source tokens per slot for what is compressed;
    - `head_length`: tokens at the start of a long prompt that stay raw in front of the slots (see `compress`);
    - `window`: raw tokens that stay behind the slots, instead of `config.window`;
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
        window = self._resolve_window(own["window"])
        prompt_length = _prompt_length(generation_config, model_kwargs)
        why = self._reason(memory, prompt_length, own, window, rolling, model_kwargs.get("attention_mask"))
        if why is None or (memory is None and (isinstance(given, RCCCache) or _is_used(given))):
            unused = [name for name in ("ratio", "head_length", "rolling") if own[name] not in (None, False)]
            if unused:
                logger.warning_once(f"{', '.join(unused)}: no effect on a call of generate() that compresses nothing")
            if isinstance(given, RCCStaticCache):
                new_tokens = generation_config.max_new_tokens or max_cache_length + 1 - prompt_length
                given.check_continuation(self.config, prompt_length - given.get_seq_length() + new_tokens - 1)
            if generation_config.use_cache is False:  # each step is a call over the whole text, which outgrows a window
                model_kwargs["compress"] = False
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        _check_modes(generation_config, given, self, why)
        if rolling is not None:
            _check_rolling(generation_config, generation_mode)
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if memory is not None:
            check_memory(self.model, memory)
            memory = memory.expand(batch_size * copies)
        head_length = self._resolve_head_length(own["head_length"], memory, copies)
        ratio = self.config.check_ratio(own["ratio"])
        if rolling is not None:
            rolling.check(self.model.scheme, self.config.segment_length // ratio)
        new_tokens = max_cache_length + 1 - prompt_length
        plan = Plan.of(
            self.config,
            memory,
            model_kwargs.get("attention_mask"),
            prompt_length,
            head_length=head_length,
            ratio=ratio,
            window=window,
            compress=compress,
            # of what is generated, the last token is not decoded any more
            later=0 if rolling is None else new_tokens - 1,
        )
        plan.check(self.config, new_tokens if rolling is None else 1, rolling, ratio)
        settings: dict[str, Any] = {
            "compress_prompt": compress,
            "ratio": ratio,
            "head_length": head_length,
            "window": window,
        }
        if generation_config.cache_implementation == "static":
            model_kwargs["past_key_values"] = self._static_cache(
                generation_config, memory, plan.num_entries + new_tokens - 1, settings
            )
        else:
            num_layers = self.config.text_config.num_hidden_layers
            model_kwargs["past_key_values"] = RCCCache(num_layers, memory, rolling=rolling, **settings)
        return None

    def _static_cache(self, generation_config, memory, num_entries: int, settings: dict) -> RCCStaticCache:
        wanted = generation_config.max_cache_len or 0
        if wanted < num_entries:
            wanted = _static_length(num_entries, self.config.max_positions)
        # as the library does for its own: no shorter than the last one, for which a step may have been compiled
        length = max(wanted, getattr(self, "_previous_max_cache_length", 0))
        self._previous_max_cache_length = length
        return RCCStaticCache(self.config.text_config.num_hidden_layers, length, memory, **settings)

    def _reason(self, memory, prompt_length: int, own: dict, window: int, rolling, mask) -> str | None:
        """Why a call needs a cache of ours; None if the base's own path will do."""
        if memory is not None:
            return "a memory"
        head = own["head_length"] if isinstance(own["head_length"], int) else self.config.head_length
        if own["compress"] is not False and prompt_length - head > window:
            return f"a prompt of {prompt_length} tokens, longer than the window of {window},"
        if rolling is not None:
            return "rolling=True"
        if mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all()):
            return "a prompt that is padded on the right"
        return None

    def _resolve_window(self, given: int | None) -> int:
        self.config.check_window(given)
        return self.config.window if given is None else given

    def _resolve_head_length(self, given: HeadLength | None, memory, copies: int) -> HeadLength:
        """Raw tokens in front of the slots, for every row of the expanded batch."""
        if memory is not None:
            sizes = head_sizes(memory)
            if given is None:
                return torch.tensor(sizes)  # without slots, all raw tokens are cut anew when they roll
            every = expand_head_length(given, memory.batch_size // copies).repeat_interleave(copies)
            lengths = head_lengths(memory, every)
            if lengths == sizes:
                raise ValueError(
                    f"head_length={given} has no effect behind a memory, which has a head of {memory.num_head} tokens. "
                    "Leave it out"
                )
            return torch.tensor(lengths)
        if given is None or isinstance(given, int):
            return self.config.head_length if given is None else given
        return torch.as_tensor(given).repeat_interleave(copies)

    def _validate_model_kwargs(self, model_kwargs):
        """As the library, which looks for our arguments among those of `forward`."""
        super()._validate_model_kwargs({name: v for name, v in model_kwargs.items() if name not in ARGUMENTS})

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


def _static_length(num_entries: int, max_positions: int | None) -> int:
    """Entries of a static cache that needs `num_entries`; up to the base's range, where these are within it."""
    length = -(-num_entries // STATIC_STEP) * STATIC_STEP
    return length if max_positions is None or num_entries > max_positions else min(length, max_positions)


def _rolling(own: dict) -> Rolling | None:
    if own["rolling"]:
        if own["compress"] is False:
            raise ValueError("rolling=True and compress=False exclude each other; leave one of them out")
        return Rolling(max_slots=own["max_slots"], when_full=own["when_full"])
    for name in ("max_slots", "when_full"):
        if own[name] != ARGUMENTS[name]:
            raise ValueError(f"{name}={own[name]!r} has no effect without rolling=True")
    return None


def _check_rolling(generation_config, generation_mode) -> None:
    if generation_config.cache_implementation == "static":
        raise ValueError(
            "rolling=True and cache_implementation='static' exclude each other: a rolling cache is filled anew "
            "again and again. Leave one of them out"
        )
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            "rolling=True and assisted generation (or prompt lookup) exclude each other: rejected tokens could not "
            "be taken back once they are compressed. Leave one of them out"
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
