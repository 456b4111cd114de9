# SPDX-License-Identifier: Apache-2.0
"""The segment grid: where the segments and the local tokens of each row of a batch are.

The grid of a row starts at its first real token (behind the head, if one stays raw), so that padding never enters a
segment and a row of a ragged batch is cut as it would be alone. Inputs are ids `[B, T]` or embeddings `[B, T, D]`;
masks are `[B, T]`, 0 at padding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HeadLength = int | Sequence[int] | Tensor
"""Tokens at the start of a row that stay raw in front of the slots: one number, or one for each row."""


def join(first: Tensor, first_mask: Tensor | None, second: Tensor, second_mask: Tensor | None):
    """Both inputs one after the other, with their common mask (None if neither has one)."""
    joined = torch.cat([first.to(second.device), second], 1)
    return joined, join_masks(first_mask, first.shape[1], second_mask, second.shape[1], len(second), second.device)


def join_masks(
    first: Tensor | None, first_width: int, second: Tensor | None, second_width: int, batch_size: int, device
):
    """Both masks one after the other, `[B, first_width + second_width]`; None stands for no padding, twice for None."""
    if first is None and second is None:
        return None
    parts = [
        torch.ones(batch_size, width, dtype=torch.long, device=device) if mask is None else mask.to(device).long()
        for mask, width in ((first, first_width), (second, second_width))
    ]
    return torch.cat(parts, 1)


def pack_left(inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move every row's padding in front of its real tokens, whose order stays."""
    if mask is None or bool(mask.all()):
        return inputs, None
    order = mask.bool().long().argsort(dim=1, stable=True)
    index = order if inputs.ndim == 2 else order[..., None].expand_as(inputs)
    return inputs.gather(1, index), mask.gather(1, order)


def row_lengths(inputs: Tensor, mask: Tensor | None) -> list[int]:
    """Real tokens of each row."""
    return [inputs.shape[1]] * len(inputs) if mask is None else mask.bool().sum(1).tolist()


def last_tokens(inputs: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """The last `sizes` tokens of each row, padded in front, and their mask (None if rows are equally long)."""
    longest = max(sizes)
    kept = inputs[:, inputs.shape[1] - longest :]
    if len(set(sizes)) == 1:
        return kept, None
    column = torch.tensor(sizes, device=inputs.device)[:, None]
    return kept, (torch.arange(longest, device=inputs.device) >= longest - column).long()


def expand_head_length(length: HeadLength, batch_size: int) -> Tensor:
    """One number `[B]` for each row.

    Raises:
        ValueError: if a length is negative, or there is not one for each row.
    """
    lengths = torch.as_tensor(length).reshape(-1)
    if len(lengths) not in (1, batch_size) or lengths.is_floating_point() or bool((lengths < 0).any()):
        raise ValueError(
            f"head_length={length!r} is not a number of tokens from 0 up, or one such number for each of the "
            f"{batch_size} rows"
        )
    return lengths.expand(batch_size)


def split_head(inputs: Tensor, mask: Tensor | None, length: HeadLength):
    """The first `length` real tokens of each row, and what is behind them.

    Returns:
        Head, its mask, rest, its mask; both with their padding in front, and a mask of None for no padding.

    Raises:
        ValueError: if a length is negative, or there is not one for each row.
    """
    if isinstance(length, int) and length == 0:
        return inputs[:, :0], None, *pack_left(inputs, mask)
    lengths = expand_head_length(length, len(inputs)).to(inputs.device)[:, None]
    real = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device) if mask is None else mask.bool().long()
    is_head = (real.cumsum(1) <= lengths).long() * real
    return *_only(inputs, is_head), *_only(inputs, real - is_head)


def fill_head(head: Tensor, head_mask: Tensor | None, inputs: Tensor, mask: Tensor | None, length: HeadLength):
    """Move tokens from the inputs to a head that has less than `length` of them; returns what `split_head` does."""
    sizes = torch.tensor(row_lengths(head, head_mask))
    missing = (expand_head_length(length, len(inputs)).cpu() - sizes).clamp(min=0)
    if not bool(missing.any()):
        return head, head_mask, *pack_left(inputs, mask)
    more, more_mask, inputs, mask = split_head(inputs, mask, missing)
    head, head_mask = pack_left(*join(head, head_mask, more, more_mask))
    return *last_tokens(head, row_lengths(head, head_mask)), inputs, mask


