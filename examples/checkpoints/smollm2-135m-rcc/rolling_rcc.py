# SPDX-License-Identifier: Apache-2.0
"""Memories of streams: what becomes of old slots when there may be only so many."""

from dataclasses import dataclass, replace

from .compressed_ops_rcc import coarsen, row_blocks, stack, unstack

POLICIES = ("error", "drop", "recompress")


@dataclass(frozen=True, kw_only=True)
class Rolling:
    """How a stream, whose oldest raw segment is compressed when the window is full, keeps its slots within a budget.

    Attributes:
        max_slots: slots that a row may have; None for any number.
        when_full: "error"; "drop" forgets the oldest segments; "recompress" halves the slots of segments, more often
            the older they are (a segment's slots times its age is what is kept even), and drops the oldest when
            each has one slot left. Halving is what compressing the segment at twice the ratio would have given.

    Raises:
        ValueError: if the policy is unknown, or the budget below 1.
    """

    max_slots: int | None = None
    when_full: str = "error"

    def __post_init__(self):
        if self.when_full not in POLICIES:
            raise ValueError(f"when_full={self.when_full!r} is not known; choose one of {', '.join(POLICIES)}")
        if self.max_slots is not None and (not isinstance(self.max_slots, int) or self.max_slots < 1):
            raise ValueError(f"max_slots={self.max_slots!r} must be a whole number of at least 1, or None")
        if self.max_slots is None and self.when_full != "error":
            raise ValueError(f"when_full={self.when_full!r} has no effect without max_slots; give a budget")

    def check(self, scheme, slots_per_segment: int) -> None:
        """Refuse a budget that cannot be kept.

        Args:
            scheme: the memory scheme that will write.
            slots_per_segment: slots of a new segment.

        Raises:
            ValueError: if one segment exceeds the budget, or the scheme cannot recompress.
        """
        if self.when_full == "recompress" and not scheme.nested_ratios:
            raise ValueError(
                f"scheme {scheme.name!r} cannot recompress slots without their text; choose when_full='drop'"
            )
        if self.max_slots is not None and self.max_slots < slots_per_segment:
            raise ValueError(
                f"max_slots={self.max_slots} is less than the {slots_per_segment} slots of one segment; allow more, or "
                "use a higher ratio"
            )

    def bound(self, memory):
        """The memory with at most `max_slots` slots in every row.

        Raises:
            ValueError: if the policy is "error" and a row has more.
        """
        most = memory.num_slots
        if self.max_slots is None or most <= self.max_slots:
            return memory
        if self.when_full == "error":
            raise ValueError(
                f"the memory has {most} slots and max_slots is {self.max_slots}. Allow more, use a higher ratio, or "
                "choose when_full='drop' or 'recompress'"
            )
        return stack([self._bound_row(row) for row in unstack(memory)])

    def _bound_row(self, memory):
        sizes = [size for _, size in row_blocks(memory)[0]]
        kept, dropped = list(sizes), 0
        while sum(kept) > self.max_slots:
            # the newest has age 1
            oldest_first = [(size * (len(kept) - i), -i) for i, size in enumerate(kept) if size > 1 and size % 2 == 0]
            if self.when_full == "recompress" and oldest_first:
                kept[-max(oldest_first)[1]] //= 2
            else:
                kept.pop(0)
                dropped += 1
        factors = [before // after for before, after in zip(sizes[dropped:], kept, strict=True)]
        rest = coarsen(memory.slice(dropped), factors) if any(f > 1 for f in factors) else memory.slice(dropped)
        return replace(rest, head_ids=memory.head_ids, head_mask=memory.head_mask)  # a slice may be without it
