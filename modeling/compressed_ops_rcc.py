# SPDX-License-Identifier: Apache-2.0
"""Cutting memories by segments and rows, and putting them together.

A slot knows neither its position nor the other slots (positions are given when a memory is read), so all of this moves
slots and computes nothing. What comes out is laid out as `compress` does it: absent segments in front of a row's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


def local_sizes(memory) -> list[int]:
    """Local tokens of every row."""
    if memory.local_mask is None:
        return [memory.num_local] * memory.batch_size
    return memory.local_mask.bool().sum(1).tolist()


def slice_segments(memory, start: int, stop: int | None):
    """See `RCCMemory.slice`."""
    _check_slots(memory)
    rows, sizes, length = row_blocks(memory), local_sizes(memory), _segment_length(memory)
    for i, blocks in enumerate(rows):
        count = len(blocks)
        rows[i] = blocks[start:stop]
        # local tokens are what there is of segment number `count`
        if start > count or (stop is not None and stop <= count):
            sizes[i] = 0
    tokens = tuple(len(blocks) * length + size for blocks, size in zip(rows, sizes, strict=True))
    return _arrange(replace(memory, row_tokens=tokens), rows, sizes)


def concatenate(memories: Sequence):
    """See `RCCMemory.concatenate`."""
    memories = _check_joinable(memories, "concatenate")
    last = memories[-1]
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
    lengths = {_segment_length(memory) for memory in memories} - {0}
    if len(lengths) > 1:
        raise ValueError(f"the memories have segments of different lengths ({sorted(lengths)}); compress one again")
    rows: list[list[Block]] = [[] for _ in range(last.batch_size)]
    offset = 0
    for memory in memories:
        for row, blocks in zip(rows, row_blocks(memory), strict=True):
            row += [(first + offset, size) for first, size in blocks]
        offset += sum(memory.slot_counts)
    tokens = tuple(map(sum, zip(*(memory.row_tokens for memory in memories), strict=True)))
    joined = map_slots(lambda *parts: torch.cat(parts, -2), *memories)
    joined = replace(joined, local_ids=last.local_ids, local_mask=last.local_mask, row_tokens=tokens)
    return _arrange(joined, rows, local_sizes(last))


def stack(memories: Sequence):
    """See `RCCMemory.stack`."""
    memories = _check_joinable(memories, "stack")
    width = max(sum(memory.slot_counts) for memory in memories)
    longest = max(memory.num_local for memory in memories)
    rows: list[list[Block]] = []
    sizes: list[int] = []
    for memory in memories:
        sizes += local_sizes(memory)
        before = width - sum(memory.slot_counts)
        rows += [[(first + before, size) for first, size in blocks] for blocks in row_blocks(memory)]

    def join(*parts: Tensor) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, width - part.shape[-2], 0)) for part in parts])

    joined = replace(
        map_slots(join, *memories),
        local_ids=torch.cat([F.pad(m.local_ids, (longest - m.num_local, 0)) for m in memories]),
        row_tokens=tuple(tokens for memory in memories for tokens in memory.row_tokens),
    )
    return _arrange(joined, rows, sizes)


def unstack(memory) -> list:
    """See `RCCMemory.unstack`."""
    _check_slots(memory)
    rows, sizes = row_blocks(memory), local_sizes(memory)
    return [_arrange(memory.select(torch.tensor([i])), rows[i : i + 1], sizes[i : i + 1]) for i in range(len(rows))]


def _arrange(memory, rows: list[list[Block]], sizes: list[int]):
    """The memory whose rows have the given segments of its slots and the last `sizes` of its local tokens."""
    most = max(map(len, rows))
    padded = [[(0, 0)] * (most - len(blocks)) + blocks for blocks in rows]
    counts = tuple(max(size for _, size in column) for column in zip(*padded, strict=True))
    places = [_places(blocks, counts) for blocks in padded]
    index = torch.tensor(places, dtype=torch.long).reshape(len(rows), sum(counts))
    absent = index < 0
    mask = None if not absent.any() else (~absent).long().to(memory.local_ids.device)
    longest = max(sizes)
    local_mask = None
    if len(set(sizes)) > 1:
        local_mask = (torch.arange(longest) >= longest - torch.tensor(sizes)[:, None]).long()
        local_mask = local_mask.to(memory.local_ids.device)
    width = memory.layers[0][0].shape[-2]
    if index.shape[1] != width or not bool((absent | (index == torch.arange(width))).all()):
        memory = map_slots(lambda slots: _take(slots, index, absent), memory)
    return replace(
        memory,
        mask=mask,
        local_ids=memory.local_ids[:, memory.num_local - longest :],
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


def _segment_length(memory) -> int:
    """Source tokens of a segment; 0 if there is no segment.

    Raises:
        ValueError: if segments differ in length.
    """
    lengths = set()
    for blocks, tokens, size in zip(row_blocks(memory), memory.row_tokens, local_sizes(memory), strict=True):
        if blocks:
            lengths.add((tokens - size) / len(blocks))
    if len(lengths) > 1 or any(length % 1 for length in lengths):
        raise ValueError(
            "the segments of this memory differ in length (the model's segment_length was changed between appends), "
            "so it cannot be cut or joined; compress the context again"
        )
    return int(lengths.pop()) if lengths else 0


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
