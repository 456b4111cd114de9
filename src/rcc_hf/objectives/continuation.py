# SPDX-License-Identifier: Apache-2.0
"""Language modelling behind a compressed context: the tokens that follow it are predicted."""

import numpy as np
from torch import Tensor

from rcc_hf.objectives.base import Shape, build_example
from rcc_hf.objectives.haystacks import ShardWindows
from rcc_hf.texts import TokenShards

__all__ = ["Continuation"]


class Continuation:
    """The context is the beginning of a passage, and what follows it is predicted.

    The first local token is given, since no logits stand in front of it.

    Args:
        shards: Documents.
        local_length: Tokens behind the context.
        distill: Whether an uncompressed teacher reads the same.
        name: For tables.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, shards: TokenShards, *, local_length: int = 512, distill: bool = False, name: str = "continuation"
    ):
        if local_length < 2:
            raise ValueError(f"local_length is {local_length}; it must be at least 2, since the first token is given")
        self.name = name
        self._windows, self._local_length, self._distill = ShardWindows(shards), local_length, distill

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        text = self._windows.draw(rng, shape.context_length + self._local_length)
        context, local = np.split(text, [shape.context_length])
        return build_example(context, [(local, True)], teacher_context=context if self._distill else None)
