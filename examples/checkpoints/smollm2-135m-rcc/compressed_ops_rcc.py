# SPDX-License-Identifier: Apache-2.0
"""Cutting memories by segments and rows, and putting them together.

A slot knows neither its position nor the other slots (positions are given when a memory is read), so all of this moves
slots and computes nothing. What comes out is laid out as `compress` does it: absent segments in front of a row's own.
The raw tokens of a row, its head and its local ones, go with its first and its last segment.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .segments_rcc import HeadLength, expand_head_length, last_tokens, row_lengths

Block = tuple[int, int]
"""The slots of one segment of one row: the first one's place on the slot axis, and how many there are."""


def map_slots(function: Callable[..., Tensor], memory, *others):
    """`memory` with every tensor of slots (and of their scales) made from those of all the memories."""
    memories = (memory, *others)
    changed: dict[str, Any] = {}
    for name in ("layers", "scales"):
        if getattr(memory, name) is not None:
            layers = zip(*(getattr(m, name) for m in memories), strict=True)
            changed[name] = tuple(tuple(map(function, *parts)) for parts in layers)
    return replace(memory, **changed)


def row_blocks(memory) -> list[list[Block]]:
    """The segments of every row, in order."""
    ends = list(accumulate(memory.slot_counts))
    if memory.mask is None:
        row = [(end - size, size) for end, size in zip(ends, memory.slot_counts, strict=True)]
        return [row] * memory.batch_size
    seen = F.pad(memory.mask.bool().long().cumsum(1), (1, 0))[:, [0, *ends]]
    sizes = seen.diff(dim=1).tolist()  # within a block, absent slots come first
    return [[(end - size, size) for end, size in zip(ends, row, strict=True) if size] for row in sizes]


def head_sizes(memory) -> list[int]:
    """Raw tokens in front of the slots of every row."""
    return row_lengths(memory.head_ids, memory.head_mask)


def local_sizes(memory) -> list[int]:
    """Local tokens of every row."""
    return row_lengths(memory.local_ids, memory.local_mask)


def head_lengths(memory, wanted: HeadLength) -> list[int]:
    """Raw tokens in front of every row as text is appended: `wanted` where there is nothing else so far, or else what
    there is."""
    every = expand_head_length(wanted, memory.batch_size).tolist()
    parts = zip(head_sizes(memory), every, row_blocks(memory), local_sizes(memory), strict=True)
    return [size if blocks or local else max(size, most) for size, most, blocks, local in parts]


def without_raw(memory):
    """The memory's slots alone."""
    none = memory.local_ids[:, :0]
    return replace(memory, head_ids=none, head_mask=None, local_ids=none, local_mask=None)


def slice_segments(memory, start: int, stop: int | None):
    """See `RCCMemory.slice`."""
    _check_slots(memory)
    rows, heads, sizes = row_blocks(memory), head_sizes(memory), local_sizes(memory)
    for i, blocks in enumerate(rows):
        count = len(blocks)
        rows[i] = blocks[start:stop]
        if start > 0 or count + start > 0 > start:
            heads[i] = 0
        # local tokens are what there is of segment number `count`
        if start > count or (stop is not None and stop <= count):
            sizes[i] = 0
    return _arrange(memory, rows, heads, sizes)


def coarsen(memory, factors: Sequence[int]):
    """The memory of one row with only every `factors[i]`-th slot of its segment `i`.

    A state at every r-th token is one at every token of a coarser grid too, if that ends segments alike: this is what
    compressing the segments at higher ratios would have given (for schemes with `nested_ratios`).
    """
    _check_slots(memory)
    places: list[int] = []
    counts = []
    for (first, size), factor in zip(row_blocks(memory)[0], factors, strict=True):
        places += range(first + factor - 1, first + size, factor)
        counts.append(size // factor)
    index = torch.tensor([places], dtype=torch.long)
    thinned = map_slots(lambda slots: _take(slots, index, index < 0), memory)
    return replace(thinned, mask=None, slot_counts=tuple(counts))


def compact(memory):
    """The memory as compressing its text in one go lays it out, with no more absent slots than rows differ by.

    Rows of a stream are compressed each in its own time: a segment that only some have adds absent ones to the others.
    """
    if memory.mask is None or any(s.shape[-2] != sum(memory.slot_counts) for layer in memory.layers for s in layer):
        return memory
    return _arrange(memory, row_blocks(memory), head_sizes(memory), local_sizes(memory))


def concatenate(memories: Sequence):
    """See `RCCMemory.concatenate`."""
    memories = _check_joinable(memories, "concatenate")
    first, last = memories[0], memories[-1]
    for number, memory in enumerate(memories):
        if memory.batch_size != last.batch_size:
            raise ValueError(
                f"concatenate() joins row to row, but memory {number} has {memory.batch_size} rows and the last one "
                f"{last.batch_size}; bring them to one number with select() or expand()"
            )
        if number < len(memories) - 1 and any(local_sizes(memory)):
            raise ValueError(
                f"memory {number} ends in {max(local_sizes(memory))} raw local tokens: slots cannot follow them. "
                "Append the later text with model.compress(input_ids, memory=...) instead, which compresses them with "
                "it, or leave them out with .slice()."
            )
        if number > 0 and any(head_sizes(memory)):
            raise ValueError(
                f"memory {number} begins with {max(head_sizes(memory))} raw tokens (its head), which cannot stand "
                "behind slots. Compress the later text with head_length=0, or leave the head out with .slice(1)."
            )
    lengths = {memory.segment_length for memory in memories}
    if len(lengths) > 1:
        raise ValueError(f"the memories have segments of different lengths ({sorted(lengths)}); compress one again")
    rows: list[list[Block]] = [[] for _ in range(last.batch_size)]
    offset = 0
    for memory in memories:
        for row, blocks in zip(rows, row_blocks(memory), strict=True):
            row += [(first + offset, size) for first, size in blocks]
        offset += sum(memory.slot_counts)
    joined = map_slots(lambda *parts: torch.cat(parts, -2), *memories)
    joined = replace(joined, local_ids=last.local_ids, local_mask=last.local_mask)
    return _arrange(joined, rows, head_sizes(first), local_sizes(last))


def stack(memories: Sequence):
    """See `RCCMemory.stack`."""
    memories = _check_joinable(memories, "stack")
    width = max(sum(memory.slot_counts) for memory in memories)
    rows: list[list[Block]] = []
    heads: list[int] = []
    sizes: list[int] = []
    for memory in memories:
        heads += head_sizes(memory)
        sizes += local_sizes(memory)
        before = width - sum(memory.slot_counts)
        rows += [[(first + before, size) for first, size in blocks] for blocks in row_blocks(memory)]

    def join(*parts: Tensor) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, width - part.shape[-2], 0)) for part in parts])

    joined = replace(
        map_slots(join, *memories),
        head_ids=_stack_ids([m.head_ids for m in memories]),
        local_ids=_stack_ids([m.local_ids for m in memories]),
    )
    return _arrange(joined, rows, heads, sizes)


