# SPDX-License-Identifier: Apache-2.0
"""Slots in 8 bits: whole numbers from -127 to 127, and a floating scale for every group of a slot's channels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STATE_GROUP = 64
"""Channels under one scale where slots are states of the whole width, in which a few channels are very large."""


def to_int8(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Floating slots `[..., M, D]` as int8 numbers of that shape and their float32 scales `[..., M, G]`.

    Slots with heads `[B, H, M, D]` have one scale per head; states `[B, M, D]` one per `STATE_GROUP` channels.

    Raises:
        ValueError: if a slot is not finite.
    """
    width = slots.shape[-1]
    size = width if slots.ndim > 3 else math.gcd(width, STATE_GROUP)
    groups = slots.unflatten(-1, (width // size, size))
    scale = groups.abs().amax(-1).float() / 127
    if not bool(scale.isfinite().all()):
        raise ValueError(
            "a memory with infinite or undefined slots cannot be stored in int8; compress the context again"
        )
    numbers = (groups / scale.where(scale > 0, 1)[..., None]).round().clamp(-127, 127)
    return numbers.to(torch.int8).flatten(-2), scale


def from_int8(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_int8` stored, in a floating dtype."""
    groups = numbers.unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale[..., None]).flatten(-2).to(dtype)


class FloatLayers(Sequence):
    """The layers of an int8 memory, each made floating when it is asked for, so that one at a time takes the room."""

    def __init__(self, layers: Sequence, scales: Sequence, dtype: torch.dtype):
        self.layers, self.scales, self.dtype = layers, scales, dtype

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index):
        parts = zip(self.layers[index], self.scales[index], strict=True)
        return tuple(from_int8(numbers, scale, self.dtype) for numbers, scale in parts)
