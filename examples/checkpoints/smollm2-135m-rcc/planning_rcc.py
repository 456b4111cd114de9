# SPDX-License-Identifier: Apache-2.0
"""What a call of `generate` will need: entries of each row once its prompt is decoded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .compressed_ops_rcc import head_sizes, local_sizes, row_blocks
from .compressed_rcc import RCCMemory
from .positions_rcc import check_positions, slots_reach
from .rolling_rcc import Rolling
from .segments_rcc import HeadLength, count_segments, row_lengths


@dataclass(frozen=True)
class Plan:
    """Entries that decoding a prompt comes to, row by row.

    Attributes:
        heads: raw tokens in front of the slots.
        slots: slots of the memory and of what is compressed.
        tokens: source tokens that these stand for.
        local: raw tokens behind them.
        num_entries: entries of a cache, padding included.
    """

    heads: list[int]
    slots: list[int]
    tokens: list[int]
    local: list[int]
    num_entries: int

    @classmethod
    def of(
        cls,
        config,
        memory: RCCMemory | None,
        mask: Tensor | None,
        prompt_length: int,
        *,
        head_length: HeadLength,
        ratio: int,
        window: int,
        compress: bool,
        later: int = 0,
    ) -> "Plan":
        """Plan for a prompt of padded length `prompt_length`.

        Args:
            mask: `[B, T]`, 0 at padding; None if there is none.
            head_length: tokens that heads have once they are full.
            window: raw tokens that stay behind the slots.
            compress: whether what does not fit the window is compressed.
            later: further tokens of each row that will be read, and compressed as the prompt is.
        """
        batch_size = len(mask) if mask is not None else 1 if memory is None else memory.batch_size
        wanted = torch.as_tensor(head_length).reshape(-1).tolist()
        if memory is None and mask is None:  # rows differ in their heads alone
            batch_size = len(wanted)
        rest = [prompt_length] * batch_size if mask is None else row_lengths(mask, mask)
        heads, slots, tokens, width = [0] * batch_size, [0] * batch_size, [0] * batch_size, 0
        if memory is not None:
            heads, width = head_sizes(memory), sum(memory.slot_counts)
            slots = [width] * batch_size if memory.mask is None else memory.mask.sum(1).tolist()
            tokens = [len(blocks) * memory.segment_length for blocks in row_blocks(memory)]
            rest = [a + b for a, b in zip(rest, local_sizes(memory), strict=True)]
        most = wanted * (batch_size // len(wanted))
        filling = [min(max(0, m - head), n) for m, head, n in zip(most, heads, rest, strict=True)]
        heads = [head + new for head, new in zip(heads, filling, strict=True)]
        rest = [length - new + later for length, new in zip(rest, filling, strict=True)]
        segment = config.segment_length
        counts = [count_segments(length, segment, window) if compress else 0 for length in rest]
        local = [length - count * segment for length, count in zip(rest, counts, strict=True)]
        slots = [slot + count * (segment // ratio) for slot, count in zip(slots, counts, strict=True)]
        tokens = [token + count * segment for token, count in zip(tokens, counts, strict=True)]
        if compress:  # rows are packed
            return cls(heads, slots, tokens, local, max(heads) + width + max(counts) * (segment // ratio) + max(local))
        # everything stays as padded as it is given
        in_front = 0 if memory is None else memory.num_head + width + memory.num_local
        return cls(heads, slots, tokens, local, in_front + prompt_length)

    def check(self, config, new_tokens: int, rolling: Rolling | None, ratio: int) -> None:
        """Refuse before the first step what would run out of slots or positions in the midst of generation.

        Args:
            new_tokens: tokens to come that the plan does not count.

        Raises:
            ValueError: if there are too few.
        """
        slots = self.slots
        if rolling is not None and rolling.max_slots is not None:
            if rolling.when_full == "error" and max(slots) > rolling.max_slots:
                raise ValueError(
                    f"memory, prompt and new tokens come to {max(slots)} slots, and max_slots is {rolling.max_slots}. "
                    "Allow more, use a higher ratio, or choose when_full='drop' or 'recompress'"
                )
            slots = [min(slot, rolling.max_slots) for slot in slots]
        reaches = [slots_reach(config, *numbers) for numbers in zip(slots, self.tokens, strict=True)]
        needed = max(map(sum, zip(self.heads, reaches, self.local, strict=True)))
        check_positions(config, needed + new_tokens, ratio=ratio)
