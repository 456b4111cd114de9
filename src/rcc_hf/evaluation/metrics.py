# SPDX-License-Identifier: Apache-2.0
"""Metrics of short answers: exact match, SQuAD's exact match and F1, RULER's string matches, pass keys."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from rcc_hf.evaluation.scores import References, Scores, check_lengths, reference_lists, score_each

__all__ = [
    "exact_match",
    "normalize_answer",
    "passkey",
    "squad",
    "string_match_all",
    "string_match_part",
    "token_f1",
]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CONTROL = re.compile(r"[\x00-\x1f]")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


def exact_match(predictions: Sequence[str], references: References) -> Scores:
    """1 where a prediction equals a reference, but for white space around it. Name: `exact_match`."""
    return score_each("exact_match", lambda made, right: made.strip() == right.strip(), predictions, references)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space (SQuAD, https://arxiv.org/abs/1606.05250).

    Punctuation is ASCII's, and is removed before the articles, as in SQuAD's own script.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad(predictions: Sequence[str], references: References) -> Scores:
    """SQuAD's exact match and F1, each the best over the accepted answers. Names: `exact_match`, `f1`."""
    equal = score_each(
        "exact_match",
        lambda made, right: normalize_answer(made) == normalize_answer(right),
        predictions,
        references,
    )
    return equal | score_each(
        "f1",
        lambda made, right: token_f1(normalize_answer(made).split(), normalize_answer(right).split()),
        predictions,
        references,
    )


def token_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of tokens.

    If one is empty (an answer "The", normalised), it is 1 where both are: SQuAD 2.0's rule
    (https://arxiv.org/abs/1806.03822).
    """
    if not prediction or not reference:
        return float(list(prediction) == list(reference))
    common = (Counter(prediction) & Counter(reference)).total()
    return 2 * common / (len(prediction) + len(reference))


def string_match_all(predictions: Sequence[str], references: References) -> Scores:
    """The share of an example's answers that its prediction contains, in any case of letters. Name: `string_match`.

    RULER's metric of every task but question answering (https://arxiv.org/abs/2404.06654).
    """
    check_lengths(predictions, references)
    pairs = zip(map(_printable, predictions), reference_lists(references), strict=True)
    return Scores({"string_match": [sum(map(made.__contains__, map(str.lower, r))) / len(r) for made, r in pairs]})


def string_match_part(predictions: Sequence[str], references: References) -> Scores:
    """1 where the prediction contains one of the answers, in any case of letters. Name: `string_match`.

    RULER's metric of question answering.
    """
    return score_each("string_match", lambda made, right: right.lower() in _printable(made), predictions, references)


def _printable(text: str) -> str:
    return _CONTROL.sub("\n", text.strip()).strip().lower()


def passkey(predictions: Sequence[str], references: References) -> Scores:
    """1 where the first number, or UUID, of the prediction is the key that was asked for. Name: `accuracy`.

    What is looked for has the form of the reference, so that a number inside a UUID, or a key that merely contains the
    right digits, does not count.

    Raises:
        ValueError: a reference is neither a number nor a UUID.
    """
    return score_each("accuracy", _is_key, predictions, references)


def _is_key(prediction: str, key: str) -> bool:
    form = next((form for form in (_NUMBER, _UUID) if form.fullmatch(key)), None)
    if form is None:
        raise ValueError(f"the key {key!r} is neither digits nor a UUID; use string_match_all for other answers")
    found = form.search(prediction)
    return found is not None and found[0].lower() == key.lower()
