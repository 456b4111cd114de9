# SPDX-License-Identifier: Apache-2.0
"""Pass keys and several needles hidden at given depths of contexts of given lengths, made in code.

Every example depends on the seed and on its own length, depth, filler and repetition, and on nothing else: a part of a
grid, in any order, has the same examples as the whole.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.fillers import Filler
from rcc_hf.evaluation.lengths import TokenCounter, fit_units, take_units
from rcc_hf.evaluation.vocabulary import random_key, random_number, random_uuid

__all__ = ["NeedleTask", "hide", "needle_grid", "needle_texts"]

KeyType = Literal["number", "uuid"]

# The words of https://arxiv.org/abs/2305.16300, which InfiniteBench and others have kept.
_PASSKEY_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
_NEEDLES_INTRO = (
    "Some magic {kind}s are hidden inside a lot of irrelevant text. Find them and memorize them. "
    "I will quiz you about them."
)


@dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """What is hidden, and what is asked.

    Attributes:
        filler: Text around the needles.
        key_type: What has to be found: a number, or a UUID.
        num_needles: 1 for a pass key. Of several needles each has a name of two words.
        num_queries: How many of them are asked for; the depth of the first is given, the others' depths are random.
        num_digits: Of a number.
        max_new_tokens: Upper limit of an answer, in tokens; None: 16 for each number, 48 for each UUID.

    Raises:
        ValueError: a number is out of range.
    """

    filler: Filler
    key_type: KeyType = "number"
    num_needles: int = 1
    num_queries: int = 1
    num_digits: int = 5
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.key_type not in ("number", "uuid"):
            raise ValueError(f"key_type is {self.key_type!r}; it must be 'number' or 'uuid'")
        if not 1 <= self.num_queries <= self.num_needles:
            raise ValueError(
                f"num_queries is {self.num_queries} and num_needles {self.num_needles}; "
                "at least one needle, and at most all of them, can be asked for"
            )
        if self.num_digits < 1:
            raise ValueError(f"num_digits is {self.num_digits}; it must be positive")

    @property
    def name(self) -> str:
        """`passkey` or `needles_<num_needles>_<num_queries>`, with filler and type of key."""
        kind = "passkey" if self.num_needles == 1 else f"needles_{self.num_needles}_{self.num_queries}"
        return f"{kind}_{self.filler.name}_{self.key_type}"

    def value(self, generator: random.Random) -> str:
        """A key at random."""
        if self.key_type == "uuid":
            return random_uuid(generator)
        return random_number(generator, self.num_digits)


def needle_grid(
    task: NeedleTask,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_repeats: int = 1,
    seed: int = 0,
) -> Iterator[Example]:
    """Examples of every length, depth and repetition, one at a time.

    Args:
        task: What is hidden.
        tokenizer: By which contexts are measured.
        lengths: Tokens of the context, introduction and needles included; a context is at most one unit of the filler
            shorter, and never longer.
        depths: Share of the filler before the needle: 0 is the beginning, 1 the end.
        num_repeats: Examples in each cell.
        seed: Other examples for another one.

    Raises:
        ValueError: a depth is not between 0 and 1, or a length is too short for the needles.
    """
    counter = TokenCounter(tokenizer)
    for length in lengths:
        for depth in depths:
            for repeat in range(num_repeats):
                yield _example(task, counter, length, depth, repeat, seed)


def _example(task: NeedleTask, counter: TokenCounter, length: int, depth: float, repeat: int, seed: int) -> Example:
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; it must lie between 0 (beginning) and 1 (end)")
    # A string, since Python hashes it the same way in every process.
    generator = random.Random(f"{seed}|{task.name}|{task.num_digits}|{length}|{float(depth)}|{repeat}")
    intro, needles, question, prefix, answers = needle_texts(task, generator)
    depths = [depth] + [generator.random() for _ in needles[1:]]
    units, sizes = take_units(task.filler.units(generator), counter, length)
    num_units, context, tokens = fit_units(hide(intro, units, sizes, needles, depths), sizes, counter, length)
    per_answer = 48 if task.key_type == "uuid" else 16
    return Example(
        context=context,
        question=question,
        answer_prefix=prefix,
        answer=answers,
        max_new_tokens=task.max_new_tokens or per_answer * task.num_queries,
        task=task.name,
        metric="passkey" if task.num_needles == 1 else "string_match_all",
        metadata={
            "length": length,
            "depth": depth,
            "repeat": repeat,
            "seed": seed,
            "filler": task.filler.name,
            "key_type": task.key_type,
            "context_tokens": tokens,
            "filler_units": num_units,
            "needle_depths": [round(place, 6) for place in depths],
        },
    )


def hide(
    intro: str, units: Sequence[str], sizes: Sequence[int], needles: Sequence[str], depths: Sequence[float]
) -> Callable[[int], str]:
    """A function that gives the text of `intro` and the first n units, with the needles at their depths.

    Args:
        intro: Begins the text.
        units: Pieces of filler, each with the white space before it.
        sizes: Their tokens.
        needles: Sentences, each with the white space before it.
        depths: Of each needle the share of the filler's tokens that stand before it; of equal ones the first needle
            stands first.
    """
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    order = sorted(range(len(needles)), key=lambda index: depths[index])

    def render(num_units: int) -> str:
        total = int(ends[num_units])
        # the boundary between units that is nearest to the depth
        places = [int(np.abs(ends[: num_units + 1] - depths[index] * total).argmin()) for index in order]
        parts, last = [intro], 0
        for index, place in zip(order, places, strict=True):
            parts += units[last:place]
            parts.append(needles[index])
            last = place
        return "".join([*parts, *units[last:num_units]])

    return render


def needle_texts(task: NeedleTask, generator: random.Random) -> tuple[str, list[str], str, str, tuple[str, ...]]:
    """Introduction, needles (those that are asked for first), question, prefix of the answer, and answers."""
    if task.num_needles == 1:
        key = task.value(generator)
        needle = f" The pass key is {key}. Remember it. {key} is the pass key."
        return _PASSKEY_INTRO, [needle], "\n\nWhat is the pass key? ", "The pass key is", (key,)
    kind = "number" if task.key_type == "number" else "UUID"
    values: dict[str, str] = {}
    while len(values) < task.num_needles:
        value = task.value(generator)
        if value not in values.values():
            values.setdefault(random_key(generator), value)
    needles = [f" The magic {kind} of {name} is {value}." for name, value in values.items()]
    asked = list(values)[: task.num_queries]
    names = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
    plural, verb = ("", "is") if len(asked) == 1 else ("s", "are")
    question = f"\n\nWhat {verb} the magic {kind}{plural} of {names}? "
    prefix = f"The magic {kind}{plural} of {names} {verb}"
    return _NEEDLES_INTRO.format(kind=kind), needles, question, prefix, tuple(values[name] for name in asked)