def unstack(memory) -> list:
    """See `RCCMemory.unstack`."""
    _check_slots(memory)
    rows, heads, sizes = row_blocks(memory), head_sizes(memory), local_sizes(memory)
    singles = [memory.select(torch.tensor([i])) for i in range(len(rows))]
    return [_arrange(one, rows[i : i + 1], heads[i : i + 1], sizes[i : i + 1]) for i, one in enumerate(singles)]


def _stack_ids(rows: list[Tensor]) -> Tensor:
    """Ids `[B, T]` of several batches as one, shorter rows padded in front."""
    longest = max(ids.shape[1] for ids in rows)
    return torch.cat([F.pad(ids, (longest - ids.shape[1], 0)) for ids in rows])


def _arrange(memory, rows: list[list[Block]], heads: list[int], sizes: list[int]):
    """The memory whose rows have the given segments of its slots, the last `heads` tokens of its head and the last
    `sizes` of its local ones."""
    most = max(map(len, rows))
    padded = [[(0, 0)] * (most - len(blocks)) + blocks for blocks in rows]
    counts = tuple(max(size for _, size in column) for column in zip(*padded, strict=True))
    places = [_places(blocks, counts) for blocks in padded]
    index = torch.tensor(places, dtype=torch.long).reshape(len(rows), sum(counts))
    absent = index < 0
    mask = None if not absent.any() else (~absent).long().to(memory.local_ids.device)
    head_ids, head_mask = last_tokens(memory.head_ids, heads)
    local_ids, local_mask = last_tokens(memory.local_ids, sizes)
    width = memory.layers[0][0].shape[-2]
    if index.shape[1] != width or not bool((absent | (index == torch.arange(width))).all()):
        memory = map_slots(lambda slots: _take(slots, index, absent), memory)
    return replace(
        memory,
        mask=mask,
        head_ids=head_ids,
        head_mask=head_mask,
        local_ids=local_ids,
        local_mask=local_mask,
        slot_counts=counts,
    )


def _places(blocks: list[Block], counts: tuple[int, ...]) -> list[int]:
    """For every slot of a row's new layout its old place, or -1 where there is none."""
    places = []
    for (first, size), width in zip(blocks, counts, strict=True):
        places += [-1] * (width - size) + list(range(first, first + size))
    return places


def _take(slots: Tensor, index: Tensor, absent: Tensor) -> Tensor:
    """The slots `[B, ..., M, D]` at `index` `[B, M]`, zeros where `absent`."""
    shape = (len(index), *[1] * (slots.ndim - 3), index.shape[1], 1)
    places = index.clamp(min=0).to(slots.device).view(shape)
    taken = slots.gather(-2, places.expand(*slots.shape[:-2], index.shape[1], slots.shape[-1]))
    return taken.masked_fill_(absent.to(slots.device).view(shape), 0)


def _check_slots(memory) -> None:
    width = sum(memory.slot_counts)
    if any(slots.shape[-2] != width for layer in memory.layers for slots in layer):
        raise ValueError(
            f"a memory of scheme {memory.origin.scheme!r} does not keep its slots segment by segment, so it cannot be "
            "cut or joined; compress the context again"
        )


def _check_joinable(memories: Sequence, verb: str) -> list[Any]:
    """The memories as a list, if they come from one model and are stored alike."""
    memories = list(memories)
    if not memories:
        raise ValueError(f"{verb}() needs at least one memory, and got none")
    first = memories[0]
    for number, memory in enumerate(memories):
        if type(memory).__name__ != "RCCMemory":  # by name: remote code has a class of its own
            raise TypeError(f"{verb}() takes RCCMemory objects, and number {number} is a {type(memory).__name__}")
        _check_slots(memory)
        if asdict(memory.origin) != asdict(first.origin):
            raise ValueError(
                f"memory 0 was written by another model than memory {number}: {first.origin} and {memory.origin}. "
                "Only memories of one model (base and compressor) go together; compress the context again with it."
            )
        if memory.dtype != first.dtype:
            raise ValueError(
                f"memory 0 is in {first.dtype} and memory {number} in {memory.dtype}; convert one with "
                ".to(dtype=...), .to_int8() or .to_float()"
            )
        places = [[t.device for layer in m.layers for t in layer] + [m.local_ids.device] for m in (first, memory)]
        if places[0] != places[1]:
            raise ValueError(
                f"memory 0 is on {first.device} and memory {number} on {memory.device}; move one with .to(device)"
            )
    return memories
