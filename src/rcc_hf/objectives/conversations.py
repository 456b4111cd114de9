# SPDX-License-Identifier: Apache-2.0
"""Conversations whose early turns are compressed, and whose later replies are predicted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.encoding import check_template, encode_text
from rcc_hf.objectives.base import Shape, build_example
from rcc_hf.objectives.checks import check_positive
from rcc_hf.objectives.reconstruction import pad_segment
from rcc_hf.objectives.turns import encode_conversation
from rcc_hf.texts import ChatRow

__all__ = ["Conversations"]


class Conversations:
    """Early turns, or what a conversation is about, are compressed, and later replies predicted.

    Of a conversation whole segments at the beginning are compressed, and what follows is local; the cut is where the
    segments end, also within a turn, as when a conversation is decoded behind a memory. A long one may begin behind any
    of its replies instead of at its first token. If it has a context, that is compressed alone, its last segment filled
    up, and the conversation is local.

    Args:
        rows: Conversations.
        tokenizer: Of the model, with a chat template.
        max_local: Tokens behind the context, at most.
        fill_id: Fills up the last segment of a context; the end-of-text token by default, as in evaluation.
        distill: Whether an uncompressed teacher reads the same.
        name: For tables.
        progress: Whether a bar is shown while rows are tokenized.

    Raises:
        ValueError: there is no row, the template refuses one, or a number is out of range.
    """

    def __init__(
        self,
        rows: Sequence[ChatRow],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_local: int = 512,
        fill_id: int | None = None,
        distill: bool = False,
        name: str = "conversations",
        progress: bool = True,
    ):
        check_positive("max_local", max_local)
        check_template(tokenizer)
        if not rows:
            raise ValueError("there are no conversations; give at least one")
        self.name = name
        self._max_local, self._distill = max_local, distill
        self._fill_id = tokenizer.eos_token_id if fill_id is None else fill_id
        bar = tqdm(rows, desc="Tokenizing", unit="conversation", disable=not progress)
        self._rows = [_encode(number, row, tokenizer) for number, row in enumerate(bar, 1)]
        self._places: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        places = self._places_of(shape)
        number, start = places[int(rng.integers(len(places)))]
        row = self._rows[number]
        begin = start if row.context is not None else start + shape.context_length
        read = row.ids[start:begin] if row.context is None else row.context
        ids, is_reply = row.ids[begin : begin + self._max_local], row.is_reply[begin : begin + self._max_local]
        edges = np.flatnonzero(is_reply[1:] != is_reply[:-1]) + 1
        pieces = zip(np.split(ids, edges), np.split(is_reply, edges), strict=True)
        return build_example(
            pad_segment(read, shape.segment_length, self._fill_id),
            [(piece, bool(asked[0])) for piece, asked in pieces],
            teacher_context=read if self._distill else None,
        )

    def _places_of(self, shape: Shape) -> list[tuple[int, int]]:
        """Conversations and places in them from which a context leaves something of a reply to predict."""
        key = shape.num_segments, shape.segment_length
        if key not in self._places:
            found = [(number, start) for number, row in enumerate(self._rows) for start in self._starts(row, shape)]
            if not found:
                longest = max(len(row.ids) for row in self._rows)
                raise ValueError(
                    f"no conversation has a reply within {self._max_local} tokens behind a context of "
                    f"{shape.context_length}, the longest has {longest} tokens; give longer ones, or train this "
                    "objective with fewer segments"
                )
            self._places[key] = found
        return self._places[key]

    def _starts(self, row: "_Encoded", shape: Shape) -> list[int]:
        if row.context is not None:
            fits = -(-len(row.context) // shape.segment_length) == shape.num_segments
            return [0] if fits and row.is_reply[1 : self._max_local].any() else []
        begins = ((start, start + shape.context_length) for start in row.starts)
        return [start for start, begin in begins if row.is_reply[begin + 1 : begin + self._max_local].any()]


@dataclass(frozen=True)
class _Encoded:
    """A conversation: ids `[T]`, which of them are of replies `[T]`, where it may begin, and what it is about `[N]`."""

    ids: np.ndarray
    is_reply: np.ndarray
    starts: list[int]
    context: np.ndarray | None


def _encode(number: int, row: ChatRow, tokenizer: PreTrainedTokenizerBase) -> _Encoded:
    try:
        ids, is_reply = encode_conversation(tokenizer, row.messages)
    except ValueError as error:
        raise ValueError(f"conversation {number}: {error}") from error
    behind = np.flatnonzero(is_reply[:-1] & ~is_reply[1:]) + 1
    context = None if row.context is None else encode_text(tokenizer, row.context).numpy()
    return _Encoded(ids, is_reply, sorted({0, *behind.tolist()}), context)
