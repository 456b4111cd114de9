# SPDX-License-Identifier: Apache-2.0
"""RULER's eight retrieval tasks: keys with values, hidden in noise, in real text, or among other keys and values."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rcc_hf.evaluation.fillers import NOISE, TextFiller
from rcc_hf.evaluation.lengths import TokenCounter, take_units
from rcc_hf.evaluation.needles import hide
from rcc_hf.evaluation.ruler_parts import Draft
from rcc_hf.evaluation.vocabulary import random_key, random_number, random_uuid

__all__ = ["NIAH_TASKS", "Retrieval", "noise_units"]

Kind = Literal["words", "numbers", "uuids"]

_RANDOM: dict[Kind, Callable[[random.Random], str]] = {
    "words": random_key,
    "numbers": lambda generator: random_number(generator, 7),
    "uuids": random_uuid,
}
_NUM_DEPTHS = 40


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """One of the tasks, by what its haystack and needles are.

    Attributes:
        haystack: Repeated sentences, real text, or needles that nobody asks for.
        keys: What a key is.
        values: What a value is.
        num_keys: Keys among the needles.
        num_values: Values of each key.
        num_queries: Keys that are asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def draft(self, generator: random.Random, counter: TokenCounter, length: int, essay: TextFiller | None) -> Draft:
        """A new example; `essay` is needed for that haystack only."""
        values = self.pairs(generator)
        needles = [self.needle(key, value) for key, found in values.items() for value in found]
        generator.shuffle(needles)
        if self.haystack == "essay":
            depths = [point / (_NUM_DEPTHS - 1) for point in generator.sample(range(_NUM_DEPTHS), len(needles))]
        else:
            depths = [generator.random() for _ in needles]
        units, sizes = take_units(self._units(generator, essay, values), counter, length)
        separator = " " if self.haystack == "essay" else "\n"
        body = hide("", units, sizes, [separator + needle for needle in needles], depths)
        intro, question, prefix = self.prompt(queries := generator.sample(list(values), self.num_queries))
        return Draft(
            render=lambda number: f"{intro}\n{body(number).lstrip()}\n",
            sizes=sizes,
            question=question,
            answer_prefix=prefix,
            answers=[value for key in queries for value in values[key]],
            max_new_tokens=128,
            metadata={"haystack": self.haystack},
        )

    def pairs(self, generator: random.Random) -> dict[str, list[str]]:
        """The values of each key."""
        values: dict[str, list[str]] = {}
        while len(values) < self.num_keys:
            found = [_RANDOM[self.values](generator) for _ in range(self.num_values)]
            values.setdefault(_RANDOM[self.keys](generator), found)
        return values

    def needle(self, key: str, value: str) -> str:
        """The sentence that is hidden."""
        return f"One of the special magic {self.values} for {key} is: {value}."

    def _units(self, generator: random.Random, essay: TextFiller | None, taken: dict[str, list[str]]) -> Iterator[str]:
        if self.haystack == "noise":
            return noise_units()
        if self.haystack == "needle":
            return self._distractors(generator, set(taken))
        if essay is None:
            raise ValueError("this task hides needles in real text; give paragraphs, for example of rcc_hf.prose")
        return (f" {unit.strip()}" for unit in essay.units(generator))

    def _distractors(self, generator: random.Random, taken: set[str]) -> Iterator[str]:
        """Needles of other keys: a second value of a key that is asked for would be no distractor but an error."""
        while True:
            key = _RANDOM[self.keys](generator)
            if key not in taken:
                yield "\n" + self.needle(key, _RANDOM[self.values](generator))

    def prompt(self, queries: list[str]) -> tuple[str, str, str]:
        """Introduction, question, and prefix of the answer, in RULER's words, in the singular where one is asked."""
        query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
        if self.num_queries * self.num_values == 1:
            kind, some, are, all_are = self.values[:-1], "A", "is", "is"
        else:
            kind, some, are, all_are = self.values, "Some", "are", "are all"
        return (
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.",
            f"What {all_are} the special magic {kind} for {query} mentioned in the provided text? ",
            f"The special magic {kind} for {query} mentioned in the provided text {are}",
        )


def noise_units() -> Iterator[str]:
    """Lines of the five sentences, without end."""
    line = "\n" + " ".join(NOISE)
    while True:
        yield line


NIAH_TASKS = {
    "niah_single_1": Retrieval(haystack="noise"),
    "niah_single_2": Retrieval(haystack="essay"),
    "niah_single_3": Retrieval(haystack="essay", values="uuids"),
    "niah_multikey_1": Retrieval(haystack="essay", num_keys=4),
    "niah_multikey_2": Retrieval(haystack="needle"),
    "niah_multikey_3": Retrieval(haystack="needle", keys="uuids", values="uuids"),
    "niah_multivalue": Retrieval(haystack="essay", num_values=4),
    "niah_multiquery": Retrieval(haystack="essay", num_keys=4, num_queries=4),
}
