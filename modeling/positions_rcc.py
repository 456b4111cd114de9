# SPDX-License-Identifier: Apache-2.0
"""Where slots and local tokens stand: slots first, then the text, within the range that the base was trained for."""

import torch
from torch import Tensor


def slot_positions(config, mask: Tensor | None, shape: tuple[int, int], device) -> tuple[Tensor, Tensor | int]:
    """Positions of the slots `[B, M]`, and how far local positions move down because of them.

    Slots stand at 0, 1, ... over the real ones of each row. With `config.fit_positions`, rows with more slots than
    `config.slot_positions` have them evenly spread over so many positions, at fractions; local tokens keep a stride
    of 1 behind them and are moved down by the difference, `[B, 1]` (or one number for all rows).

    Args:
        mask: `[B, M]`, 0 where a row has no slot; None if all are real.
        shape: `(B, M)`.
    """
    batch_size, width = shape
    if mask is None:
        index = torch.arange(width, device=device).expand(batch_size, width)
        counts: Tensor | int = width
    else:
        index = (mask.long().cumsum(1) - 1).clamp(min=0)
        counts = mask.long().sum(1, keepdim=True)
    room = config.slot_positions if config.fit_positions else None
    if room is None:
        return index, 0
    if isinstance(counts, int):
        return (index, 0) if counts <= room else (index * (room / counts), counts - room)
    excess = (counts - room).clamp(min=0)
    return index * torch.where(excess > 0, room / counts.clamp(min=1), 1.0), excess


def local_positions(mask: Tensor | None, offset: int, length: int, shift: Tensor | int, device) -> Tensor:
    """Positions `[B, T]` (or `[1, T]`) of `length` tokens behind `offset` cache entries.

    Args:
        mask: `[B, offset + length]`, or None if all entries are real.
        shift: what `slot_positions` gave.
    """
    if mask is None:
        return torch.arange(offset, offset + length, device=device)[None] - shift
    return ((mask.long().cumsum(1) - 1)[:, -length:] - shift).clamp(min=0)


def check_positions(config, needed: int, position_ids: Tensor | None = None, ratio: int | None = None) -> None:
    """Refuse more positions than the base was trained for.

    Args:
        needed: an upper bound that counts padding.
        position_ids: the exact ones, looked at if the bound is too high.
        ratio: that of the call, for the message.

    Raises:
        ValueError: naming the longest context that fits.
    """
    limit = config.max_positions
    if limit is None or needed <= limit:
        return
    if position_ids is not None:
        needed = int(position_ids.max()) + 1
        if needed <= limit:
            return
    ratio = config.check_ratio(ratio)
    remedy = "Use a higher ratio, a smaller window or fewer new tokens"
    if not config.fit_positions:
        remedy += ", or set config.fit_positions=True, which spreads the slots over fewer positions"
    raise ValueError(
        f"slots, local tokens and new tokens need {needed} positions, but the base was trained for {limit}. At ratio "
        f"{ratio} the longest context beside a window of {config.window} tokens has "
        f"{(limit - config.window) * ratio} tokens. {remedy}."
    )
