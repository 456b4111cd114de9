# SPDX-License-Identifier: Apache-2.0
"""L-Eval's metrics of closed-ended tasks, after the definitions of https://arxiv.org/abs/2307.11088.

An answer that names no option scores 0; L-Eval's own script guesses "A" for it.
"""

import re
from collections.abc import Sequence

from rcc_hf.evaluation.scores import References, Scores, score_each

__all__ = ["choice", "choices", "code_output", "contains", "last_number", "true_false"]

_OPTION = re.compile(r"[A-D]")
_LEADING_OPTIONS = re.compile(r"\s*([A-D]+)")
_MARKED_OPTION = re.compile(r"(?<![A-Za-z])[A-D](?=[\s.,)]|$)")
_STATED = re.compile(r"The answer is (\S+)")
# Words around the output of a program that carry none of it.
_FILLING = re.compile(r"will be|would be|of the code|the value of|the result of|printed|\bis\b")


def choice(predictions: Sequence[str], references: References) -> Scores:
    """1 where the first option letter of the prediction is that of the reference ("(B) ..."). Name: `exact_match`."""

    def score(made: str, right: str) -> float:
        named = _OPTION.search(made)
        return float(named is not None and named[0] == _right_options(right))

    return score_each("exact_match", score, predictions, references)


def choices(predictions: Sequence[str], references: References) -> Scores:
    """Several options can be right: 1 for exactly these, a quarter for some of them and no other. Name: `exact_match`.

    Letters at the beginning ("BD") count if there are two or more, else those that stand alone before the next
    question.
    """

    def score(made: str, right: str) -> float:
        named, wanted = set(_named_options(made)), set(_right_options(right))
        return 1.0 if named == wanted else 0.25 * float(bool(named) and named < wanted)

    return score_each("exact_match", score, predictions, references)


def _right_options(reference: str) -> str:
    return "".join(_OPTION.findall((reference.split() or [""])[0]))


def _named_options(prediction: str) -> str:
    leading = _LEADING_OPTIONS.match(prediction)
    if leading and len(leading[1]) > 1:
        return leading[1]
    return "".join(_MARKED_OPTION.findall(prediction.split("Question")[0]))


def last_number(predictions: Sequence[str], references: References) -> Scores:
    """1 where the whole number after "The answer is", or the last of the first paragraph, is right.

    Name: `exact_match`.
    """
    return score_each("exact_match", lambda made, right: _whole(made) == _whole(right) != "", predictions, references)


def _whole(text: str) -> str:
    stated = _STATED.search(text)
    words = [stated[1]] if stated else text.split("\n\n")[0].split()[::-1]
    word = next((word for word in words if any(map(str.isdigit, word))), "")
    return re.sub(r"\D", "", word.split(".")[0])


def contains(predictions: Sequence[str], references: References) -> Scores:
    """1 where the prediction contains the reference, whatever spaces and case. Name: `exact_match`."""
    return score_each("exact_match", lambda made, right: _squeezed(right) in _squeezed(made), predictions, references)


def _squeezed(text: str) -> str:
    return text.lower().replace(" ", "")


def code_output(predictions: Sequence[str], references: References) -> Scores:
    """1 where the output of a program stands at the end, or behind "the final output". Name: `exact_match`."""

    def score(made: str, right: str) -> float:
        wanted = _plain_output(right)
        made = _FILLING.sub("", _plain_output(made))
        _, marker, after = made.rpartition("the final output")
        number = len(right.split()) + 3
        words = after.split()[:number] if marker else made.split()[-number:]
        return float(bool(wanted) and _squeezed(wanted) in _squeezed(" ".join(words)))

    return score_each("exact_match", score, predictions, references)


def _plain_output(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"[,'\\]|\.0", "", text)
    return re.sub(r"(?<=[\[\]]) (?=[\[\]])", "", text)


def true_false(predictions: Sequence[str], references: References) -> Scores:
    """References are "True [fact: False]": what holds in the story, and in the world.

    Names: `loyalty`, `fact`, and `exact_match`, their mean.
    """
    loyalty = score_each(
        "loyalty", lambda made, right: _judge(made, 0) == _judge(right, 0) != "", predictions, references
    )
    fact = score_each("fact", lambda made, right: _judge(made, 1) == _judge(right, 1) != "", predictions, references)
    pairs = zip(loyalty.per_example["loyalty"], fact.per_example["fact"], strict=True)
    return Scores({"exact_match": [(first + second) / 2 for first, second in pairs]}) | loyalty | fact


def _judge(text: str, part: int) -> str:
    parts = text.lower().split("[fact:")
    found = re.search(r"true|false", parts[part]) if part < len(parts) else None
    return found[0] if found else ""
