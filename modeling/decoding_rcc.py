# SPDX-License-Identifier: Apache-2.0
"""Decoding behind memory: from a cache that begins with slots, or (training) in one pass over slots and tokens."""

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_rcc import RCCCache
from .compressing_rcc import append_segments, slot_dtype, without_local
from .passes_rcc import Pass, enter_pass, install_hooks
from .positions_rcc import check_positions, local_positions, slot_positions
from .segments_rcc import Grid, join, pack_left


def decode_with_cache(model, cache: RCCCache, inputs: Tensor, attention_mask: Tensor | None, **kwargs):
    """Decode ids `[B, T]` or embeddings `[B, T, D]` behind what the cache holds.

    Returns:
        The base's output for these tokens, with the cache in `past_key_values` unless it is read-only.

    Raises:
        ValueError: if the mask has no column for each token, or the base has too few positions.
    """
    length = inputs.shape[1]
    mask = _last_columns(attention_mask, length)
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
    return _trim(outputs, min(length, query_length), None if cache.read_only else cache)


def decode_behind_context(model, context_ids: Tensor, inputs: Tensor, mask: Tensor | None, ratio: int | None, **kwargs):
    """Compress `context_ids` `[B, N]` and decode `inputs` behind them in one pass, with the graph kept.

    Raises:
        ValueError: if the context is shorter than a segment, or the base has too few positions.
    """
    config, scheme, decoder = model.config, model.scheme, model.language_model
    length, ratio = config.segment_length, config.check_ratio(ratio)
    if len(context_ids) != len(inputs):
        raise ValueError(f"context_ids has {len(context_ids)} rows and the local tokens {len(inputs)}; they must agree")
    grid = Grid.of(context_ids, None, length)
    if grid.num_segments == 0:
        raise ValueError(
            f"context_ids has {context_ids.shape[1]} tokens, less than one segment of {length}: nothing would be "
            "compressed. Give a longer context, or use a model with a shorter segment_length."
        )
    step = max(1, config.encode_batch_tokens // length)
    parts = []
    for first in range(0, grid.num_segments, step):
        segments = grid.take_segments(context_ids, first, min(first + step, grid.num_segments))
        parts.append(scheme.write(decoder, scheme.empty(decoder, len(segments)), segments, ratio))
    state = tuple(torch.cat(layer).unflatten(0, (len(inputs), -1)).flatten(1, 2) for layer in zip(*parts, strict=True))
    tail, _ = grid.take_local(context_ids)
    embed = model.get_input_embeddings()
    local = torch.cat([embed(tail), embed(inputs) if inputs.ndim == 2 else inputs], 1)
    mask = _last_columns(mask, inputs.shape[1])
    if mask is not None:
        mask = torch.cat([mask.new_ones(tail.shape), mask], 1)
    num_slots, length = state[0].shape[1], local.shape[1]
    slots, shift = slot_positions(config, None, (len(local), num_slots), local.device)
    mask = None if mask is None else torch.cat([mask.new_ones(len(local), num_slots), mask], 1)
    if mask is None and slots.is_floating_point():
        # without a mask, the library takes positions that do not count up by one for packed sequences
        mask = torch.ones(len(local), num_slots + length, dtype=torch.long, device=local.device)
    behind = local_positions(mask, num_slots, length, shift, local.device)
    check_positions(config, num_slots + length, behind)
    # without a mask they count up by one from 0, which the base supposes by itself and then need not look for packing
    position_ids = None if mask is None else torch.cat([slots, behind.expand(len(local), length)], 1)
    outputs = scheme.decode(decoder, state, local, mask, position_ids, **kwargs)
    return _trim(outputs, inputs.shape[1], None)


def _start(model, cache: RCCCache, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Fill the cache from its memory and, if asked, from the part of the prompt that does not fit the window."""
    memory, length = cache.memory, inputs.shape[1]
    if memory is not None:
        local = memory.local_ids if inputs.ndim == 2 else model.get_input_embeddings()(memory.local_ids)
        if memory.num_local:
            inputs, mask = join(local, memory.local_mask, inputs, mask)
        memory = without_local(memory)
    if cache.compress_prompt:
        packed, packed_mask = pack_left(inputs, mask)
        grid = Grid.of(packed, packed_mask, model.config.segment_length, model.config.window)
        if grid.num_segments:
            with torch.no_grad():
                memory = append_segments(model, memory, packed, grid, model.config.check_ratio(cache.ratio))
            inputs, mask = grid.take_local(packed)
    slots, slot_mask = [], None
    shift: Tensor | int = 0
    if memory is not None and memory.slot_counts:
        slot_mask, shape = memory.mask, (memory.batch_size, sum(memory.slot_counts))
        positions, shift = slot_positions(model.config, slot_mask, shape, inputs.device)
        layers = memory.float_layers(slot_dtype(model))
        slots = model.scheme.read(model.language_model, layers, positions, slot_mask)
    cache.start(slots, slot_mask, shift, local_length=inputs.shape[1], input_length=length)
    return inputs, mask


def _reading(model, cache: RCCCache) -> Pass | None:
    """The pass for tokens behind the cache: read adapters on in rows that have memory."""
    if not cache.has_slots:
        return None
    install_hooks(model.language_model.layers)
    return Pass("read", rows=cache.rows_with_slots())


def _last_columns(mask: Tensor | None, length: int) -> Tensor | None:
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


def _trim(outputs: BaseModelOutputWithPast, length: int, cache: RCCCache | None) -> BaseModelOutputWithPast:
    """The output for the last `length` tokens alone."""
    hidden_states = outputs.hidden_states
    return BaseModelOutputWithPast(
        last_hidden_state=outputs.last_hidden_state[:, -length:],
        past_key_values=cache,
        hidden_states=None if hidden_states is None else tuple(h[:, -length:] for h in hidden_states),
        attentions=outputs.attentions,
    )
