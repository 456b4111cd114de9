# SPDX-License-Identifier: Apache-2.0
"""Slots in 8 bits: whole numbers from -127 to 127, and one floating scale for each slot and head."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_int8(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Floating slots `[..., M, D]` as int8 numbers of that shape and their float32 scales `[..., M, 1]`.

    Raises:
        ValueError: if a slot is not finite.
    """
    scale = slots.abs().amax(-1, keepdim=True).float() / 127
    if not bool(scale.isfinite().all()):
        raise ValueError(
            "a memory with infinite or undefined slots cannot be stored in int8; compress the context again"
        )
    numbers = (slots / scale.where(scale > 0, 1)).round().clamp(-127, 127)
    return numbers.to(torch.int8), scale


def from_int8(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_int8` stored, in a floating dtype."""
    return (numbers * scale).to(dtype)


class FloatLayers(Sequence):
    """The layers of an int8 memory, each made floating when it is asked for, so that one at a time takes the room."""

    def __init__(self, layers: Sequence, scales: Sequence, dtype: torch.dtype):
        self.layers, self.scales, self.dtype = layers, scales, dtype

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index):
        parts = zip(self.layers[index], self.scales[index], strict=True)
        return tuple(from_int8(numbers, scale, self.dtype) for numbers, scale in parts)
