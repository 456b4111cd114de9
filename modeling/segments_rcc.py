# SPDX-License-Identifier: Apache-2.0
"""The segment grid: where the segments and the local tokens of each row of a batch are.

The grid of a row starts at its first real token, so that padding never enters a segment and a row of a ragged batch is
cut as it would be alone. Inputs are ids `[B, T]` or embeddings `[B, T, D]`; masks are `[B, T]`, 0 at padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
        lengths = (width,) * len(inputs) if mask is None else tuple(mask.bool().sum(1).tolist())
        counts = tuple(count_segments(length, segment_length, window) for length in lengths)
        return cls(segment_length, lengths, counts, width)

    @property
    def num_segments(self) -> int:
        """Segments of all rows."""
        return sum(self.counts)

    @property
    def local_lengths(self) -> tuple[int, ...]:
        """Tokens of each row behind its segments."""
        return tuple(n - c * self.segment_length for n, c in zip(self.lengths, self.counts, strict=True))

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

    def take_segments(self, inputs: Tensor, first: int, last: int) -> Tensor:
        """Segments `first` to `last - 1` of the batch (row by row), `[n, W]` or `[n, W, D]`."""
        starts = [
            (row, self.width - length + i * self.segment_length)
            for row, (length, n) in enumerate(zip(self.lengths, self.counts, strict=True))
            for i in range(n)
        ][first:last]
        rows, columns = torch.tensor(starts, dtype=torch.long, device=inputs.device).unbind(1)
        steps = torch.arange(self.segment_length, device=inputs.device)
        return inputs[rows[:, None], columns[:, None] + steps]

    def take_local(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens behind each row's segments, padding in front, and their mask (None if rows are equally long)."""
        sizes, longest = self.local_lengths, max(self.local_lengths)
        local = inputs[:, self.width - longest :]
        if len(set(sizes)) == 1:
            return local, None
        sizes_column = torch.tensor(sizes, device=inputs.device)[:, None]
        return local, (torch.arange(longest, device=inputs.device) >= longest - sizes_column).long()

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
