# SPDX-License-Identifier: Apache-2.0
"""Places where a given number of tokens of one document begin, drawn evenly."""

import numpy as np

from rcc_hf.texts.shards import TokenShards

__all__ = ["Windows"]


class Windows:
    """All places where `length` tokens of one document begin; none spans two documents.

    A sequence of pairs (document, first token), in order; nothing is stored of them but 8 bytes a document.
    """

    def __init__(self, shards: TokenShards, length: int):
        """Windows of `length` tokens.

        Raises:
            ValueError: `length` is not positive, or no document has so many tokens.
        """
        if length < 1:
            raise ValueError(f"length is {length}; a window has at least one token")
        self.length = length
        self._ends = np.cumsum(np.maximum(shards.lengths - length + 1, 0))
        if not self._ends[-1]:
            raise ValueError(
                f"no document has {length} tokens, the longest has {shards.lengths.max()}; give longer documents, or "
                "train with a shorter context"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, place: int) -> tuple[int, int]:
        """Document and first token of a place, counted from 0."""
        if not 0 <= place < len(self):
            raise IndexError(f"there is no place {place}; there are {len(self)}, from 0")
        document = int(np.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[document - 1]) if document else 0
        return document, int(place) - before

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Document and first token of a place; all places are equally likely."""
        return self[int(rng.integers(len(self)))]
