# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench's metrics, after the definitions of https://arxiv.org/abs/2402.13718 and its `compute_scores.py`."""

import re
from collections.abc import Sequence

from rcc_hf.evaluation.scores import References, Scores, check_lengths, reference_lists, score_each

__all__ = ["choice", "contains", "first_integer", "first_number", "last_integer", "leading_numbers", "word"]

_SEPARATORS = re.compile(r"[\n:\"'.,?!{}]")
_CODE_SEPARATORS = re.compile(r"[\n.`'\":]")
_INTEGER = re.compile(r"\d+")
_DECIMAL = re.compile(r"\d+(?:\.\d+)?")
_LAST_OPTION = re.compile(r"\b[A-D]\b(?!.*\b[A-D]\b)", re.DOTALL)
_STATED = re.compile(r"(?:answer is|answer|option is|is)\s*:?\s*")


def first_integer(predictions: Sequence[str], references: References) -> Scores:
    """1 where the first digits of the prediction are the reference (passkey, number_string). Name: `accuracy`."""
    return score_each("accuracy", lambda made, right: _first(_INTEGER, made) == right, predictions, references)


def first_number(predictions: Sequence[str], references: References) -> Scores:
    """1 where the first number has the value of the reference (math_find). Name: `accuracy`."""

    def score(made: str, right: str) -> float:
        found = _first(_DECIMAL, made)
        return float(found != "" and float(found) == float(right))

    return score_each("accuracy", score, predictions, references)


def _first(form: re.Pattern[str], text: str) -> str:
    found = form.search(text)
    return found[0] if found else ""


def word(predictions: Sequence[str], references: References) -> Scores:
    """1 where the reference is a word of the prediction (kv_retrieval). Name: `accuracy`."""
    return score_each(
        "accuracy", lambda made, right: right in _SEPARATORS.sub(" ", made).split(), predictions, references
    )


def contains(predictions: Sequence[str], references: References) -> Scores:
    """1 where the prediction contains a reference, in any case (longdialogue_qa_eng). Name: `accuracy`."""
    return score_each("accuracy", lambda made, right: right.upper() in made.upper(), predictions, references)


def last_integer(predictions: Sequence[str], references: References) -> Scores:
    """1 where the last word is the reference's integer (code_run). Name: `accuracy`."""

    def score(made: str, right: str) -> float:
        words = _CODE_SEPARATORS.sub(" ", made).split()
        return float(bool(words) and re.fullmatch(r"[+-]?\d+", words[-1]) is not None and int(words[-1]) == int(right))

    return score_each("accuracy", score, predictions, references)


def choice(predictions: Sequence[str], references: References) -> Scores:
    """1 where the prediction is the right option (longbook_choice_eng, code_debug). Name: `accuracy`.

    References are the option's text and its letter. What counts is a letter at the beginning, else the option's text
    there, else what follows "answer is" or the like, else the last letter that stands alone.
    """
    check_lengths(predictions, references)
    pairs = zip(predictions, reference_lists(references), strict=True)
    return Scores({"accuracy": [float(_is_choice(made.strip(), right)) for made, right in pairs]})


def _is_choice(prediction: str, accepted: list[str]) -> bool:
    letter = re.match(r"[A-D]\b", prediction)
    if letter:
        return letter[0] in accepted
    stated = _STATED.search(prediction)
    starts = [prediction] + ([prediction[stated.end() :]] if stated else [])
    if any(re.match(rf"{re.escape(right)}(?!\w)", start) for start in starts for right in accepted):
        return True
    last = _LAST_OPTION.search(prediction)
    return last is not None and last[0] in accepted


def leading_numbers(predictions: Sequence[str], references: References) -> Scores:
    """The share of a list of integers that is right before the first mistake (math_calc). Name: `accuracy`."""

    def score(made: str, right: str) -> float:
        found, wanted = _INTEGER.findall(made), _INTEGER.findall(right)
        num_right = 0
        while num_right < min(len(found), len(wanted)) and int(found[num_right]) == int(wanted[num_right]):
            num_right += 1
        return num_right / len(wanted) if wanted else 0.0

    return score_each("accuracy", score, predictions, references)
