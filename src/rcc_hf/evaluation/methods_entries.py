# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a base model as what is kept of a context, and decoding behind them through a plain cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rcc_hf.evaluation.methods_base import ContextMethod, Reading, entry_nbytes
from rcc_hf.evaluation.methods_decoding import Step, pad_back

__all__ = ["Entries", "EntriesMethod", "prefill"]

_CHUNK = 2048


@dataclass(frozen=True)
class Entries:
    """What is kept of one context.

    Attributes:
        layers: keys and values of every layer, `[1, H, E, D]`; none where nothing is kept.
        next_position: of the token that comes behind them.
        last_id: the id `[1]` of the token that the last entry is of; `[0]` if that entry is of several, or none.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    next_position: int
    last_id: Tensor

    @property
    def num_entries(self) -> int:
        """Entries in each layer."""
        return self.layers[0][0].shape[-2] if self.layers else 0

    def without_last(self) -> "Entries":
        """All but the last entry."""
        none = self.last_id[:0]
        layers = tuple((keys[..., :-1, :], values[..., :-1, :]) for keys, values in self.layers)
        return replace(self, layers=layers, next_position=self.next_position - 1, last_id=none)


@torch.no_grad()
def prefill(model: PreTrainedModel, contexts: Sequence[Tensor]) -> list[Entries]:
    """The base's own keys and values of contexts `[T_i]`, read as one batch, some thousand columns at a time.

    Rows are padded behind, where no real token sees it. Rows of one batch share memory.
    """
    ids, cache = pad_back(contexts, model.device), DynamicCache()
    for start in range(0, ids.shape[1], _CHUNK):
        chunk = ids[:, start : start + _CHUNK]
        positions = torch.arange(start, start + chunk.shape[1], device=ids.device)[None].expand_as(chunk)
        model(input_ids=chunk, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    filled: Sequence[Any] = cache.layers if ids.shape[1] else ()
    layers = [(layer.keys, layer.values) for layer in filled]
    return [
        Entries(
            layers=tuple((k[i : i + 1, :, : len(row)], v[i : i + 1, :, : len(row)]) for k, v in layers),
            next_position=len(row),
            last_id=row[-1:],
        )
        for i, row in enumerate(contexts)
    ]


class _Decoder:
    """A step behind entries of several rows, whose padding is in front."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Entries]):
        self._model = model
        sizes = [row.num_entries for row in rows]
        width = max(sizes)
        self._next = torch.tensor([[row.next_position] for row in rows], device=model.device)
        self._mask: Tensor | None = None
        if len(set(sizes)) > 1:
            column = torch.tensor(sizes, device=model.device)[:, None]
            self._mask = (torch.arange(width, device=model.device) >= width - column).long()
        self._cache = Cache(layer_class_to_replicate=DynamicLayer)
        if width:
            # rows without entries have no tensors at all
            like = next(row for row in rows if row.layers)
            parts = [row.layers or tuple((k[..., :0, :], v[..., :0, :]) for k, v in like.layers) for row in rows]
            self._cache = Cache(layers=[_layer(layer, width) for layer in zip(*parts, strict=True)])

    def __call__(self, ids: Tensor, mask: Tensor | None, keep: int) -> Tensor:
        offset = self._cache.get_seq_length()
        if mask is None and self._mask is None:
            positions = self._next + torch.arange(ids.shape[1], device=ids.device)
            self._next = self._next + ids.shape[1]
        else:
            new = torch.ones_like(ids) if mask is None else mask
            old = new.new_ones(len(ids), offset) if self._mask is None else self._mask
            self._mask = torch.cat([old, new], 1)
            positions = self._next + (new.cumsum(1) - 1).clamp(min=0)
            self._next = self._next + new.sum(1, keepdim=True)
        outputs = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return outputs.logits


def _layer(rows: Sequence[tuple[Tensor, Tensor]], width: int) -> DynamicLayer:
    keys, values = (_stack(parts, width) for parts in zip(*rows, strict=True))
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _stack(rows: Sequence[Tensor], width: int) -> Tensor:
    # one row is used as it is: a cache makes new tensors when it grows, and never writes into these
    return rows[0] if len(rows) == 1 else torch.cat([F.pad(row, (0, 0, width - row.shape[-2], 0)) for row in rows])


class EntriesMethod(ContextMethod):
    """A method that keeps `Entries`; with an RCC model it is the plain base that reads and answers."""

    def _reading(self, kept: Sequence[Entries]) -> Reading:
        sizes = tuple(row.num_entries for row in kept)
        return Reading(tuple(size * entry_nbytes(self.model) for size in sizes), sizes, tuple(kept))

    def _start(self, rows: Sequence[Any]) -> Step:
        return _Decoder(self.model, rows)

    def _split(self, row: Entries) -> tuple[Entries, Tensor]:
        return (row.without_last(), row.last_id) if len(row.last_id) else (row, row.last_id)
