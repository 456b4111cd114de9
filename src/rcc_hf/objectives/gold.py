# SPDX-License-Identifier: Apache-2.0
"""Contexts of questions: the passage that has the answer, among passages that do not."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.encoding import encode_text
from rcc_hf.objectives.base import Shape
from rcc_hf.objectives.checks import check_share
from rcc_hf.objectives.haystacks import Haystack
from rcc_hf.texts import QARow, TokenShards

__all__ = ["GoldContext", "GoldContexts", "contains"]

_TRIES = 50
_PASSAGE_LENGTH = 256
_BATCH = 1000


@dataclass(frozen=True)
class GoldContext:
    """A question's text.

    Attributes:
        index: Of the row.
        row: The question.
        ids: Passages, `[n]`: what the shape has room for, or the row's passage alone, which has to be padded.
    """

    index: int
    row: QARow
    ids: np.ndarray


class GoldContexts:
    """Draws rows, and puts their passages at a random place among others, so that all together fill whole segments.

    The others are contexts of other rows, or text of a haystack; they have none of the row's answers that its own
    passage has, and the one drawn last is cut.

    Args:
        rows: Questions with contexts.
        tokenizer: Of the model.
        haystack: Where other passages come from; None: contexts of other rows.
        alone_share: Share of examples whose passage stays alone; as far as there are rows whose passage takes exactly
            as many segments as are asked for, the last of them filled up.
        reserved: Of each row, tokens that are added to its context, `[num_rows]`; None for none.
        progress: Whether a bar is shown while contexts are tokenized.

    Raises:
        ValueError: there is no row, or a share is out of range.
    """

    def __init__(
        self,
        rows: Sequence[QARow],
        tokenizer: PreTrainedTokenizerBase,
        *,
        haystack: Haystack | None = None,
        alone_share: float = 0.0,
        reserved: Sequence[int] | np.ndarray | None = None,
        progress: bool = True,
    ):
        check_share("alone_share", alone_share)
        if not rows:
            raise ValueError("there are no questions; give at least one")
        self._rows, self._tokenizer = rows, tokenizer
        self._haystack, self._alone_share = haystack, alone_share
        self._separator = encode_text(tokenizer, "\n\n").numpy()
        self._reserved = np.zeros(len(rows), dtype=np.int64) if reserved is None else np.asarray(reserved)
        numbers: dict[str, int] = {}
        self._passage_of = np.array([numbers.setdefault(row.context, len(numbers)) for row in rows])
        self._texts = list(numbers)
        self._passages = _tokenize(self._texts, tokenizer, progress)
        self._sizes = self._passages.lengths[self._passage_of] + self._reserved

    def draw(self, rng: np.random.Generator, shape: Shape) -> GoldContext:
        """A row that fits, and its text.

        Raises:
            ValueError: no row fits, or no other passages are without the answers.
        """
        filling = np.flatnonzero(-(-self._sizes // shape.segment_length) == shape.num_segments)
        if rng.random() < self._alone_share and len(filling):
            index = int(rng.choice(filling))
            return GoldContext(index, self._rows[index], self._passage(int(self._passage_of[index])))
        fitting = np.flatnonzero(self._sizes <= shape.context_length)
        if not len(fitting):
            raise ValueError(
                f"no passage fits a context of {shape.context_length} tokens, the shortest has {self._sizes.min()}; "
                "use more or longer segments, or cut the passages"
            )
        for _ in range(_TRIES):
            index = int(rng.choice(fitting))
            ids = self._among_others(rng, index, shape.context_length - int(self._reserved[index]))
            if ids is not None:
                return GoldContext(index, self._rows[index], ids)
        raise ValueError(
            f"for none of {_TRIES} questions passages without their answers were found; give more rows with other "
            "contexts, or a haystack"
        )

    def _among_others(self, rng: np.random.Generator, index: int, length: int) -> np.ndarray | None:
        """The row's passage among others, `[length]`; None if others without its answers are too rare."""
        gold = self._passage(int(self._passage_of[index]))
        missing = length - len(gold)
        others: list[np.ndarray] = []
        separators: list[np.ndarray] = []
        while missing:
            other = self._other(rng, index)
            if other is None:
                return None
            separators.append(self._separator[:missing])
            others.append(other[: missing - len(separators[-1])])
            missing -= len(separators[-1]) + len(others[-1])
        place = int(rng.integers(len(others) + 1))
        pairs = list(zip(others, separators, strict=True))
        before = [part for other, separator in pairs[:place] for part in (other, separator)]
        behind = [part for other, separator in pairs[place:] for part in (separator, other)]
        return np.concatenate([*before, gold, *behind])

    def _other(self, rng: np.random.Generator, index: int) -> np.ndarray | None:
        own = self._passage_of[index]
        answers = [answer for answer in self._rows[index].answers if contains(self._texts[own], [answer])]
        for _ in range(_TRIES):
            if self._haystack is not None:
                ids = self._haystack.draw(rng, _PASSAGE_LENGTH)
                text = str(self._tokenizer.decode(ids.tolist()))
            else:
                number = int(rng.integers(len(self._texts)))
                if number == own:
                    continue
                ids, text = self._passage(number), self._texts[number]
            if not contains(text, answers):
                return ids
        return None

    def _passage(self, number: int) -> np.ndarray:
        return self._passages.slice(number, 0, int(self._passages.lengths[number]))


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in a text as whole words, in capitals or not."""
    if not answers:
        return False
    wanted = "|".join(re.escape(answer.strip()) for answer in answers)
    return re.search(rf"(?<!\w)(?:{wanted})(?!\w)", text, re.IGNORECASE) is not None


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, progress: bool) -> TokenShards:
    ids: list[np.ndarray] = []
    with tqdm(total=len(texts), desc="Tokenizing", unit="passage", disable=not progress) as bar:
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            found = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            ids += [np.asarray(row, dtype=np.int64) for row in found]
            bar.update(len(batch))
    return TokenShards.of_documents(ids)
