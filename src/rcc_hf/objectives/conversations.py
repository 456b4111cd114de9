# SPDX-License-Identifier: Apache-2.0
"""Conversations whose early turns are compressed, and whose later replies are predicted."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rcc_hf.objectives.base import Shape, build_example
from rcc_hf.objectives.checks import check_positive
from rcc_hf.objectives.turns import encode_conversation
from rcc_hf.texts.questions import ChatRow

__all__ = ["Conversations"]


class Conversations:
    """Whole segments at the beginning of a conversation are compressed, what follows is local; replies are predicted.

    The cut is where the segments end, also within a turn, as when a conversation is decoded with a memory. A long
    conversation may begin behind any of its replies instead of at its first token.

    Args:
        rows: Conversations.
        tokenizer: Of the model, with a chat template.
        max_local: Tokens behind the context, at most.
        distill: Whether an uncompressed teacher reads the same.
        name: For tables.
        progress: Whether a bar is shown while rows are tokenized.

    Raises:
        ValueError: there is no row, a template refuses one, or a number is out of range.
    """

    def __init__(
        self,
        rows: Sequence[ChatRow],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_local: int = 512,
        distill: bool = False,
        name: str = "conversations",
        progress: bool = True,
    ):
        check_positive("max_local", max_local)
        if not rows:
            raise ValueError("there are no conversations; give at least one")
        self.name = name
        self._max_local, self._distill = max_local, distill
        bar = tqdm(rows, desc="Tokenizing", unit="conversation", disable=not progress)
        self._encoded = [encode_conversation(tokenizer, row.messages) for row in bar]
        self._places: dict[int, list[tuple[int, int]]] = {}

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        length = shape.context_length
        places = self._of(length)
        row, start = places[int(rng.integers(len(places)))]
        ids, is_reply, _ = self._encoded[row]
        context, local = ids[start : start + length], slice(start + length, start + length + self._max_local)
        edges = np.flatnonzero(np.diff(is_reply[local])) + 1
        pieces = zip(np.split(ids[local], edges), np.split(is_reply[local], edges), strict=True)
        parts = [(piece, bool(asked[0])) for piece, asked in pieces]
        return build_example(context, parts, teacher_context=context if self._distill else None)

    def _of(self, length: int) -> list[tuple[int, int]]:
        """Conversations and places in them from which a context leaves something of a reply to predict."""
        if length not in self._places:
            found = [
                (row, int(start))
                for row, (_, is_reply, starts) in enumerate(self._encoded)
                for start in starts
                if is_reply[start + length + 1 : start + length + self._max_local].any()
            ]
            if not found:
                longest = max(len(ids) for ids, _, _ in self._encoded)
                raise ValueError(
                    f"no conversation has a reply within {self._max_local} tokens behind a context of {length}, the "
                    f"longest has {longest} tokens; give longer ones, or train this objective with fewer segments"
                )
            self._places[length] = found
        return self._places[length]
