# SPDX-License-Identifier: Apache-2.0
"""Long texts, read segment by segment: each is predicted behind the slots of all before it."""

import numpy as np
import torch
from torch import Tensor

from rcc_hf.objectives.base import IGNORED, Shape, as_tensor
from rcc_hf.objectives.haystacks import ShardWindows
from rcc_hf.texts import TokenShards

__all__ = ["LongText"]


class LongText:
    """A piece of a document of several segments, of which all but the first are predicted.

    The first token of a segment is given, since no logits stand in front of it. For `gradient_engine` of the training
    settings, which carries gradients from each segment to all that it reads.

    Args:
        shards: Documents.
        name: For tables.
    """

    def __init__(self, shards: TokenShards, *, name: str = "long_text"):
        self.name = name
        self._windows = ShardWindows(shards)

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        """As `Objective`, but of `sequence_ids` and `labels` `[T * W]` alone."""
        if shape.num_segments < 2:
            raise ValueError(
                f"a long text of {shape.num_segments} segment has nothing that is read behind slots; give segments of "
                "2 and more (segments_of in a phase)"
            )
        ids = as_tensor(self._windows.draw(rng, shape.context_length))
        labels = ids.clone()
        labels[: shape.segment_length] = IGNORED
        labels[torch.arange(0, len(ids), shape.segment_length)] = IGNORED
        return {"sequence_ids": ids, "labels": labels}
