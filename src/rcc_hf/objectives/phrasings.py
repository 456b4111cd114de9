# SPDX-License-Identifier: Apache-2.0
"""How needles are worded and asked for: as evaluation does, as RULER does, and in other ways."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rcc_hf.evaluation.fillers import RepetitiveFiller
from rcc_hf.evaluation.needles import NeedleTask, needle_texts
from rcc_hf.evaluation.ruler_needles import Retrieval
from rcc_hf.evaluation.vocabulary import NOUNS, random_key, random_number, random_uuid

__all__ = ["PHRASINGS", "Phrasing", "Planted"]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What is hidden in a text, and what is asked.

    Attributes:
        intro: Stands in front of the text.
        needles: Sentences in the order in which they stand there, each with the white space before it.
        question: Follows the text.
        answer_prefix: How the answer begins.
        answers: What is asked for, in the order of the question.
    """

    intro: str
    needles: tuple[str, ...]
    question: str
    answer_prefix: str
    answers: tuple[str, ...]


Phrasing = Callable[[random.Random, int], Planted]
"""Makes needles, at most so many."""


@dataclass(frozen=True, kw_only=True)
class _Wording:
    """Sentences with `{key}`, `{keys}` and `{value}`; those of the question for one value, and for several."""

    needle: str
    one: tuple[str, str]
    several: tuple[str, str]
    separator: str = " "


_WORDINGS = (
    _Wording(
        needle="The access code of {key} is {value}.",
        one=("What is the access code of {keys}?", "The access code of {keys} is"),
        several=("What are the access codes of {keys}?", "The access codes of {keys} are"),
    ),
    _Wording(
        needle="Remember this: {key} has been given {value}.",
        one=("What has {keys} been given?", "Answer:"),
        several=("What have {keys} been given, one after the other?", "Answer:"),
    ),
    _Wording(
        needle='"{key}": "{value}",',
        one=('Which value belongs to the key "{keys}"?', "The value is"),
        several=('Which values belong to the keys "{keys}"?', "The values are"),
        separator="\n",
    ),
    _Wording(
        needle="(Note to the reader: {value} is the secret of {key}.)",
        one=("The text has a note about {keys}. Write down the secret.", ""),
        several=("The text has notes about {keys}. Write down their secrets.", ""),
    ),
    _Wording(
        needle="The locker of {key} opens with {value}, and with nothing else.",
        one=("With what does the locker of {keys} open?", "It opens with"),
        several=("With what do the lockers of {keys} open?", "They open with"),
        separator="\n\n",
    ),
)
_KINDS: tuple[Callable[[random.Random], str], ...] = (
    lambda generator: random_number(generator, generator.randint(5, 7)),
    lambda generator: generator.choice(NOUNS),
    random_key,
    random_uuid,
)


def passkey(generator: random.Random, max_needles: int) -> Planted:
    """Evaluation's pass key."""
    return _of_task(generator, num_needles=1, num_queries=1)


def needles(generator: random.Random, max_needles: int) -> Planted:
    """Evaluation's needles; a pass key where there may be one only."""
    count = generator.randint(min(2, max_needles), max_needles)
    return _of_task(generator, num_needles=count, num_queries=_num_queries(generator, count))


def ruler(generator: random.Random, max_needles: int) -> Planted:
    """RULER's keys and values, with one or several values of each key."""
    values_per_key = generator.choice([1, 1, 1, min(max_needles, 4)])
    num_keys = generator.randint(1, max(1, max_needles // values_per_key))
    kinds = {name: generator.choice(["words", "numbers", "uuids"]) for name in ("keys", "values")}
    task = Retrieval(
        haystack="essay",
        **cast(Any, kinds),
        num_keys=num_keys,
        num_values=values_per_key,
        num_queries=_num_queries(generator, num_keys),
    )
    found = task.pairs(generator)
    queries = generator.sample(list(found), task.num_queries)
    pairs = [(key, value) for key, values in found.items() for value in values]
    generator.shuffle(pairs)
    intro, question, prefix = task.prompt(queries)
    return Planted(
        intro=f"{intro}\n",
        needles=tuple(" " + task.needle(key, value) for key, value in pairs),
        question="\n" + question,
        answer_prefix=prefix,
        # several values of one key in the order of the text: nothing else tells which comes first
        answers=tuple(value for query in queries for key, value in pairs if key == query),
    )


def varied(generator: random.Random, max_needles: int) -> Planted:
    """Other words, without an introduction."""
    wording, kind = generator.choice(_WORDINGS), generator.choice(_KINDS)
    key_kind = generator.choice((random_key, random_key, random_uuid))
    count = generator.randint(1, max_needles)
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        key, value = key_kind(generator), kind(generator)
        if key not in pairs and value not in pairs.values():
            pairs[key] = value
    asked = generator.sample(list(pairs), _num_queries(generator, count))
    question, prefix = wording.one if len(asked) == 1 else wording.several
    listed = _listed(asked)
    return Planted(
        intro="",
        needles=tuple(wording.separator + wording.needle.format(key=k, value=v) for k, v in pairs.items()),
        question=f"\n\n{question.format(keys=listed)}\n",
        answer_prefix=prefix.format(keys=listed),
        answers=tuple(pairs[key] for key in asked),
    )


PHRASINGS: dict[str, Phrasing] = {"passkey": passkey, "needles": needles, "ruler": ruler, "varied": varied}
"""Those of evaluation's tasks of the same names, and `varied`."""


def _of_task(generator: random.Random, *, num_needles: int, num_queries: int) -> Planted:
    task = NeedleTask(
        filler=RepetitiveFiller(),  # which the words do not depend on
        key_type=generator.choice(("number", "number", "uuid")),
        num_needles=num_needles,
        num_queries=num_queries,
        num_digits=generator.randint(5, 7),
    )
    intro, sentences, question, prefix, answers = needle_texts(task, generator)
    generator.shuffle(sentences)  # those that are asked for came first
    return Planted(
        intro=intro, needles=tuple(sentences), question=question, answer_prefix=prefix, answers=tuple(answers)
    )


def _num_queries(generator: random.Random, count: int) -> int:
    """One, all, or some."""
    return generator.choice((1, count, generator.randint(1, count)))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
