# SPDX-License-Identifier: Apache-2.0
"""KV caches whose first entries are memory.

Two lengths matter. The *logical* length is the number of `generate`'s own input tokens that the cache stands for
(compressed or raw); `generate` slices by it. The *physical* length is the number of entries a query can attend to;
masks are built from it. `Cache.get_seq_length` is the first, `Cache.get_query_offset` the second.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .compressed_ops_rcc import without_raw
from .compressed_rcc import RCCMemory
from .positions_rcc import check_positions, local_positions, moved_up
from .rolling_rcc import Rolling
from .segments_rcc import HeadLength, join_masks


class ReadOnlyLayer(DynamicLayer):
    """Shows memory and new tokens side by side but stores nothing, so that a checkpointed layer can be replayed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return key_states, value_states
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


class RecordingLayer(ReadOnlyLayer):
    """A read-only layer that takes down the new keys and values of the last pass; replaying it changes nothing."""

    recorded: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.recorded = (key_states, value_states)
        return super().update(key_states, value_states)

    def show(self, entries: tuple[Tensor, Tensor]) -> None:
        """Let passes see these keys and values `[B, H, T, D]` in front of theirs."""
        self.lazy_initialization(*entries)
        self.keys, self.values = entries


class RCCCache(Cache):
    """`[head | memory slots | local tokens]` for every layer.

    It is made from a memory (or none) and filled at its first use, when the model knows how much of the prompt has to
    be compressed too. A rolling one is filled anew whenever its local tokens outgrow the window.

    Attributes:
        memory: the slots that the cache is filled from; None for no slots.
        head, head_mask: raw tokens in front of the slots, `[B, H]` or embeddings `[B, H, D]`; None if not known yet.
        local, local_mask: raw tokens behind them: before the first use those of the memory, which are decoded together
            with the first ones given; later on, of a rolling cache, all.
        compress_prompt: whether a prompt longer than the window is compressed at the first use.
        rolling: how local tokens that outgrow the window are compressed later on; None if they stay raw.
        ratio: tokens per slot for that compression; None for the configuration's.
        head_length: tokens at the start of such a prompt that stay raw in front of the slots.
        window: raw tokens that stay behind them; None for the configuration's.
        mask: `[B, physical]`, 0 at padding; None if every entry is real.
        started: whether the cache has been filled.
        former_length: tokens of `generate`'s input that came before the first use.
        num_head: raw tokens in front of the slots, padding included; 0 until started.
        num_slots: slots behind them, padding included; 0 until started.
        has_slots: whether there are any.
        rows_with_slots: which rows have some, `[B, 1, 1]`; None if all have, or none has.
        position_shift: by how much local positions are below the entries in front of them, `[B, 1]` or one number.
    """

    def __init__(
        self,
        num_layers: int,
        memory: RCCMemory | None = None,
        *,
        compress_prompt: bool = False,
        rolling: Rolling | None = None,
        former_length: int = 0,
        ratio: int | None = None,
        head_length: HeadLength = 0,
        window: int | None = None,
        read_only: bool = False,
    ):
        self.read_only = read_only
        super().__init__(layers=[self._new_layer() for _ in range(num_layers)])
        self.memory = None if memory is None else without_raw(memory)
        self.head = None if memory is None else memory.head_ids
        self.head_mask = None if memory is None else memory.head_mask
        self.local = None if memory is None else memory.local_ids
        self.local_mask = None if memory is None else memory.local_mask
        self.compress_prompt = compress_prompt
        self.rolling = rolling
        self.former_length = former_length
        self.ratio = ratio
        self.head_length = head_length
        self.window = window
        self.mask: Tensor | None = None
        self.started = False
        self.num_head = self.num_slots = 0
        self.has_slots = False
        self.rows_with_slots: Tensor | None = None
        self.position_shift: Tensor | int = 0
        self._moved_up = 0  # how far local positions are above the number of entries, at most
        self._offset = 0  # logical minus physical length
        self._protected = 0  # entries that belong to the memory

    def _new_layer(self) -> CacheLayerMixin:
        return ReadOnlyLayer() if self.read_only else DynamicLayer()

    @staticmethod
    def _put_entries(layer, keys: Tensor, values: Tensor) -> None:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values

    def start(
        self,
        entries: list[tuple[Tensor, Tensor]],
        mask: Tensor | None,
        shift: Tensor | int,
        *,
        num_head: int = 0,
        local_length: int,
        input_length: int,
    ) -> None:
        """Put head and slots in front.

        Args:
            entries: key and value `[B, H, M, D]` of every layer, or an empty list.
            mask: `[B, M]`, or None if all of them are real.
            shift: by how much local positions move down (`slot_positions`).
            num_head: how many entries are the head's.
            local_length: tokens that the first forward call decodes: raw ones of the memory, and of the prompt what
                was not compressed.
            input_length: tokens of the prompt, by which `generate` counts.
        """
        for layer, (keys, values) in zip(self.layers, entries, strict=bool(entries)):
            self._put_entries(layer, keys, values)
        self.mask, self.position_shift, self.started = mask, shift, True
        self._moved_up = moved_up(shift)
        self.local = self.local_mask = None
        if self.rolling is None:
            self.memory = self.head = self.head_mask = None
        in_front = self.physical_length
        self.num_head, self.num_slots = num_head, in_front - num_head
        self.has_slots = self.num_slots > 0
        rows = None if mask is None or not self.has_slots else mask[:, num_head:].any(1)[:, None, None]
        self.rows_with_slots = None if rows is None or bool(rows.all()) else rows
        self._offset = self.former_length + input_length - local_length - in_front
        self._protected = in_front + max(0, local_length - input_length - self.former_length)

    def roll(self) -> None:
        """Give up keys and values; at the next use the cache is filled anew from slots and raw tokens."""
        if self.mask is not None:
            self.local_mask = self.mask[:, self.num_head + self.num_slots :]
        self.former_length = self.get_seq_length()
        self.layers = [self._new_layer() for _ in self.layers]
        self.mask, self.started, self.has_slots, self.num_head, self.num_slots = None, False, False, 0, 0
        self.rows_with_slots = None

    @property
    def num_local(self) -> int:
        """Raw tokens behind the slots that a rolling cache has taken down."""
        return 0 if self.local is None else self.local.shape[1]

    @property
    def physical_length(self) -> int:
        """Entries of the cache: head, slots and local tokens."""
        return self.layers[0].get_seq_length()

    def extend_mask(self, new: Tensor | None, batch_size: int, query_length: int, device) -> Tensor | None:
        """The mask `[B, physical + query_length]` for the next tokens, whose own mask is `new` `[B, query_length]`."""
        return join_masks(self.mask, self.physical_length, new, query_length, batch_size, device)

    def next_positions(self, mask: Tensor | None, query_length: int, device) -> Tensor:
        """Positions `[B or 1, query_length]` of the next tokens, from the mask that `extend_mask` gave."""
        return local_positions(mask, self.physical_length, query_length, self.position_shift, device)

    def check_room(self, config, position_ids: Tensor) -> None:
        """Refuse next tokens at `position_ids` `[B, query_length]` that the base has no positions for."""
        if self.has_slots:
            check_positions(config, self.physical_length + position_ids.shape[1] + self._moved_up, position_ids)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length: tokens of `generate`'s input that are in the cache."""
        return max(0, self.physical_length + self._offset)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The physical length, from which masks are built."""
        return self.physical_length

    def reset(self) -> None:
        """Forget the local tokens, keep the memory."""
        self.crop(self._protected - self.physical_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` raw tokens.

        Raises:
            ValueError: if that would cut into the memory, which cannot be undone.
        """
        if tokens_to_remove > 0:  # an absolute length, as older versions pass it
            tokens_to_remove -= self.get_seq_length()
        if -tokens_to_remove > self.physical_length - self._protected:
            raise ValueError(
                f"cannot remove {-tokens_to_remove} tokens: {self.physical_length - self._protected} are raw, "
                "the rest is compressed memory. Crop fewer tokens, or start again from the memory."
            )
        if tokens_to_remove < 0:
            super().crop(tokens_to_remove)
            self.local = None if self.local is None else self.local[:, :tokens_to_remove]
            self._crop_mask(tokens_to_remove)

    def _crop_mask(self, tokens_to_remove: int) -> None:
        self.mask = None if self.mask is None else self.mask[:, :tokens_to_remove]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def _map_rows(self, function) -> None:
        for name in ("mask", "rows_with_slots", "head", "head_mask", "local", "local_mask"):
            rows = getattr(self, name)
            setattr(self, name, None if rows is None else function(rows))
        if self.memory is not None:
            self.memory = self.memory.map_tensors(function)
        if isinstance(self.position_shift, Tensor):
            self.position_shift = function(self.position_shift)
        if isinstance(self.head_length, Tensor) and len(self.head_length) > 1:
            self.head_length = function(self.head_length)
