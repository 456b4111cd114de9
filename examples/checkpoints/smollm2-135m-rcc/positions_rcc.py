# SPDX-License-Identifier: Apache-2.0
"""Where slots and local tokens stand: slots first, then the text, within the range that the base was trained for."""

from collections.abc import Sequence

import torch
from torch import Tensor


def slot_tokens(segment_length: int, slot_counts: Sequence[int], mask: Tensor | None) -> Sequence[int] | Tensor:
    """How many source tokens each slot stands for: M numbers, or with a mask `[B, M]`, 0 where a row has no slot.

    Args:
        slot_counts: slots of each segment, of the row that has most.
        mask: `[B, M]`; rows may have been compressed at different ratios.
    """
    if mask is None:
        return [segment_length // count for count in slot_counts for _ in range(count)]
    blocks = mask.long().split(list(slot_counts), 1)
    return torch.cat([block * (segment_length // block.sum(1, keepdim=True).clamp(min=1)) for block in blocks], 1)


def slots_reach(config, num_slots: int, num_tokens: int) -> int:
    """How many positions the slots of a row take that stand for so many tokens.

    One for each slot, or with `config.spread_slots` for each token; if these are more than `config.slot_positions`, so
    many (but no less than one for each slot, unless they are fitted).
    """
    room, wanted = config.slot_positions, num_tokens if config.spread_slots else num_slots
    if room is None:
        return wanted
    return min(wanted, room if config.fit_positions else max(room, num_slots))


def slot_positions(
    config, mask: Tensor | None, shape: tuple[int, int], device, tokens: Sequence[int] | Tensor = ()
) -> tuple[Tensor, Tensor | int]:
    """Positions of the slots `[B, M]`, and how far local positions move down because of them.

    Slots stand at 0, 1, ... over the real ones of each row. With `config.fit_positions`, rows with more slots than
    `config.slot_positions` have them evenly spread over so many positions, at fractions; local tokens keep a stride
    of 1 behind them and are moved down by the difference, `[B, 1]` (or one number for all rows).

    With `config.spread_slots`, a slot stands where the last of its tokens stood, and local tokens where they would
    stand behind the text itself: they move up. Where the text reaches beyond `config.slot_positions`, all of this
    shrinks evenly (see `slots_reach`).

    Args:
        mask: `[B, M]`, 0 where a row has no slot; None if all are real.
        shape: `(B, M)`.
        tokens: source tokens of each of the M slots, or of each row's (`slot_tokens`); for spread slots.
    """
    batch_size, width = shape
    if mask is None:
        each = list(tokens) if config.spread_slots else [1] * width
        total, reach = sum(each), slots_reach(config, width, sum(each))
        if len(set(each)) > 1:
            last = torch.tensor(each, device=device).cumsum(0) - 1
        else:  # without numbers that would go to the device, which would wait for them
            last = torch.arange(1, width + 1, device=device) * (total // max(1, width)) - 1
        last = last.expand(batch_size, width)
        return (last if reach == total else last * (reach / total)), width - reach
    real = mask.long()
    ends = (real * torch.as_tensor(tokens, device=device) if config.spread_slots else real).cumsum(1)
    last = (ends - 1).clamp(min=0)
    room = config.slot_positions
    if not config.spread_slots and (room is None or not config.fit_positions):
        return last, 0
    counts, totals = real.sum(1, keepdim=True), ends[:, -1:]
    reaches = totals
    if room is not None:
        reaches = totals.clamp(max=room) if config.fit_positions else totals.minimum(counts.clamp(min=room))
    return last * (reaches / totals.clamp(min=1)), counts - reaches


def moved_up(shift: Tensor | int) -> int:
    """By how much the positions of local tokens exceed the number of entries in front of them, at most."""
    return max(0, -int(shift.min()) if isinstance(shift, Tensor) else -shift)


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
    if config.spread_slots and config.slot_positions:
        raise ValueError(
            f"slots, local tokens and new tokens need {needed} positions, but the base was trained for {limit}, of "
            f"which spread slots take up to {config.slot_positions}. Use fewer new tokens, a smaller window or a "
            "smaller config.slot_positions; for more slots than these, config.fit_positions=True or a higher ratio"
        )
    ratio = config.check_ratio(ratio)
    remedy = "Use a higher ratio, a smaller window or fewer new tokens"
    if not config.fit_positions:
        remedy += ", or set config.fit_positions=True, which spreads the slots over fewer positions"
    raise ValueError(
        f"slots, local tokens and new tokens need {needed} positions, but the base was trained for {limit}. At ratio "
        f"{ratio} the longest context beside a window of {config.window} tokens has "
        f"{(limit - config.window) * ratio} tokens. {remedy}."
    )
