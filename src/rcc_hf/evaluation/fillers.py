# SPDX-License-Identifier: Apache-2.0
"""Text in which needles are hidden: repeated sentences, random words, or real paragraphs."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

from rcc_hf.evaluation.vocabulary import ADJECTIVES, NOUNS
from rcc_hf.prose import load_prose

__all__ = ["FILLERS", "Filler", "RepetitiveFiller", "TextFiller", "WordFiller", "book_paragraphs"]

NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
)  # fmt: skip
"""The filler of the first pass key tasks (https://arxiv.org/abs/2305.16300) and of RULER."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'\u201d\u2019)])\s+")


class Filler(Protocol):
    """Where the text around needles comes from."""

    @property
    def name(self) -> str:
        """For tables."""

    def units(self, generator: random.Random) -> Iterator[str]:
        """The smallest pieces between which a needle can stand, without end, each with the white space before it."""


@dataclass(frozen=True)
class RepetitiveFiller:
    """Five short sentences, again and again; a unit is a sentence."""

    name: str = "repetitive"

    def units(self, generator: random.Random) -> Iterator[str]:
        return (f" {sentence}" for sentence in cycle(NOISE))


@dataclass(frozen=True)
class WordFiller:
    """Random English words; a unit is a word."""

    name: str = "words"

    def units(self, generator: random.Random) -> Iterator[str]:
        words = [f" {word}" for word in (*ADJECTIVES, *NOUNS)]
        while True:
            yield generator.choice(words)


class TextFiller:
    """Paragraphs of real text, from a random one on; a unit is a sentence.

    Text that is too short for a length is repeated.
    """

    def __init__(self, paragraphs: Sequence[str], name: str = "essay"):
        """Split the paragraphs into sentences.

        Raises:
            ValueError: there is no text.
        """
        self.name = name
        self._paragraphs = [units for paragraph in paragraphs if (units := _sentences(paragraph))]
        if not self._paragraphs:
            raise ValueError(f"the filler {name!r} has no text; give paragraphs, for example of rcc_hf.prose")

    def units(self, generator: random.Random) -> Iterator[str]:
        start = generator.randrange(len(self._paragraphs))
        for paragraph in islice(cycle(self._paragraphs), start, None):
            yield from paragraph


def _sentences(paragraph: str) -> list[str]:
    sentences = [" ".join(part.split()) for part in _SENTENCE_END.split(paragraph.strip())]
    separators = ["\n\n", *[" "] * len(sentences)]
    return [separator + text for separator, text in zip(separators, sentences, strict=False) if text]


def book_paragraphs() -> list[str]:
    """Paragraphs of the bundled prose that is held out from training.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return [paragraph for book in load_prose("held_out") for paragraph in book.text.split("\n\n")]


FILLERS: dict[str, Callable[[], Filler]] = {
    "repetitive": RepetitiveFiller,
    "words": WordFiller,
    "books": lambda: TextFiller(book_paragraphs(), "books"),
}
"""By the name that a setting gives."""
