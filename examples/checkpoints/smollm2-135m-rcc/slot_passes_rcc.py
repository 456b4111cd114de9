# SPDX-License-Identifier: Apache-2.0
"""States, and passes in which they are rows of the decoder: slots alone, and slots amid tokens in training."""

from contextlib import suppress

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache_rcc import RecordingLayer
from .families_rcc import cache_argument, rotary_tables, rotate_keys
from .hooks_rcc import install_hooks
from .passes_rcc import EndOfPass, Pass, enter_pass


def empty_states(decoder, batch_size: int) -> tuple[Tensor, ...]:
    """States `[B, 0, D]` of all layers."""
    like = decoder.get_input_embeddings().weight
    return tuple(like.new_zeros(batch_size, 0, decoder.config.hidden_size) for _ in decoder.layers)


def append_states(state: tuple[Tensor, ...], taken: dict[int, Tensor]) -> tuple[Tensor, ...]:
    """States `[B, M, D]` with those behind them that a pass has taken from the input of each layer."""
    if state[0].shape[1] == 0:
        return tuple(taken[i] for i in range(len(state)))
    return tuple(torch.cat([old, taken[i].to(old.device)], 1) for i, old in enumerate(state))


def rotate_kept(decoder, kept: tuple[tuple[Tensor, Tensor], ...], position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[B, H, M, D]` of every layer, their keys moved from position 0 to `position_ids` `[B, M]`."""
    return [
        (rotate_keys(decoder, i, keys, position_ids.to(keys.device)), values) for i, (keys, values) in enumerate(kept)
    ]


def put_slots(hidden: Tensor, slots: Tensor, start: int) -> Tensor:
    """A layer's input `[B, T, D]` in which `slots` `[B, M, D]` have taken the place of M rows from `start` on."""
    if slots.shape[1] == hidden.shape[1]:
        return slots
    return torch.cat([hidden[:, :start], slots, hidden[:, start + slots.shape[1] :]], 1)


def new_cache(decoder, shown: list[tuple[Tensor, Tensor]] | None = None) -> Cache:
    """A cache that takes down each layer's new keys and values, behind entries `[B, H, T, D]` that it shows."""
    cache = Cache(layers=[RecordingLayer() for _ in decoder.layers])
    for layer, entries in zip(cache.layers, shown or [], strict=False):
        layer.show(entries)
    return cache


def recorded(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """The keys and values `[B, H, T, D]` that the last pass gave to a cache of `new_cache`."""
    return [layer.recorded for layer in cache.layers]


class EndingLayer(RecordingLayer):
    """A recording layer that ends the decoder layer's run: the rest of it is for rows that somebody reads on."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        shown = super().update(key_states, value_states)
        if torch.compiler.is_compiling():  # which an exception would end
            return shown
        raise EndOfPass


def project_slots(decoder, entering: Pass, state: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[B, H, M, D]` per layer of slots at position 0 that depend on nothing but their own rows.

    Without a graph no layer runs further than to its keys and values, which is as far as `decode_slots` would be right.

    Args:
        entering: the pass that puts the slots of `state`, tensors `[B, M, D]`, into every layer.
    """
    here = torch.zeros(state[0].shape[:2], dtype=torch.long, device=decoder.get_input_embeddings().weight.device)
    if torch.is_grad_enabled():
        return decode_slots(decoder, entering, state, here, None)
    cache = Cache(layers=[EndingLayer() for _ in decoder.layers])
    install_hooks(decoder.layers)
    for index, (layer, states) in enumerate(zip(decoder.layers, state, strict=True)):
        places = here.to(states.device)
        arguments = {"position_ids": places, "position_embeddings": rotary_tables(decoder, index, places)}
        with suppress(EndOfPass), enter_pass(entering):
            layer(states, **arguments, **{cache_argument(layer): cache})
    return recorded(cache)


def decode_slots(
    decoder,
    entering: Pass,
    state: tuple[Tensor, ...],
    position_ids: Tensor,
    mask: Tensor | None,
    head: list[tuple[Tensor, Tensor]] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of slots alone, `[B, H, M, D]` per layer; they attend to each other and to the head.

    Args:
        entering: the pass that puts the slots of `state`, tensors `[B, M, D]`, into every layer.
        position_ids: `[B, M]`.
        mask: over head and slots, 0 at padding.
        head: keys and values of what stands in front of them.
    """
    recorder = new_cache(decoder, head)
    like = decoder.get_input_embeddings().weight
    rows = torch.zeros(*state[0].shape, dtype=state[0].dtype, device=like.device)  # every row is replaced at layer 0
    install_hooks(decoder.layers)
    with enter_pass(entering):
        decoder(
            inputs_embeds=rows,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=recorder,
            use_cache=True,
        )
    return recorded(recorder)


def decode_amid(
    decoder,
    entering: Pass,
    num_slots: int,
    inputs_embeds: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    num_head: int,
    **kwargs,
):
    """`MemoryScheme.decode` by the pass that puts `num_slots` slots behind the first `num_head` rows of every layer."""
    placeholders = inputs_embeds.new_zeros(len(inputs_embeds), num_slots, inputs_embeds.shape[2])
    embeds = torch.cat([inputs_embeds[:, :num_head], placeholders, inputs_embeds[:, num_head:]], 1)
    install_hooks(decoder.layers)
    with enter_pass(entering):
        return decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False, **kwargs)
