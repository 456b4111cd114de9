# SPDX-License-Identifier: Apache-2.0
"""Long contexts of short ones: the document that answers a question among documents of other questions."""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.benchmark_qa import CLOSED_ANSWERS
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.lengths import TokenCounter

__all__ = ["Distractors"]

_SEPARATOR = "\n\n"
_NO_WORD = re.compile(r"[\W_]+")
# Tokens change with the letters in front of a cut: the exact number may be reached some letters away from a near one.
_REACH = 16
_ENDS = ("", ".", "\n", " a")


def _words(text: str) -> str:
    """A text to look for answers in, or an answer to look for: case, punctuation and white space do not count."""
    return f" {_NO_WORD.sub(' ', text.casefold()).strip()} "


class Distractors:
    """The contexts of all examples, with which those of single ones are filled up."""

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, num_tokens: int, seed: int):
        """Args:
        examples: All of them, also those that are not asked.
        tokenizer: By which contexts are measured.
        num_tokens: Of a context that is filled up.
        seed: Other distractors and places for another one.
        """
        self._counter, self._num_tokens, self._seed = TokenCounter(tokenizer), num_tokens, seed
        answers: dict[str, set[str]] = {}
        for example in examples:
            answers.setdefault(example.context, set()).update(example.answers)
        self._words = {context: _words(context) for context in answers}
        self._answers = {
            context: sorted(answer for answer in found if _words(answer).strip() not in CLOSED_ANSWERS)
            for context, found in answers.items()
        }

    def fill(self, example: Example) -> Example:
        """The example with its context among others, which hold no answer to any question about it.

        They depend on the seed and that context alone: questions about one context go on sharing it. The last
        distractor loses its end, so that the number of tokens is the one asked for; only where no cut gives it, it is
        the nearest one below.

        Raises:
            ValueError: the context alone has more tokens, or all that may be taken have less.
        """
        own, limit = example.context, self._num_tokens
        size = self._counter.count(own)
        if size > limit:
            raise ValueError(
                f"context_tokens is {limit}, and the context of {example.question.strip()[:60]!r} alone has {size}; "
                "give at least so many, or leave such examples out"
            )
        generator = random.Random(f"{self._seed}|{own}")
        share, others = generator.random(), self._allowed(own)
        order = generator.sample(others, len(others))
        count = self._number(order, own, share)
        place = int(share * (count + 1))
        text, tokens = self._cut(order[:count], own, place) if count else (own, size)
        metadata = {"length": limit, "context_tokens": tokens, "documents": count + 1, "own_document": place}
        return replace(example, context=text, metadata={**example.metadata, **metadata})

    def _allowed(self, own: str) -> list[str]:
        """The documents without an answer to a question about this one."""
        wanted = [(_words(answer), answer.strip()) for answer in self._answers[own]]
        return [
            context
            for context, words in self._words.items()
            if context.strip()
            and context != own
            and not any(answer in words if answer.strip() else sign in context for answer, sign in wanted)
        ]

    def _number(self, order: Sequence[str], own: str, share: float) -> int:
        """Just enough documents, of which the last one is cut."""

        def total(count: int, length: int | None) -> int:
            taken = [*order[: count - 1], order[count - 1][:length]] if count else []
            return self._counter.count(_render(taken, own, int(share * (count + 1))))

        limit, count = self._num_tokens, 0
        expected = total(0, None)
        while count < len(order) and expected < limit:
            expected += self._counter.each([_SEPARATOR + order[count]])[0]
            count += 1
        # the sum over documents is a little more or less than the tokens of the whole
        while (found := total(count, None)) < limit:
            if count == len(order):
                raise ValueError(
                    f"context_tokens is {limit}, and a context with the {len(order)} others that do not hold its "
                    f"answers has {found}; give fewer, or data with more contexts"
                )
            count += 1
        while count and total(count, 0) > limit:
            count -= 1
        return count

    def _cut(self, documents: Sequence[str], own: str, place: int) -> tuple[str, int]:
        """The text with the last document cut so that its tokens are as many as asked for, and their number."""

        def end_with(length: int, end: str = "") -> tuple[int, str]:
            text = _render([*documents[:-1], documents[-1][:length] + end], own, place)
            return self._counter.count(text), text

        limit, whole = self._num_tokens, len(documents[-1])
        low, high = 0, whole
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if end_with(middle)[0] <= limit else (low, middle - 1)
        near = sorted(range(max(0, low - _REACH), min(whole, low + _REACH) + 1), key=lambda length: abs(length - low))
        best = end_with(0)
        for end in _ENDS:
            for length in near:
                made = end_with(length, end)
                if best[0] < made[0] <= limit:
                    best = made
                if best[0] == limit:
                    return best[1], limit
        return best[1], best[0]


def _render(documents: Sequence[str], own: str, place: int) -> str:
    return _SEPARATOR.join([*documents[:place], own, *documents[place:]])
