# SPDX-License-Identifier: Apache-2.0
"""The training pass: segments are written with the graph kept, and slots and tokens decoded in one pass without a
cache."""

import torch
from torch import Tensor
from transformers.utils import logging

from .decoding_rcc import last_columns, trim
from .positions_rcc import check_positions, local_positions, moved_up, slot_positions
from .segments_rcc import Grid, join, join_masks, split_head

logger = logging.get_logger(__name__)


def decode_behind_context(
    model,
    context: Tensor,
    context_mask: Tensor | None,
    inputs: Tensor,
    mask: Tensor | None,
    ratio: int | None,
    **kwargs,
):
    """Compress a context `[B, N]` and decode `inputs` behind it.

    Raises:
        ValueError: if batches differ in size, or the base has too few positions.
    """
    ratio = model.config.check_ratio(ratio)
    if len(context) != len(inputs):
        raise ValueError(f"context_ids has {len(context)} rows and the local tokens {len(inputs)}; they must agree")
    embed = model.get_input_embeddings()
    head, head_mask, rest, rest_mask = split_head(context, context_mask, model.config.head_length)
    grid = Grid.of(rest, rest_mask, model.config.segment_length)
    head, inputs = (embed(part) if part.ndim == 2 else part for part in (head, inputs))
    tail, tail_mask = grid.take_local(rest)
    length = inputs.shape[1]
    local, local_mask = join(embed(tail) if tail.ndim == 2 else tail, tail_mask, inputs, last_columns(mask, length))
    if grid.num_segments == 0:
        logger.warning_once(
            f"no row of context_ids has a segment of {grid.segment_length} tokens: nothing is compressed, and the "
            "compressor gets no gradient from such a batch. Give longer contexts, or use a shorter segment_length"
        )
        local, local_mask = join(head, head_mask, local, local_mask)
        return trim(_decode_plain(model, local, local_mask, **kwargs), length, None)
    state = write_segments(model, rest, grid, ratio)
    slot_mask = grid.block_mask(grid.segment_length // ratio, local.device)
    outputs = decode_jointly(model, state, slot_mask, ratio, head, head_mask, local, local_mask, **kwargs)
    return trim(outputs, length, None)


def write_segments(model, inputs: Tensor, grid: Grid, ratio: int) -> tuple[Tensor, ...]:
    """States `[B, M, D]` of every layer for the segments of packed inputs; where rows have none, zeros."""
    scheme, decoder, slots = model.scheme, model.language_model, grid.segment_length // ratio
    limit = model.config.batch_tokens(inputs.device.type)
    if _keeps_graph(decoder):  # which keeps the activations of all segments anyway: all at once is fastest then
        limit = grid.num_segments * grid.segment_length
    parts = []
    for _, segments in grid.segment_batches(inputs, limit):
        parts.append(scheme.write(decoder, scheme.empty(decoder, len(segments)), segments, ratio))
    layers = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    if not grid.is_ragged:
        return tuple(layer.unflatten(0, (len(inputs), -1)).flatten(1, 2) for layer in layers)
    shape = (len(inputs), max(grid.counts), slots)
    cells = {device: grid.cells(device) for device in {layer.device for layer in layers}}
    states = [layer.new_zeros(*shape, layer.shape[-1]) for layer in layers]
    return tuple(s.index_put(cells[x.device], x).flatten(1, 2) for s, x in zip(states, layers, strict=True))


def _keeps_graph(decoder) -> bool:
    """Whether gradients go through what is written; not if only the read side is trained."""
    read = (".rcc.read.", ".rcc.slot_map.")
    written = (p for name, p in decoder.named_parameters() if not any(part in name for part in read))
    return torch.is_grad_enabled() and any(p.requires_grad for p in written)


def decode_jointly(
    model,
    state: tuple[Tensor, ...],
    slot_mask: Tensor | None,
    ratio: int,
    head: Tensor,
    head_mask: Tensor | None,
    local: Tensor,
    local_mask: Tensor | None,
    **kwargs,
):
    """Decode embeddings `[B, T, D]` behind a head `[B, H, D]` and the slots of a state `[B, M, D]`.

    Args:
        ratio: source tokens of each slot.

    Returns:
        The base's output for head, slots and local tokens.

    Raises:
        ValueError: if the base has too few positions.
    """
    batch_size, num_head, num_slots, device = len(local), head.shape[1], state[0].shape[1], local.device
    slots, shift = slot_positions(model.config, slot_mask, (batch_size, num_slots), device, [ratio] * num_slots)
    ahead = moved_up(shift) if model.config.spread_slots else 0  # else it is a look at the device for nothing
    in_front = join_masks(head_mask, num_head, slot_mask, num_slots, batch_size, device)
    mask = join_masks(in_front, num_head + num_slots, local_mask, local.shape[1], batch_size, device)
    if mask is None and (slots.is_floating_point() or shift != 0):
        # without a mask, the library takes positions that do not count up by one for packed sequences
        mask = torch.ones(batch_size, num_head + num_slots + local.shape[1], dtype=torch.long, device=device)
    behind = local_positions(mask, num_head + num_slots, local.shape[1], shift, device)
    check_positions(model.config, num_head + num_slots + local.shape[1] + ahead, behind)
    # without a mask they count up by one from 0, which the base supposes by itself
    position_ids = None
    if mask is not None:
        before = local_positions(None if head_mask is None else head_mask, 0, num_head, 0, device)
        sizes = num_head if head_mask is None else head_mask.long().sum(1, keepdim=True)
        parts = [before.expand(batch_size, num_head), slots + sizes, behind.expand(batch_size, local.shape[1])]
        position_ids = torch.cat(parts, 1)
    rows = None if slot_mask is None else slot_mask.any(1)[:, None, None]
    embeds = torch.cat([head, local], 1)
    return model.scheme.decode(model.language_model, state, embeds, mask, position_ids, num_head, rows, **kwargs)


def _decode_plain(model, embeds: Tensor, mask: Tensor | None, **kwargs):
    """The base's pass over embeddings `[B, T, D]` that are padded anywhere."""
    positions = None if mask is None else local_positions(mask, 0, embeds.shape[1], 0, embeds.device)
    return model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **kwargs
    )
