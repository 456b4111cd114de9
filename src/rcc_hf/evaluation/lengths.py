# SPDX-License-Identifier: Apache-2.0
"""Fits text into a number of tokens, at the price of one or two tokenizations of the whole."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.encoding import prefix_ids

__all__ = ["TokenCounter", "fit_units", "take_units"]

# A unit is counted behind this, since tokenizers treat the beginning of a text specially.
_ANCHOR = "."
_FIRST_CHUNK = 64


class TokenCounter:
    """Counts tokens of contexts, with what a tokenizer puts in front; what single units have is remembered."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}
        self._prefix = len(prefix_ids(tokenizer))
        self._anchor = self.count(_ANCHOR) - self._prefix

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return self._prefix + len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def each(self, units: Sequence[str]) -> list[int]:
        """Tokens of each unit where it follows other text; each different one is tokenized once."""
        new = list(dict.fromkeys(unit for unit in units if unit not in self._known))
        if new:
            anchored = [_ANCHOR + unit for unit in new]
            ids = self._tokenizer(anchored, add_special_tokens=False, verbose=False)["input_ids"]
            counts = (max(1, len(row) - self._anchor) for row in ids)
            self._known.update(zip(new, counts, strict=True))
        return [self._known[unit] for unit in units]


def take_units(units: Iterable[str], counter: TokenCounter, budget: int) -> tuple[list[str], list[int]]:
    """As many units as can be needed for `budget` tokens, and some more; their tokens.

    The surplus is for tokenizers that join tokens across units.
    """
    iterator: Iterator[str] = iter(units)
    taken: list[str] = []
    sizes: list[int] = []
    total, enough = 0, budget + budget // 8 + 64
    while total < enough:
        average = total / len(taken) if taken else enough / _FIRST_CHUNK
        chunk = list(islice(iterator, int((enough - total) / average) + 1))
        if not chunk:
            break
        chunk_sizes = counter.each(chunk)
        taken += chunk
        sizes += chunk_sizes
        total += sum(chunk_sizes)
    return taken, sizes


def fit_units(
    render: Callable[[int], str], sizes: Sequence[float], counter: TokenCounter, budget: int
) -> tuple[int, str, int]:
    """The text with the most units that has at most `budget` tokens.

    `sizes` only guide the search; what counts are tokens of the rendered text. It ends where the next unit would, by
    its size or by trial, be too much: within one unit of the budget, and never above it.

    Args:
        render: The text with a given number of units, up to `len(sizes)`.
        sizes: Tokens that each unit adds, about.
        counter: Of the tokenizer.
        budget: Upper limit in tokens.

    Returns:
        The number of units, the text, and its tokens.

    Raises:
        ValueError: even without a unit the text has more tokens.
    """
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.float64)])
    low, high, text = 0, len(sizes) + 1, render(0)
    tokens = counter.count(text)
    if tokens > budget:
        raise ValueError(f"{budget} tokens are too few: what must be in the text has {tokens} already")
    guess = _units_within(ends, 0, budget - tokens)
    while low < guess < high:
        tried = render(guess)
        found = counter.count(tried)
        if found <= budget:
            low, text, tokens = guess, tried, found
            guess = min(_units_within(ends, low, budget - tokens), high - 1)
        else:
            high = guess
            # as many units less as the excess has tokens, by their sizes; halfway where these mislead
            guess = int(np.searchsorted(ends, ends[high] - (found - budget), side="right")) - 1
            guess = guess if guess > low else (low + high) // 2
    return low, text, tokens


def _units_within(ends: np.ndarray, start: int, tokens: float) -> int:
    """The number of units such that those from `start` have at most so many tokens."""
    return int(np.searchsorted(ends, ends[start] + tokens, side="right")) - 1
