# SPDX-License-Identifier: Apache-2.0
"""RULER's tracing and aggregation tasks: chains of variables, common words, frequent coded words."""

import math
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from rcc_hf.evaluation.lengths import TokenCounter, fit_units, take_units
from rcc_hf.evaluation.needles import hide
from rcc_hf.evaluation.ruler_needles import noise_units
from rcc_hf.evaluation.ruler_parts import Draft
from rcc_hf.evaluation.vocabulary import distinct_words, random_number

__all__ = ["common_words", "frequent_words", "variable_tracking"]

_NUM_HOPS = 4
_NUM_COMMON = 10
_SHOT_TOKENS = 500
_CODED_LENGTH = 6
_ALPHA = 2.0


@dataclass(frozen=True)
class _Chain:
    """Variables that get one value, hidden in noise."""

    names: list[str]
    value: str
    body: Callable[[int], str]
    sizes: list[int]

    @property
    def question(self) -> str:
        return f"Question: Find all variables that are assigned the value {self.value} in the text above. "

    @property
    def answer_prefix(self) -> str:
        return (
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(self.names)} variables are assigned the value {self.value}, they are: "
        )

    def context(self, num_units: int) -> str:
        intro = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
        return f"{intro}{self.body(num_units)}\n"


def variable_tracking(generator: random.Random, counter: TokenCounter, length: int) -> Draft:
    """`vt`: all variables that got a value through a chain of four assignments, with one solved example in front."""
    solved = _chain(generator, counter, num_letters=3, budget=_SHOT_TOKENS)
    ending = f"{solved.question}{solved.answer_prefix}{' '.join(solved.names)}\n\n"
    _, shot, _ = fit_units(lambda number: solved.context(number) + ending, solved.sizes, counter, _SHOT_TOKENS)
    chain = _chain(generator, counter, num_letters=5, budget=length)
    return Draft(
        render=lambda number: shot + chain.context(number),
        sizes=chain.sizes,
        question=chain.question,
        answer_prefix=chain.answer_prefix,
        answers=chain.names,
        max_new_tokens=30,
    )


def _chain(generator: random.Random, counter: TokenCounter, *, num_letters: int, budget: int) -> _Chain:
    names: list[str] = []
    while len(names) < _NUM_HOPS + 1:
        name = "".join(generator.choices(string.ascii_uppercase, k=num_letters))
        if name not in names:
            names.append(name)
    value = random_number(generator, 5)
    lines = [f"\nVAR {names[0]} = {value}"]
    lines += [f"\nVAR {new} = VAR {old}" for old, new in pairwise(names)]
    units, sizes = take_units(noise_units(), counter, budget)
    # An assignment stands behind the one that it refers to.
    return _Chain(names, value, hide("", units, sizes, lines, sorted(generator.random() for _ in lines)), sizes)


def common_words(generator: random.Random, counter: TokenCounter, length: int) -> Draft:
    """`cwe`: the ten words that appear 30 times in a list where others appear 3 times (6 and 1 below 4096 tokens)."""
    is_short = length < 4096
    shot_words, shot_often, shot_seldom = (20, 3, 1) if is_short else (40, 10, 3)
    often, seldom = (6, 1) if is_short else (30, 3)
    instruction = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = "Question: What are the 10 most common words in the above list? "
    prefix = "Answer: The top 10 words that appear most often in the list are:"
    solved, rest = _split_common(distinct_words(generator, shot_words))
    listed = _numbered(solved * shot_often + rest * shot_seldom, generator.random())
    answer = " ".join(f"{place}. {word}" for place, word in enumerate(solved, 1))
    shot = f"{instruction}{listed}\n{question}{prefix} {answer}\n"
    # A word and its number are at least three tokens.
    common, others = _split_common(distinct_words(generator, max(60, length // (3 * seldom))))
    sizes = [seldom * (tokens + 5) for tokens in counter.each([f" {word}" for word in others])]
    order = generator.random()
    return Draft(
        render=lambda number: f"{shot}{instruction}{_numbered(common * often + others[:number] * seldom, order)}\n",
        sizes=sizes,
        question=question,
        answer_prefix=prefix,
        answers=common,
        max_new_tokens=120,
    )


def _split_common(words: list[str]) -> tuple[list[str], list[str]]:
    """Ten words that are part of no other word, so that finding them in an answer means something; and the rest."""
    text = "\n".join(words)
    common = list(islice((word for word in words if text.count(word) == 1), _NUM_COMMON))
    return common, [word for word in words if word not in common]


def _numbered(words: list[str], seed: float) -> str:
    words = words.copy()
    random.Random(seed).shuffle(words)
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def frequent_words(generator: random.Random, counter: TokenCounter, length: int) -> Draft:
    """`fwe`: the three most frequent of made-up words whose frequencies fall off as a zeta distribution."""
    max_new_tokens = 50
    budget = length - max_new_tokens
    words: set[str] = set()
    while len(words) < max(_NUM_COMMON, budget // 50):
        words.add("".join(generator.choices(string.ascii_lowercase, k=_CODED_LENGTH)))
    vocabulary = sorted(words)
    generator.shuffle(vocabulary)
    # The most frequent one is noise.
    vocabulary[0] = "..."
    shares = np.arange(1, len(vocabulary) + 1, dtype=np.float64) ** -_ALPHA / (math.pi**2 / 6)
    average = float(np.dot(shares, counter.each([f" {word}" for word in vocabulary])))
    order = generator.random()

    def render(num_words: int) -> str:
        counts = (num_words * shares).astype(np.int64).tolist()
        text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        random.Random(order).shuffle(text)
        return (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(text)}\n"
        )

    def check(num_words: int) -> None:
        second, third, fourth, fifth = (num_words * shares[1:5]).astype(np.int64).tolist()
        if not second > third > fourth > fifth:
            raise ValueError("the words are too few for the three most frequent to differ from the fourth")

    return Draft(
        render=render,
        sizes=[average] * max(budget, 0),
        question=(
            "Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text? "
        ),
        answer_prefix=("Answer: According to the coded text above, the three most frequently appeared words are:"),
        answers=vocabulary[1:4],
        max_new_tokens=max_new_tokens,
        check=check,
    )
