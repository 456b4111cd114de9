# SPDX-License-Identifier: Apache-2.0
"""Text of any length at random, from documents or evaluation's fillers: what surrounds needles and passages."""

import random
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.fillers import Filler
from rcc_hf.texts import TokenShards, Windows

__all__ = ["FillerText", "Haystack", "ShardText", "ShardWindows", "python_random"]

_LETTERS_PER_TOKEN = 4


class Haystack(Protocol):
    """Where text comes from."""

    def draw(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Ids `[length]` of text at random."""


class ShardWindows:
    """Windows of documents, of a few lengths: the places of each are counted once.

    Args:
        shards: The documents.
    """

    def __init__(self, shards: TokenShards):
        self._shards = shards
        self._windows: dict[int, Windows] = {}

    def draw(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Ids `[length]` of one document, every place of every document being as likely.

        Raises:
            ValueError: no document is that long.
        """
        if length not in self._windows:
            self._windows[length] = Windows(self._shards, length)
        document, start = self._windows[length].draw(rng)
        return self._shards.slice(document, start, length)


class ShardText:
    """Text of documents; where none is long enough, several of them, one behind the other.

    Args:
        shards: The documents.
    """

    def __init__(self, shards: TokenShards):
        self._windows = ShardWindows(shards)
        self._longest = int(shards.lengths.max())

    def draw(self, rng: np.random.Generator, length: int) -> np.ndarray:
        pieces = [np.zeros(0, dtype=np.int64)]
        missing = length
        while missing:
            # powers of two, since the places of each size are counted and kept
            size = 1 << (missing - 1).bit_length()
            while size > self._longest:
                size //= 2
            pieces.append(self._windows.draw(rng, size)[:missing])
            missing -= len(pieces[-1])
        return np.concatenate(pieces)


class FillerText:
    """Text of one of evaluation's fillers, cut to length.

    Args:
        filler: Repeated sentences, random words, or paragraphs.
        tokenizer: Of the model.
    """

    def __init__(self, filler: Filler, tokenizer: PreTrainedTokenizerBase):
        self._filler, self._tokenizer = filler, tokenizer

    def draw(self, rng: np.random.Generator, length: int) -> np.ndarray:
        letters = _LETTERS_PER_TOKEN * length
        state = int(rng.integers(2**63))
        while True:
            text = self._text(random.Random(state), letters)
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= length:
                return np.asarray(ids[:length], dtype=np.int64)
            letters *= 2

    def _text(self, generator: random.Random, letters: int) -> str:
        parts: list[str] = []
        for unit in self._filler.units(generator):
            parts.append(unit)
            letters -= len(unit)
            if letters <= 0:
                break
        return "".join(parts)


def python_random(rng: np.random.Generator) -> random.Random:
    """A generator of Python that depends on this one: keys and fillers of evaluation are drawn with these."""
    return random.Random(int(rng.integers(2**63)))
