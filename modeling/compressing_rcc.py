# SPDX-License-Identifier: Apache-2.0
"""Turning tokens into memory: segments are encoded in batches, slots go into place, the rest stays local."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from .compressed_rcc import Origin, RCCMemory
from .fingerprint_rcc import fingerprint_base, fingerprint_compressor
from .segments_rcc import Grid, join_masks


def origin_of(model) -> Origin:
    """The mark that memories of this model carry."""
    return Origin(model.config.scheme, fingerprint_base(model), fingerprint_compressor(model))


def check_memory(model, memory: RCCMemory) -> None:
    """Refuse a memory that this model cannot decode from.

    Raises:
        TypeError: if it is no `RCCMemory`.
        ValueError: if another model wrote it, or it lies on another device or in another dtype.
    """
    if type(memory).__name__ != "RCCMemory":  # by name: remote code has a class of its own
        raise TypeError(f"memory must be an RCCMemory, as compress() returns it, not a {type(memory).__name__}")
    expected = origin_of(model)
    if asdict(memory.origin) != asdict(expected):  # values: remote code has a class of its own
        raise ValueError(
            f"this memory was written by another model: it carries {memory.origin}, this model is {expected}. "
            "Use the model (base and compressor) that wrote it, or compress the context again."
        )
    embedding = model.get_input_embeddings().weight
    if memory.dtype not in (slot_dtype(model), torch.int8):
        raise ValueError(
            f"the memory is in {memory.dtype} and the model in {slot_dtype(model)}; "
            "convert it with memory.to(dtype=model.dtype)"
        )
    if memory.local_ids.device != embedding.device and embedding.device.type != "meta":
        raise ValueError(
            f"the memory is on {memory.local_ids.device} and the model on {embedding.device}; "
            "move it with memory.to(model.device)"
        )


def check_inputs(model, inputs: Tensor, mask: Tensor | None) -> None:
    """Refuse inputs of the wrong kind.

    Raises:
        TypeError: if ids are no integers, or embeddings are.
        ValueError: if shapes do not fit, or the inputs lie on another device than the model.
    """
    if inputs.ndim == 2 and (inputs.is_floating_point() or inputs.dtype == torch.bool):
        raise TypeError(f"input_ids must be integers, not {inputs.dtype}; embeddings are given as inputs_embeds")
    if inputs.ndim not in (2, 3):
        raise ValueError(
            f"inputs have shape {tuple(inputs.shape)}; ids are [batch, tokens], embeddings have a width too"
        )
    if mask is not None and tuple(mask.shape) != tuple(inputs.shape[:2]):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; the inputs need {tuple(inputs.shape[:2])}")
    device = model.get_input_embeddings().weight.device
    if device.type != "meta" and inputs.device != device:
        raise ValueError(
            f"the inputs are on {inputs.device} and the model on {device}; move them with .to(model.device)"
        )


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
) -> RCCMemory:
    """A memory with the grid's segments behind those of `memory`; tokens that the grid leaves local are dropped.

    Args:
        inputs: packed ids `[B, T]` or embeddings `[B, T, D]`.
        on_progress: called with the number of source tokens of each encoded batch.
    """
    if memory is not None and memory.dtype == torch.int8:  # its old slots stay as they are
        new = append_segments(model, None, inputs, grid, ratio, on_progress)
        return memory.concatenate([memory, new.to_int8()])
    slots, blocks = model.config.segment_length // ratio, max(grid.counts)
    row_tokens = tuple(n * grid.segment_length for n in grid.counts)
    old_mask = old_width = None
    if memory is not None:
        old_width, old_mask = sum(memory.slot_counts), memory.mask
        row_tokens = tuple(a + b for a, b in zip(memory.row_tokens, row_tokens, strict=True))
    layers = _encode(model, memory, inputs, grid, ratio, on_progress)
    device = inputs.device
    mask = join_masks(old_mask, old_width or 0, grid.block_mask(slots, device), blocks * slots, len(inputs), device)
    return RCCMemory(
        layers=layers,
        mask=mask,
        local_ids=torch.zeros(len(inputs), 0, dtype=torch.long, device=device),
        local_mask=None,
        slot_counts=(() if memory is None else memory.slot_counts) + (slots,) * blocks,
        row_tokens=row_tokens,
        origin=origin_of(model) if memory is None else memory.origin,
    )


def with_local(memory: RCCMemory, local: Tensor, mask: Tensor | None, former: int | tuple[int, ...] = 0) -> RCCMemory:
    """The memory with `local` ids `[B, P]` raw behind its slots; `former` of them `row_tokens` counts already."""
    sizes = [local.shape[1]] * len(local) if mask is None else mask.bool().sum(1).tolist()
    former = (former,) * len(local) if isinstance(former, int) else former
    counted = tuple(n - f + s for n, f, s in zip(memory.row_tokens, former, sizes, strict=True))
    return replace(memory, local_ids=local, local_mask=mask, row_tokens=counted)


def without_local(memory: RCCMemory) -> RCCMemory:
    """The memory's slots alone."""
    sizes = [memory.num_local] * memory.batch_size
    if memory.local_mask is not None:
        sizes = memory.local_mask.bool().sum(1).tolist()
    return with_local(memory, memory.local_ids[:, :0], None, tuple(sizes))


def _encode(model, memory, inputs, grid, ratio, on_progress):
    """The kept tensors of every layer, old slots first; new ones are written straight to their place."""
    scheme, decoder, length = model.scheme, model.language_model, grid.segment_length
    slots, blocks = length // ratio, max(grid.counts)
    rows, columns = grid.cells(torch.device("cpu"))
    step = max(1, model.config.encode_batch_tokens // length)
    buffers = None
    for first in range(0, grid.num_segments, step):
        last = min(first + step, grid.num_segments)
        segments = grid.take_segments(inputs, first, last)
        state = scheme.write(decoder, scheme.empty(decoder, len(segments)), segments, ratio)
        kept = scheme.keep(decoder, state)
        if buffers is None:
            buffers = _buffers(kept, None if memory is None else memory.layers, len(inputs), blocks * slots)
        for layer, parts in zip(buffers, kept, strict=True):
            for buffer, part in zip(layer, parts, strict=True):
                new = buffer[..., buffer.shape[-2] - blocks * slots :, :].unflatten(-2, (blocks, slots)).movedim(-3, 1)
                new[rows[first:last].to(part.device), columns[first:last].to(part.device)] = part
        if on_progress is not None:
            on_progress((last - first) * length)
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


def slot_dtype(model) -> torch.dtype:
    """The dtype of the slots that the model writes and reads."""
    weight = model.get_input_embeddings().weight
    return weight.dtype if weight.dtype.is_floating_point else model.dtype
