# SPDX-License-Identifier: Apache-2.0
"""A forward call over more than a window: outputs for all tokens, window by window.

What a token sees is what `generate` shows it. A token with `n` tokens up to and including itself sees the first
`count_segments(n)` segments as slots and the rest raw, at `config.stride` of one segment. A larger stride moves the
window on by more, which is cheaper; then tokens see some segments compressed that could still be raw.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_rcc import RCCCache
from .compressed_ops_rcc import map_slots, without_raw
from .compressed_rcc import RCCMemory
from .compressing_rcc import append_segments
from .decoding_rcc import decode_with_cache
from .joint_rcc import decode_jointly, write_segments
from .packed_rcc import find_documents, join_documents, split_documents
from .segments_rcc import Grid, join

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments by which flash attention is told where packed sequences begin."""


@dataclass(frozen=True)
class Step:
    """One decoder pass: the first `num_segments` segments are slots, tokens `start` to `stop - 1` are raw, and the
    outputs of the last `num_new` tokens are kept."""

    num_segments: int
    start: int
    stop: int
    num_new: int


def steps(length: int, head_length: int, config) -> Iterator[Step]:
    """The passes over `length` tokens of which the first `head_length` always stay raw."""
    done, num_segments = 0, 0
    stride = config.stride or config.segment_length
    while done < length:
        start = head_length + num_segments * config.segment_length
        stop = min(start + config.window, length)
        yield Step(num_segments, start if num_segments else 0, stop, stop - done)
        done, num_segments = stop, num_segments + stride // config.segment_length


