# SPDX-License-Identifier: Apache-2.0
"""Decoding behind memory from a cache, `[head | slots | local tokens]`, that is filled at its first use."""

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_rcc import RCCCache
from .checking_rcc import slot_dtype
from .compressed_ops_rcc import compact
from .compressed_rcc import RCCMemory
from .compressing_rcc import append_segments
from .hooks_rcc import install_hooks
from .passes_rcc import Pass, enter_pass
from .positions_rcc import local_positions, slot_positions, slot_tokens
from .segments_rcc import Grid, fill_head, join, join_masks, pack_left, split_head
from .slot_passes_rcc import new_cache, recorded


def decode_with_cache(model, cache: RCCCache, inputs: Tensor, attention_mask: Tensor | None, **kwargs):
    """Decode ids `[B, T]` or embeddings `[B, T, D]` behind what the cache holds.

    Returns:
        The base's output for these tokens, with the cache in `past_key_values` unless it is read-only.

    Raises:
        ValueError: if the mask has no column for each token, the base has too few positions, or a slot budget is
            exceeded.
    """
    length = inputs.shape[1]
    mask = last_columns(attention_mask, length)
    if cache.started and cache.rolling is not None and cache.num_local + length > _window(model, cache):
        cache.roll()
    if not cache.started:
        inputs, mask = _start(model, cache, inputs, mask)
    query_length = inputs.shape[1]
    mask = cache.extend_mask(mask, len(inputs), query_length, inputs.device)
    position_ids = cache.next_positions(mask, query_length, inputs.device)
    cache.check_room(model.config, position_ids)
    with enter_pass(_reading(model, cache)):
        outputs = model.language_model(
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=not cache.read_only,
            **_named(inputs),
            **kwargs,
        )
    if not cache.read_only:
        cache.mask = mask
    if cache.rolling is not None:
        former, inputs = (None, inputs) if cache.local is None else _alike(model, cache.local, inputs)
        cache.local = inputs if former is None else torch.cat([former, inputs], 1)
    return trim(outputs, min(length, query_length), None if cache.read_only else cache)


