# SPDX-License-Identifier: Apache-2.0
"""What an objective is, and how examples are put together: a context, local tokens, and labels.

An example is a dictionary of ids `[N]`, `[T]` and so on. Contexts are whole segments: what would stand behind the last
one would stay raw, and an answer that the decoder can read raw teaches the compressor nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["IGNORED", "Ids", "Objective", "Shape", "build_example"]

IGNORED = -100
"""The label of tokens that are not predicted."""

Ids = Sequence[int] | np.ndarray | Tensor
"""Token ids `[T]`."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What examples of a batch have in common.

    Attributes:
        num_segments: Segments of the context.
        segment_length: Tokens of each.
        ratio: Source tokens per slot.

    Raises:
        ValueError: a number is not positive, or the ratio does not divide the segment length.
    """

    num_segments: int
    segment_length: int
    ratio: int

    def __post_init__(self) -> None:
        for name in ("num_segments", "segment_length", "ratio"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.segment_length % self.ratio:
            raise ValueError(f"ratio={self.ratio} does not divide segment_length={self.segment_length}")

    @property
    def context_length(self) -> int:
        """Tokens of the context."""
        return self.num_segments * self.segment_length


class Objective(Protocol):
    """One kind of example that the compressor is trained on.

    Attributes:
        name: For tables and messages.
    """

    name: str

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        """One example, which depends on the generator and the shape alone.

        Args:
            rng: The only source of randomness.
            shape: Of the context.

        Returns:
            `context_ids` `[N]`, whole segments; `input_ids` and `labels` `[T]`, labels being -100 where nothing is
            predicted, and aligned with the ids (the model shifts them). With distillation also `teacher_ids` and
            `teacher_labels` `[U]`, the same text uncompressed, with as many labels in the same order.

        Raises:
            ValueError: the data have nothing of that shape.
        """


def build_example(
    context: Ids, parts: Sequence[tuple[Ids, bool]], *, teacher_context: Ids | None = None
) -> dict[str, Tensor]:
    """An example whose local tokens are the parts one behind the other.

    The first local token is never labelled: what would predict it, the last slot, gives no logits.

    Args:
        context: Is compressed, `[N]`.
        parts: Ids `[T_i]`, and whether they are predicted.
        teacher_context: What an uncompressed teacher reads in front of the same local tokens, `[U - T]`; None for no
            teacher.

    Raises:
        ValueError: nothing is predicted.
    """
    ids = torch.cat([as_tensor(part) for part, _ in parts])
    labels = torch.cat([as_tensor(part) if asked else torch.full((len(part),), IGNORED) for part, asked in parts])
    labels[:1] = IGNORED
    if not bool((labels != IGNORED).any()):
        raise ValueError("an example has no token to predict behind its first local one; give longer answers")
    example = {"context_ids": as_tensor(context), "input_ids": ids, "labels": labels}
    if teacher_context is not None:
        front = as_tensor(teacher_context)
        example["teacher_ids"] = torch.cat([front, ids])
        example["teacher_labels"] = torch.cat([torch.full_like(front, IGNORED), labels])
    return example


def as_tensor(ids: Ids) -> Tensor:
    """Ids `[T]` as a tensor of its own."""
    return torch.as_tensor(np.asarray(ids, dtype=np.int64)).clone()
