# SPDX-License-Identifier: Apache-2.0
"""Mean pooling of the base's own keys and values: the simplest compressor in the space of entries."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rcc_hf.evaluation.methods_base import Reading, backbone
from rcc_hf.evaluation.methods_decoding import check_ids
from rcc_hf.evaluation.methods_entries import Entries, EntriesMethod, prefill
from rcc_hf.modeling.families_rcc import rotary_tables, rotate_keys

__all__ = ["MeanPool", "unrotate_keys"]


class MeanPool(EntriesMethod):
    """Entries of the full context, averaged over `ratio` in a row wherever `rcc` has slots; the rest stays raw.

    Keys are averaged as they are before rotation: what they hold does not depend on their place, so that a mean over
    places is one. All entries are then put at positions 0, 1, ... without gaps, as slots and raw tokens are, and the
    next token behind them. (Left where the last token of each pool stood, they predict a text's continuation worse.)
    """

    name = "mean-pool"

    @torch.no_grad()
    def read(self, contexts: Sequence[Tensor]) -> Reading:
        check_ids("contexts", contexts)
        return self._reading([self._pool(row) for row in prefill(self.model, contexts)])

    def _pool(self, row: Entries) -> Entries:
        start = min(row.num_entries, self.head_length)
        count = row.num_entries - start
        if self.fill_id is None:
            count -= count % self.segment_length
        if not count or self.ratio == 1:
            return row
        layers = tuple(self._pool_layer(i, *layer, start, start + count) for i, layer in enumerate(row.layers))
        is_raw = start + count < row.num_entries
        return Entries(layers, layers[0][0].shape[-2], row.last_id if is_raw else row.last_id[:0])

    def _pool_layer(self, index: int, keys: Tensor, values: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The entries of a layer with those from `start` to `stop - 1` pooled; those in front of them do not move."""
        decoder = backbone(self.model)
        positions = torch.arange(start, keys.shape[-2], device=keys.device)[None]
        plain = unrotate_keys(decoder, index, keys[..., start:, :], positions)
        moved = torch.cat([self._mean(plain[..., : stop - start, :]), plain[..., stop - start :, :]], -2).to(keys)
        moved = rotate_keys(decoder, index, moved, positions[:, : moved.shape[-2]])
        means = self._mean(values[..., start:stop, :])
        return (
            torch.cat([keys[..., :start, :], moved], -2),
            torch.cat([values[..., :start, :], means, values[..., stop:, :]], -2),
        )

    def _mean(self, entries: Tensor) -> Tensor:
        """Means of `ratio` entries in a row; of fewer at the end of a text."""
        whole = entries.shape[-2] - entries.shape[-2] % self.ratio
        means = entries[..., :whole, :].unflatten(-2, (-1, self.ratio)).mean(-2)
        rest = entries[..., whole:, :]
        return torch.cat([means, rest.mean(-2, keepdim=True)], -2) if rest.shape[-2] else means


def unrotate_keys(decoder: PreTrainedModel, index: int, keys: Tensor, position_ids: Tensor) -> Tensor:
    """Keys `[B, H, T, D]` of layer `index` at `position_ids` `[B, T]`, moved back to position 0.

    The inverse of `rotate_keys`, by the same tables. In half precision these are no exact rotations, so the result is
    in float32 then.
    """
    dtype = torch.promote_types(keys.dtype, torch.float32)
    cos, sin = (table.to(dtype) for table in rotary_tables(decoder, index, position_ids))
    constant = rotary_tables(decoder, index, torch.zeros_like(position_ids[:1, :1]))[0].to(dtype)
    square = cos**2 + sin**2
    apply = sys.modules[type(decoder).__module__].apply_rotary_pos_emb
    return apply(keys.to(dtype), keys.to(dtype), cos * constant / square, -sin * constant / square)[1]