def _only(inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """The tokens where `mask` is 1, with as little padding as rows of one width need, in front."""
    packed, packed_mask = pack_left(inputs, mask)
    if packed_mask is None:
        return packed, None
    width = int(packed_mask.sum(1).max())
    packed, packed_mask = packed[:, packed.shape[1] - width :], packed_mask[:, packed_mask.shape[1] - width :]
    return packed, None if bool(packed_mask.all()) else packed_mask


@dataclass(frozen=True)
class Grid:
    """Segments of packed rows (padding in front).

    Attributes:
        segment_length: `W`, tokens per segment.
        lengths: real tokens of each row.
        counts: segments of each row, counted from its first real token; what is behind them stays local.
        width: padded length of the rows.
    """

    segment_length: int
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, inputs: Tensor, mask: Tensor | None, segment_length: int, window: int | None = None) -> "Grid":
        """Cut packed inputs into whole segments.

        Args:
            window: leave rows of at most so many tokens alone, and of longer ones at least 1 token and (where whole
                segments allow) at most `window` tokens local; None compresses every whole segment.
        """
        width = inputs.shape[1]
        lengths = tuple(row_lengths(inputs, mask))
        counts = tuple(count_segments(length, segment_length, window) for length in lengths)
        return cls(segment_length, lengths, counts, width)

    @property
    def num_segments(self) -> int:
        """Segments of all rows."""
        return sum(self.counts)

    @property
    def is_ragged(self) -> bool:
        """Whether rows have different numbers of segments."""
        return len(set(self.counts)) > 1

    def cells(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For every segment its row and its block `[N]`, where rows with fewer segments fill the last blocks."""
        most = max(self.counts, default=0)
        pairs = [(row, most - n + i) for row, n in enumerate(self.counts) for i in range(n)]
        rows, blocks = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
        return rows, blocks

    def segment_batches(self, inputs: Tensor, max_tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """All segments (row by row) in batches `[n, W]` or `[n, W, D]` of at most `max_tokens` tokens (at least one
        segment), each with its place among the segments of the batch."""
        take = self._taker(inputs)
        step = max(1, max_tokens // self.segment_length)
        for first in range(0, self.num_segments, step):
            place = slice(first, min(first + step, self.num_segments))
            yield place, take(place)

    def _taker(self, inputs: Tensor) -> Callable[[slice], Tensor]:
        """What takes segments; nothing goes to the device any more when it is called."""
        if not self.is_ragged and set(self.lengths) == {self.width}:  # without indices, which would go to the device
            whole = inputs[:, : self.counts[0] * self.segment_length]
            return whole.unflatten(1, (self.counts[0], self.segment_length)).flatten(0, 1).__getitem__
        starts = [
            (row, self.width - length + i * self.segment_length)
            for row, (length, n) in enumerate(zip(self.lengths, self.counts, strict=True))
            for i in range(n)
        ]
        rows, columns = torch.tensor(starts, dtype=torch.long, device=inputs.device).reshape(-1, 2).unbind(1)
        steps = torch.arange(self.segment_length, device=inputs.device)
        return lambda place: inputs[rows[place, None], columns[place, None] + steps]

    def take_local(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens behind each row's segments, padding in front, and their mask (None if rows are equally long)."""
        sizes = [n - c * self.segment_length for n, c in zip(self.lengths, self.counts, strict=True)]
        return last_tokens(inputs, sizes)

    def block_mask(self, slots_per_segment: int, device: torch.device) -> Tensor | None:
        """Mask of the slots `[B, M]`, M being those of the row with most segments; None if rows have as many."""
        if not self.is_ragged:
            return None
        counts = torch.tensor(self.counts, device=device)[:, None]
        most = max(self.counts)
        return (torch.arange(most, device=device) >= most - counts).long().repeat_interleave(slots_per_segment, 1)


def count_segments(length: int, segment_length: int, window: int | None) -> int:
    """How many leading segments of a row of `length` tokens are compressed; see `Grid.of`."""
    if window is None:
        return length // segment_length
    if length <= window:
        return 0
    needed = -(-(length - window) // segment_length)
    return min(needed, (length - 1) // segment_length)
