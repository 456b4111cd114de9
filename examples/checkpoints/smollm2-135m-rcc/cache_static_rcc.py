# SPDX-License-Identifier: Apache-2.0
"""A KV cache of fixed length whose first entries are memory, for compiled decoding.

Keys, values and mask are allocated once and written in place; lengths and positions are read from tensors. So every
decoding step sees the same shapes and addresses, and one compiled graph serves all of them. While a step is traced,
values cannot be looked at: what needs that (`physical_length`, the checks) is for eager calls.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from .cache_rcc import RCCCache
from .compressed_rcc import RCCMemory
from .positions_rcc import check_positions
from .segments_rcc import HeadLength


class RCCStaticLayer(StaticLayer):
    """Room for `max_cache_len` entries, of which the first `cumulative_length` are in use."""

    is_croppable = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` entries: new ones are written over them."""
        self.cumulative_length.add_(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = write_over(self.keys, function), write_over(self.values, function)
            self.batch_size = len(self.keys)


class RCCStaticCache(RCCCache):
    """`[head | memory slots | local tokens | room]` for every layer, `max_length` entries in all.

    `generate(..., cache_implementation="static")` makes one that is long enough for that call, rounded up, so that
    others of about its length find the step compiled. To go on in it afterwards, give the first call a `max_cache_len`
    with room for what is to come.

    Attributes:
        max_length: entries that there is room for.
        mask: `[B, max_length]`, False at padding and where no entry is yet; None until the first call.
        position_shift: `[B, 1]` from the first call on.
    """

    def __init__(
        self,
        num_layers: int,
        max_length: int,
        memory: RCCMemory | None = None,
        *,
        compress_prompt: bool = False,
        ratio: int | None = None,
        head_length: HeadLength = 0,
        window: int | None = None,
    ):
        self.max_length = max_length
        super().__init__(
            num_layers, memory, compress_prompt=compress_prompt, ratio=ratio, head_length=head_length, window=window
        )
        self._allocated = False

    def _new_layer(self) -> RCCStaticLayer:
        return RCCStaticLayer(self.max_length)

    @staticmethod
    def _put_entries(layer, keys: Tensor, values: Tensor) -> None:
        layer.update(keys, values)

    def start(self, entries, mask, shift, *, local_length: int, **kwargs) -> None:
        self._check_length((entries[0][0].shape[-2] if entries else 0) + local_length)
        super().start(entries, mask, shift, local_length=local_length, **kwargs)

    @property
    def physical_length(self) -> int:
        """Entries in use: head, slots and local tokens."""
        return int(self.layers[0].cumulative_length)

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | int:
        """The physical length as a tensor, from which masks are built."""
        return self.layers[layer_idx].cumulative_length

    def extend_mask(self, new: Tensor | None, batch_size: int, query_length: int, device) -> Tensor:
        """The mask `[B, max_length]` with the next tokens in it, whose own mask is `new` `[B, query_length]`."""
        if not torch.compiler.is_compiling():
            self._check_length(self.physical_length + query_length)
        if not self._allocated:
            self._allocate(batch_size, device)
        if new is None:
            new = torch.ones(batch_size, query_length, device=device)
        return self.mask.index_copy_(1, self._places(query_length, device), new.to(device, torch.bool))

    def next_positions(self, mask: Tensor, query_length: int, device) -> Tensor:
        counted = (mask.cumsum(1) - 1).index_select(1, self._places(query_length, device))
        return (counted - self.position_shift).clamp(min=0)

    def check_room(self, config, position_ids: Tensor) -> None:
        if not torch.compiler.is_compiling():  # generate() has looked before the first step
            super().check_room(config, position_ids)

    def check_continuation(self, config, new_entries: int) -> None:
        """Refuse `new_entries` more entries, if there is no room or the base has no positions for them.

        Raises:
            ValueError: naming the length or the context that would fit.
        """
        if not self.started:
            return
        self._check_length(self.physical_length + new_entries)
        if self.has_slots:
            last = self.mask.sum(1, keepdim=True) - self.position_shift + new_entries - 1
            check_positions(config, self.physical_length + new_entries + self._moved_up, last)

    def _places(self, query_length: int, device) -> Tensor:
        """Where the next tokens go, `[query_length]`."""
        return torch.arange(query_length, device=device) + self.get_query_offset().to(device)

    def _allocate(self, batch_size: int, device) -> None:
        """Give mask and shift their final shapes."""
        old, length = self.mask, self.physical_length
        shift = torch.as_tensor(self.position_shift, device=device)
        self.mask = torch.zeros(batch_size, self.max_length, dtype=torch.bool, device=device)
        self.mask[:, :length] = True if old is None else old
        self.position_shift = shift.expand(batch_size, 1).contiguous()
        self._allocated = True
        for tensor in (self.mask, self.position_shift, self.rows_with_slots):
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)  # as the layers do for theirs: CUDA graphs then copy nothing

    def _check_length(self, needed: int) -> None:
        if needed > self.max_length:
            raise ValueError(
                f"this static cache has room for {self.max_length} entries (slots and raw tokens), but {needed} are "
                f"needed. Give the generate() call that makes the cache max_cache_len={needed} or more, or leave out "
                "cache_implementation='static'."
            )

    def _crop_mask(self, tokens_to_remove: int) -> None:
        if self.mask is not None:
            self.mask[:, self.physical_length :] = False

    def _map_rows(self, function) -> None:
        for name in ("mask", "position_shift", "rows_with_slots"):
            if self._allocated and getattr(self, name) is not None:
                setattr(self, name, write_over(getattr(self, name), function))


def write_over(old: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(old)`, at the address of `old` if it has the same shape."""
    new = function(old)
    return old.copy_(new) if new.shape == old.shape else new
