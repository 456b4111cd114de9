# SPDX-License-Identifier: Apache-2.0
"""LongBench's metrics, after the definitions of https://arxiv.org/abs/2308.14508 and its repository's `metrics.py`.

Where that repository uses other packages the numbers differ a little: its ROUGE-L is that of the package `rouge`, and
Chinese is split by `jieba`; here it is rouge-score's, and Chinese is compared character by character.
"""

import re
import string
from collections.abc import Sequence

from rcc_hf.evaluation.metrics import token_f1
from rcc_hf.evaluation.metrics_text import rouge
from rcc_hf.evaluation.scores import References, Scores, check_lengths, reference_lists, score_each
from rcc_hf.optional import import_optional

__all__ = ["classification", "code_similarity", "f1_characters", "first_lines", "named_number", "rouge_characters"]

_NUMBER = re.compile(r"\d+")
_CJK_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、〃》「」『』【】〔〕〖〗《〈〉–—‘’“”„…‧﹏·"  # noqa: RUF001
)
_PUNCTUATION = str.maketrans("", "", string.punctuation + _CJK_PUNCTUATION)


def first_lines(predictions: Sequence[str]) -> list[str]:
    """Of each prediction the first line that is not empty: all that counts in tasks with examples in the prompt."""
    return [prediction.lstrip("\n").split("\n")[0] for prediction in predictions]


def named_number(predictions: Sequence[str], references: References) -> Scores:
    """The share of numbers in the prediction that are the reference's, as in "Paragraph 7". Name: `accuracy`.

    For passage counts and passage retrieval.
    """

    def score(made: str, right: str) -> float:
        wanted = _NUMBER.findall(right)
        numbers = _NUMBER.findall(made)
        return numbers.count(wanted[0]) / len(numbers) if numbers and wanted else 0.0

    return score_each("accuracy", score, predictions, references)


def classification(predictions: Sequence[str], references: References, classes: Sequence[Sequence[str]]) -> Scores:
    """1 divided by the number of classes that the prediction names, if the right one is among them. Name: `accuracy`.

    A class whose name is part of the right one's does not count as named.

    Args:
        predictions: Texts.
        references: Names of classes.
        classes: Of each example the names of all classes.

    Raises:
        ValueError: an example has no classes.
    """
    check_lengths(predictions, references)
    scores = []
    for index, (made, accepted) in enumerate(zip(predictions, reference_lists(references), strict=True)):
        if not classes[index]:
            raise ValueError(f"example {index} has no classes; LongBench has them in the column all_classes")
        scores.append(max(_named_class(made, right, classes[index]) for right in accepted))
    return Scores({"accuracy": scores})


def _named_class(prediction: str, right: str, classes: Sequence[str]) -> float:
    named = [name for name in classes if name in prediction and (name == right or name not in right)]
    return 1 / len(named) if right in named else 0.0


def code_similarity(predictions: Sequence[str], references: References) -> Scores:
    """Similarity, by insertions and deletions, of the first line that is no comment. Name: `similarity`."""
    ratio = import_optional("rapidfuzz.fuzz").ratio

    def score(made: str, right: str) -> float:
        lines = (line for line in made.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
        return round(ratio(next(lines, ""), right)) / 100

    return score_each("similarity", score, predictions, references)


def _characters(text: str) -> list[str]:
    return list("".join(text.lower().translate(_PUNCTUATION).split()))


def f1_characters(predictions: Sequence[str], references: References) -> Scores:
    """F1 of bags of characters without punctuation, for Chinese. Name: `f1`."""
    return score_each(
        "f1", lambda made, right: token_f1(_characters(made), _characters(right)), predictions, references
    )


def rouge_characters(predictions: Sequence[str], references: References) -> Scores:
    """ROUGE-L over characters, for Chinese. Name: `rougeL`."""
    return rouge(predictions, references, types=["rougeL"], tokenizer=_characters)
