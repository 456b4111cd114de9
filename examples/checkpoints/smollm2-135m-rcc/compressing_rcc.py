# SPDX-License-Identifier: Apache-2.0
"""Turning tokens into memory: segments are encoded in batches, slots go into place, the rest stays local."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .checking_rcc import check_inputs, check_memory, origin_of
from .compressed_ops_rcc import compact, head_lengths, head_sizes, without_raw
from .compressed_rcc import RCCMemory
from .replicas_rcc import RCCReplicas, encode_segments
from .segments_rcc import Grid, HeadLength, fill_head, join, join_masks, split_head


def compress_context(
    model,
    inputs: Tensor,
    mask: Tensor | None,
    memory: RCCMemory | None,
    *,
    ratio: int | None,
    max_slots: int | None,
    head_length: HeadLength | None,
    window: int | None,
    on_progress: Callable[[int], None] | None,
    replicas: RCCReplicas | None,
) -> RCCMemory:
    """See `RCCModel.compress`."""
    check_inputs(model, inputs, mask)
    if replicas is not None:
        replicas.check(model)
    model.config.check_window(window)
    if ratio is not None and max_slots is not None:
        raise ValueError(f"give ratio={ratio} or max_slots={max_slots}, not both")
    old, head, head_mask, inputs, mask = _parts(model, inputs, mask, memory, head_length)
    grid = Grid.of(inputs, mask, model.config.segment_length, window)
    if grid.num_segments == 0:
        if old is None and window is None:
            raise ValueError(
                f"the context has {max(grid.lengths)} tokens, less than one segment of {grid.segment_length}: "
                "nothing can be compressed. Put it into the prompt, or use a model with a shorter segment_length."
            )
        new = _empty_memory(model, len(inputs)) if old is None else old
    else:
        if max_slots is not None:
            ratio = choose_ratio(model, max_slots, grid.counts, old)
        new = append_segments(model, old, inputs, grid, model.config.check_ratio(ratio), on_progress, replicas)
    local, local_mask = grid.take_local(inputs)
    # clones: views would keep all the ids of the context as long as the memory lives
    return replace(
        compact(new), head_ids=head.clone(), head_mask=head_mask, local_ids=local.clone(), local_mask=local_mask
    )


def _parts(model, inputs: Tensor, mask: Tensor | None, memory: RCCMemory | None, head_length: HeadLength | None):
    """The slots to append to, the head and its mask, and the tokens to compress and their mask, packed."""
    if memory is None:
        return None, *split_head(inputs, mask, model.config.head_length if head_length is None else head_length)
    check_memory(model, memory)
    if memory.batch_size != len(inputs):
        raise ValueError(f"the memory has {memory.batch_size} rows and input_ids {len(inputs)}; append row by row")
    lengths = head_sizes(memory) if head_length is None else head_lengths(memory, head_length)
    if head_length is not None and lengths == head_sizes(memory):
        raise ValueError(
            f"head_length={head_length} has no effect on a memory that is appended to: it keeps its head of "
            f"{memory.num_head} tokens. Leave it out"
        )
    inputs, mask = join(memory.local_ids, memory.local_mask, inputs, mask)
    return without_raw(memory), *fill_head(memory.head_ids, memory.head_mask, inputs, mask, lengths)


def choose_ratio(model, max_slots: int, counts: Sequence[int], memory: RCCMemory | None) -> int:
    """The smallest ratio at which no row has more than `max_slots` slots.

    Args:
        counts: segments to come in each row.
        memory: what they are appended to, if anything.

    Raises:
        ValueError: if none does.
    """
    length, ratios = model.config.segment_length, model.config.possible_ratios()
    usual = [r for r in ratios if 4 <= r <= 128] or ratios  # what checkpoints are trained for
    present = [0] * len(counts)
    if memory is not None:
        present = [memory.num_slots] * len(counts) if memory.mask is None else memory.mask.sum(1).tolist()
    for ratio in usual:
        needed = max(p + n * (length // ratio) for p, n in zip(present, counts, strict=True))
        if needed <= max_slots:
            return ratio
    raise ValueError(
        f"max_slots={max_slots} is too few: at the highest ratio, {usual[-1]}, this context needs {needed} slots. "
        f"Allow {needed}, or pass a ratio of your own."
    )


def append_segments(
    model,
    memory: RCCMemory | None,
    inputs: Tensor,
    grid: Grid,
    ratio: int,
    on_progress: Callable[[int], None] | None = None,
    replicas: RCCReplicas | None = None,
) -> RCCMemory:
    """A memory with the grid's segments behind those of `memory`; tokens that the grid leaves local are dropped.

    Args:
        inputs: packed ids `[B, T]` or embeddings `[B, T, D]`.
        on_progress: called with the number of source tokens of each encoded batch.
        replicas: copies of the model that compress as well.
    """
    if memory is not None and memory.segment_length != grid.segment_length:
        raise ValueError(
            f"the memory has segments of {memory.segment_length} tokens and config.segment_length is "
            f"{grid.segment_length} now: set it back, or compress the whole context again"
        )
    if memory is not None and memory.dtype == torch.int8:  # its old slots stay as they are
        new = append_segments(model, None, inputs, grid, ratio, on_progress, replicas)
        return memory.concatenate([memory, new.to_int8()])
    slots, blocks, device = grid.segment_length // ratio, max(grid.counts), inputs.device
    layers = _encode(model, memory, inputs, grid, ratio, on_progress, replicas)
    new_mask = grid.block_mask(slots, device)
    if memory is None:
        return _plain_memory(model, layers, new_mask, (slots,) * blocks, len(inputs))
    width = sum(memory.slot_counts)
    mask = join_masks(memory.mask, width, new_mask, blocks * slots, len(inputs), device)
    return replace(memory, layers=layers, mask=mask, slot_counts=memory.slot_counts + (slots,) * blocks)


@torch.no_grad()
def _empty_memory(model, batch_size: int) -> RCCMemory:
    """A memory without slots and tokens. What its tensors would be like is seen from a slot of one token."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    kept = encode_segments(model, token, 1)
    layers = tuple(
        tuple(part.new_zeros(batch_size, *part.shape[1:-2], 0, part.shape[-1]) for part in parts) for parts in kept
    )
    return _plain_memory(model, layers, None, (), batch_size)


