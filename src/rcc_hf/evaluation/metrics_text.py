# SPDX-License-Identifier: Apache-2.0
"""Metrics of longer texts: BLEU-4, edit distance, ROUGE, and the three that a reconstruction is judged by."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np

from rcc_hf.evaluation.metrics import exact_match
from rcc_hf.evaluation.scores import References, Scores, check_lengths, reference_lists, score_each
from rcc_hf.optional import import_optional

__all__ = ["bleu", "edit_distance", "levenshtein", "reconstruction", "rouge"]

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


def bleu(
    predictions: Sequence[str],
    references: References,
    *,
    tokenize: str = "13a",
    num_resamples: int = 200,
    seed: int = 0,
) -> Scores:
    """BLEU-4 of sacrebleu, from 0 to 1. Name: `bleu4`.

    The value is corpus BLEU (counts are summed before they are divided); its standard error is that of a bootstrap over
    examples. Scores of single examples are sentence BLEU, whose mean is another number.

    Args:
        predictions: Texts.
        references: Texts.
        tokenize: Tokenizer of sacrebleu; 13a splits off punctuation.
        num_resamples: Of the bootstrap; 0 for none.
        seed: Of the bootstrap.

    Raises:
        ModuleNotFoundError: sacrebleu is not installed.
    """
    check_lengths(predictions, references)
    metric_class = import_optional("sacrebleu").BLEU
    whole = metric_class(tokenize=tokenize)
    single = metric_class(tokenize=tokenize, effective_order=True)
    statistics, sentences = [], []
    for made, accepted in zip(predictions, reference_lists(references), strict=True):
        counted = whole.corpus_score([made], [[reference] for reference in accepted])
        statistics.append([counted.sys_len, counted.ref_len, *counted.counts, *counted.totals])
        sentences.append(_share(single.sentence_score(made, accepted)))
    table = np.array(statistics, dtype=np.int64)
    stderr = {}
    if num_resamples and len(table) > 1:
        generator = np.random.default_rng(seed)
        draws = [table[generator.integers(len(table), size=len(table))].sum(axis=0) for _ in range(num_resamples)]
        stderr = {"bleu4": float(np.std([_bleu(metric_class, draw) for draw in draws], ddof=1))}
    return Scores({"bleu4": sentences}, {"bleu4": _bleu(metric_class, table.sum(axis=0))}, stderr)


def _bleu(metric_class: Any, statistics: np.ndarray) -> float:
    """BLEU of summed statistics: both lengths, then the four counts and the four totals."""
    length, reference_length, *counts = map(int, statistics)
    score = metric_class.compute_bleu(counts[:4], counts[4:], length, reference_length, smooth_method="exp")
    return _share(score)


def _share(score: Any) -> float:
    """From 0 to 1; sacrebleu gives 100.00000000000004 for what is perfect."""
    return min(1.0, float(score.score) / 100)


def edit_distance(
    predictions: Sequence[str], references: References, *, unit: Literal["character", "word"] = "character"
) -> Scores:
    """Levenshtein distance over the length of the longer text. Names: `edit_distance`, `edit_similarity` (1 - it).

    Of several references the nearest counts.

    Raises:
        ValueError: the unit is unknown.
    """
    if unit not in ("character", "word"):
        raise ValueError(f"unit is {unit!r}; it must be 'character' or 'word'")
    split: Callable[[str], Sequence[Hashable]] = str.split if unit == "word" else str
    similarity = score_each(
        "edit_similarity", lambda made, right: 1 - levenshtein(split(made), split(right)), predictions, references
    )
    return Scores({"edit_distance": [1 - score for score in similarity.per_example["edit_similarity"]]}) | similarity


def levenshtein(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Insertions, deletions and substitutions between two sequences, over the length of the longer: from 0 to 1.

    Strings are compared by characters, lists (of token ids, for instance) by elements.

    Raises:
        ModuleNotFoundError: rapidfuzz is not installed.
    """
    distance = import_optional("rapidfuzz.distance").Levenshtein
    return float(distance.normalized_distance(first, second))


def rouge(
    predictions: Sequence[str],
    references: References,
    *,
    types: Sequence[str] = ROUGE_TYPES,
    stemmer: bool = False,
    tokenizer: Callable[[str], list[str]] | None = None,
) -> Scores:
    """F-measures of rouge-score, each the best over the references. Names: those of `types`.

    Args:
        predictions: Texts.
        references: Texts.
        types: rouge1, rouge2, ..., rougeL, rougeLsum (sentences on lines of their own).
        stemmer: Whether words are stemmed (Porter) first.
        tokenizer: What splits a text into words, instead of rouge-score's, which sees a to z and digits only.

    Raises:
        ModuleNotFoundError: rouge-score is not installed.
    """
    check_lengths(predictions, references)
    module = import_optional("rouge_score.rouge_scorer")
    scorer = module.RougeScorer(list(types), use_stemmer=stemmer, tokenizer=tokenizer and _Tokenizer(tokenizer))
    scored = [
        scorer.score_multi(accepted, made)
        for made, accepted in zip(predictions, reference_lists(references), strict=True)
    ]
    return Scores({name: [float(score[name].fmeasure) for score in scored] for name in types})


class _Tokenizer:
    """A function in the clothes that rouge-score expects."""

    def __init__(self, tokenize: Callable[[str], list[str]]):
        self.tokenize = tokenize


def reconstruction(predictions: Sequence[str], references: References) -> Scores:
    """BLEU-4, exact match and edit distance of a text that was to be read back from memory.

    Names: `bleu4`, `exact_match`, `edit_distance`, `edit_similarity`.
    """
    scores = bleu(predictions, references) | exact_match(predictions, references)
    return scores | edit_distance(predictions, references)