def decode_windows(
    model,
    inputs: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    memory: RCCMemory | None,
    ratio: int | None,
    use_cache: bool,
    **kwargs,
) -> BaseModelOutputWithPast:
    """Decode ids `[B, T]` or embeddings `[B, T, D]`, all of them, behind `memory` if there is one.

    With gradients enabled, segments are compressed with the graph kept. Packed sequences are taken apart first.

    Raises:
        ValueError: if something is asked for that does not exist window by window.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"output_attentions: {inputs.shape[1]} tokens are more than the window of {model.config.window}, and each "
            "window has attentions of another width. Give at most a window, or compress=False"
        )
    documents = find_documents(position_ids, mask)
    packing = [name for name in PACKING if kwargs.pop(name, None) is not None]
    if packing and position_ids is None:
        raise ValueError(f"packed sequences ({', '.join(packing)}) need position_ids that begin anew with each of them")
    if documents is None:
        return _decode_rows(model, inputs, mask, memory, ratio, use_cache, **kwargs)
    rows, row_mask = split_documents(inputs, documents)
    outputs = _decode_rows(model, rows, row_mask, None, ratio, False, **kwargs)
    last: Any = outputs.last_hidden_state  # the library's annotation allows None
    hidden = outputs.hidden_states
    return BaseModelOutputWithPast(
        last_hidden_state=join_documents(last, documents, len(inputs)),
        hidden_states=None if hidden is None else tuple(join_documents(h, documents, len(inputs)) for h in hidden),
    )


def _decode_rows(model, inputs, mask, memory, ratio, use_cache, **kwargs) -> BaseModelOutputWithPast:
    """See `decode_windows`; a row is one document, padded on either side."""
    given, given_mask, length = inputs, mask, inputs.shape[1]
    if memory is not None and memory.num_local:
        local = memory.local_ids if inputs.ndim == 2 else model.get_input_embeddings()(memory.local_ids)
        inputs, mask = join(local, memory.local_mask, inputs, mask)
    front, order = _pack_front(inputs, mask)
    decode = _decode_with_graph if torch.is_grad_enabled() else _decode_from_memory
    head_length = model.config.head_length if memory is None else 0
    passes = list(steps(front.shape[1], head_length, model.config))
    outputs, cache = decode(model, front, passes, memory, model.config.check_ratio(ratio), use_cache, **kwargs)
    if use_cache and (cache is None or order is not None):  # the last pass is no prefill of ragged rows
        cache = RCCCache(
            len(model.language_model.layers),
            memory,
            compress_prompt=True,
            ratio=ratio,
            head_length=head_length,
        )
        decode_with_cache(model, cache, given, given_mask)

    def gather(parts: list[Tensor]) -> Tensor:
        new = [part[:, -step.num_new :] for part, step in zip(parts, passes, strict=True)]
        return _unpack(torch.cat(new, 1), order, inputs.shape[1])[:, -length:]

    hidden = [output.hidden_states for output in outputs]
    return BaseModelOutputWithPast(
        last_hidden_state=gather([output.last_hidden_state for output in outputs]),
        past_key_values=cache,
        hidden_states=None if hidden[0] is None else tuple(gather(list(layer)) for layer in zip(*hidden, strict=True)),
    )


def _decode_from_memory(model, front, passes, memory, ratio, use_cache, **kwargs):
    """The outputs of all passes, of which each sees the beginning of one memory; and the cache of the last one."""
    head_length = 0 if memory is not None else model.config.head_length
    given = 0 if memory is None else memory.num_local
    old = None if memory is None else without_raw(memory)
    grid = _grid(model, front, passes, head_length)
    whole = append_segments(model, old, front[:, head_length:], grid, ratio) if grid.num_segments else old
    outputs, cache = [], None
    for step in passes:
        cache = RCCCache(
            len(model.language_model.layers),
            _beginning(whole, (0 if old is None else len(old.slot_counts)) + step.num_segments),
            read_only=not (use_cache and step is passes[-1]),
            former_length=step.start - given,
        )
        if memory is not None:
            cache.head, cache.head_mask = memory.head_ids, memory.head_mask
        elif step.num_segments:
            cache.head = front[:, :head_length]
        outputs.append(decode_with_cache(model, cache, front[:, step.start : step.stop], None, **kwargs))
    return outputs, cache


def _decode_with_graph(model, front, passes, memory, ratio, use_cache, **kwargs):
    """The outputs of all passes from states that gradients flow into."""
    if memory is not None:
        raise ValueError(
            f"behind a memory, more than the window of {model.config.window} tokens cannot be decoded with gradients "
            "(the memory has no graph): call under torch.no_grad(), or leave compress=True out to keep them raw"
        )
    embed, head_length = model.get_input_embeddings(), model.config.head_length
    grid = _grid(model, front, passes, head_length)
    state = write_segments(model, front[:, head_length:], grid, ratio) if grid.num_segments else ()
    embeds = embed(front) if front.ndim == 2 else front
    head, outputs = embeds[:, :head_length], []
    for step in passes:
        local = embeds[:, step.start : step.stop]
        if step.num_segments == 0:
            outputs.append(model.language_model(inputs_embeds=local, use_cache=False, **kwargs))
            continue
        num_slots = step.num_segments * (grid.segment_length // ratio)
        seen = tuple(layer[:, :num_slots] for layer in state)
        outputs.append(decode_jointly(model, seen, None, ratio, head, None, local, None, **kwargs))
    return outputs, None


def _grid(model, front: Tensor, passes: list[Step], head_length: int) -> Grid:
    """The segments that are slots in the last pass. Rows that end before get some too, unseen by their tokens."""
    width, counts = front.shape[1] - head_length, (passes[-1].num_segments,) * len(front)
    return Grid(model.config.segment_length, (width,) * len(front), counts, width)


def _beginning(memory: RCCMemory | None, num_segments: int) -> RCCMemory | None:
    """The slots of the first segments of a memory."""
    if memory is None or num_segments == 0:
        return None
    counts = memory.slot_counts[:num_segments]
    seen = map_slots(lambda slots: slots[..., : sum(counts), :], memory)
    mask = None if memory.mask is None else memory.mask[:, : sum(counts)]
    return replace(seen, mask=mask, slot_counts=counts)


def _pack_front(inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Every row's real tokens from column 0 on, and the column that each came from (None: all as it was).

    Then rows are cut alike, and no mask is needed: what is behind a row's last token is seen by no token of it.
    """
    if mask is None or bool(mask.all()):
        return inputs, None
    order = (~mask.bool()).long().argsort(dim=1, stable=True)[:, : int(mask.bool().sum(1).max())]
    return inputs.gather(1, order if inputs.ndim == 2 else order[..., None].expand(-1, -1, inputs.shape[2])), order


def _unpack(outputs: Tensor, order: Tensor | None, length: int) -> Tensor:
    """Outputs `[B, T, D]` in the columns of the inputs; zeros, or what padding gave, elsewhere."""
    if order is None:
        return outputs
    empty = outputs.new_zeros(len(outputs), length, outputs.shape[2])
    return empty.scatter(1, order[..., None].expand_as(outputs), outputs)