def _plain_memory(model, layers, mask: Tensor | None, slot_counts: tuple[int, ...], batch_size: int) -> RCCMemory:
    """A memory without raw tokens."""
    none = torch.zeros(batch_size, 0, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    return RCCMemory(
        layers=layers,
        mask=mask,
        head_ids=none,
        head_mask=None,
        local_ids=none,
        local_mask=None,
        slot_counts=slot_counts,
        segment_length=model.config.segment_length,
        origin=origin_of(model),
    )


def _encode(model, memory, inputs, grid, ratio, on_progress, replicas):
    """The kept tensors of every layer, old slots first; new ones are written straight to their place."""
    slots, blocks = grid.segment_length // ratio, max(grid.counts)
    batches = grid.segment_batches(inputs, model.config.batch_tokens(inputs.device.type))
    if replicas is None:
        encoded = ((place, encode_segments(model, segments, ratio)) for place, segments in batches)
    else:
        encoded = replicas.encode(batches, ratio)
    # sent before the loop, in which the host would wait until the device has caught up
    own, cells, buffers = grid.cells(inputs.device), {}, None
    for place, kept in encoded:
        if buffers is None:
            buffers = _buffers(kept, None if memory is None else memory.layers, len(inputs), blocks * slots)
            devices = {part.device for parts in kept for part in parts}
            cells = {device: [cell.to(device) for cell in own] for device in devices}
        # in a single row segments stand in their order: a slice, which is cheaper than a scatter
        at = {d: (0, place) if len(inputs) == 1 else tuple(cell[place] for cell in cells[d]) for d in cells}
        for layer, parts in zip(buffers, kept, strict=True):
            for buffer, part in zip(layer, parts, strict=True):
                new = buffer[..., buffer.shape[-2] - blocks * slots :, :].unflatten(-2, (blocks, slots)).movedim(-3, 1)
                new[at[part.device]] = part
        if on_progress is not None:
            on_progress((place.stop - place.start) * grid.segment_length)
    return buffers


def _buffers(kept, old, batch_size: int, new_slots: int):
    """Room for old and new slots, with the old ones in place and zeros where slots are yet to come."""
    layers = []
    for i, parts in enumerate(kept):
        room = []
        for j, part in enumerate(parts):
            before = 0 if old is None else old[i][j].shape[-2]
            buffer = part.new_zeros(batch_size, *part.shape[1:-2], before + new_slots, part.shape[-1])
            if before:
                buffer[..., :before, :] = old[i][j]
            room.append(buffer)
        layers.append(tuple(room))
    return tuple(layers)