def _start(model, cache: RCCCache, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Fill the cache from its slots and, if asked, from the part of the prompt that does not fit the window.

    Returns:
        The tokens to decode, and their mask.
    """
    length = inputs.shape[1]
    if cache.local is not None and cache.local.shape[1]:
        local, inputs = _alike(model, cache.local, inputs)
        inputs, mask = join(local, cache.local_mask, inputs, mask)
    if cache.compress_prompt:
        inputs, mask = _compress_prompt(model, cache, inputs, mask)
    head = cache.head
    if cache.memory is None or not cache.memory.slot_counts:  # all is raw, and a head is no more than its beginning
        if head is not None and head.shape[1]:
            head, inputs = _alike(model, head, inputs)
            inputs, mask = pack_left(*join(head, cache.head_mask, inputs, mask))
            cache.head, cache.head_mask = None, None
        cache.start([], None, 0, num_head=0, local_length=inputs.shape[1], input_length=length)
        return inputs, mask
    install_hooks(model.language_model.layers)  # here and not at each step, which would take as long as a few layers
    entries, entry_mask, shift = _front(model, cache.memory, head, cache.head_mask)
    num_head = 0 if head is None else head.shape[1]
    cache.start(entries, entry_mask, shift, num_head=num_head, local_length=inputs.shape[1], input_length=length)
    return inputs, mask


@torch.no_grad()
def _compress_prompt(model, cache: RCCCache, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move what does not fit the window from the inputs to the cache's memory; the rest, with padding in front."""
    if cache.head is None:
        cache.head, cache.head_mask, inputs, mask = split_head(inputs, mask, cache.head_length)
    else:
        head, inputs = _alike(model, cache.head, inputs)
        cache.head, cache.head_mask, inputs, mask = fill_head(head, cache.head_mask, inputs, mask, cache.head_length)
    grid = Grid.of(inputs, mask, model.config.segment_length, _window(model, cache))
    if grid.num_segments:
        ratio = model.config.check_ratio(cache.ratio)
        cache.memory = compact(append_segments(model, cache.memory, inputs, grid, ratio))
        if cache.rolling is not None:
            cache.memory = cache.rolling.bound(cache.memory)
    return grid.take_local(inputs)


def _window(model, cache: RCCCache) -> int:
    return model.config.window if cache.window is None else cache.window


def _alike(model, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are if they are of one kind; otherwise ids become embeddings."""
    embed = model.get_input_embeddings()
    if first.ndim == second.ndim:
        return first, second
    return (embed(first), second) if first.ndim == 2 else (first, embed(second))


def _front(model, memory: RCCMemory, head: Tensor | None, head_mask: Tensor | None):
    """What stands in front of the local tokens: keys and values of head and slots, their mask, and how far local
    positions move down."""
    batch_size, width = memory.batch_size, sum(memory.slot_counts)
    device = memory.local_ids.device
    mask = memory.mask
    spread = model.config.spread_slots
    tokens = slot_tokens(memory.segment_length, memory.slot_counts, mask) if spread else ()
    slots, shift = slot_positions(model.config, mask, (batch_size, width), device, tokens)
    layers = memory.float_layers(slot_dtype(model))
    if head is None or head.shape[1] == 0:
        return model.scheme.read(model.language_model, layers, slots, mask), mask, shift
    num_head = head.shape[1] if head_mask is None else head_mask.long().sum(1, keepdim=True)
    entries = _decode_head(model, head, head_mask, None if mask is None else mask.any(1)[:, None, None])
    whole = join_masks(head_mask, head.shape[1], mask, width, batch_size, device)
    behind = model.scheme.read(model.language_model, layers, slots + num_head, whole, entries)
    pairs = zip(entries, behind, strict=True)
    joined = [(torch.cat([k1, k2], -2), torch.cat([v1, v2], -2)) for (k1, v1), (k2, v2) in pairs]
    return joined, whole, shift


def _decode_head(model, head: Tensor, mask: Tensor | None, rows: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[B, H, T, D]` of the raw tokens in front of the slots, for every layer."""
    decoder = model.language_model
    recorder = new_cache(decoder)
    positions = local_positions(mask, 0, head.shape[1], 0, head.device)
    with enter_pass(Pass("read", rows=rows) if model.scheme.adapts_tokens else None):
        decoder(attention_mask=mask, position_ids=positions, past_key_values=recorder, use_cache=True, **_named(head))
    return recorded(recorder)


def _reading(model, cache: RCCCache) -> Pass | None:
    """The pass for tokens behind the cache: read adapters on in rows that have memory, if they act on tokens."""
    return Pass("read", rows=cache.rows_with_slots) if cache.has_slots and model.scheme.adapts_tokens else None


def last_columns(mask: Tensor | None, length: int) -> Tensor | None:
    """The part of an attention mask that is for the last `length` tokens.

    Raises:
        ValueError: if it is no mask over tokens, or has fewer columns.
    """
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; behind memory it must be [batch, tokens] with at least "
            f"{length} columns, the last of which are for the new tokens"
        )
    return mask[:, mask.shape[1] - length :]


def _named(inputs: Tensor) -> dict[str, Tensor]:
    return {"inputs_embeds" if inputs.ndim == 3 else "input_ids": inputs}


def trim(outputs: BaseModelOutputWithPast, length: int, cache: RCCCache | None) -> BaseModelOutputWithPast:
    """The output for the last `length` tokens alone."""
    hidden_states = outputs.hidden_states
    return BaseModelOutputWithPast(
        last_hidden_state=outputs.last_hidden_state[:, -length:],
        past_key_values=cache,
        hidden_states=None if hidden_states is None else tuple(h[:, -length:] for h in hidden_states),
        attentions=outputs.attentions,
    )
