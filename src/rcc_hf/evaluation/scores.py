# SPDX-License-Identifier: Apache-2.0
"""What a metric returns: values from 0 to 1 with their spread, and the score of every example."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["References", "Scores", "bootstrap_interval", "check_lengths", "reference_lists", "score_each"]

References = Sequence[str | Sequence[str]]
"""Of each example the accepted answer, or several."""


@dataclass(frozen=True)
class Scores:
    """The scores of one metric, which may have several names, such as rouge1 and rougeL.

    Attributes:
        per_example: Of each name the score of every example, from 0 to 1.
        corpus: Values that are not the mean of the examples' scores, such as corpus BLEU.
        corpus_stderr: Their standard errors.
    """

    per_example: dict[str, list[float]]
    corpus: dict[str, float] = field(default_factory=dict)
    corpus_stderr: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """One number from 0 to 1 for each name."""
        return {name: math.fsum(scores) / len(scores) for name, scores in self.per_example.items()} | self.corpus

    @property
    def stderr(self) -> dict[str, float]:
        """Standard errors of `values`; empty for a single example, which has none."""
        means = {
            name: float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
            for name, scores in self.per_example.items()
            if len(scores) > 1
        }
        return means | self.corpus_stderr

    def summary(self) -> dict[str, float]:
        """`values`, `<name>_stderr` and `num_examples`, as they stand in metrics.json."""
        count = len(next(iter(self.per_example.values())))
        errors = {f"{name}_stderr": error for name, error in self.stderr.items()}
        return {**self.values, **errors, "num_examples": count}

    def __or__(self, other: "Scores") -> "Scores":
        """Both metrics of the same examples."""
        return Scores(
            self.per_example | other.per_example,
            self.corpus | other.corpus,
            self.corpus_stderr | other.corpus_stderr,
        )


def check_lengths(predictions: Sequence[str], references: Sequence[object]) -> None:
    """Refuse what cannot be scored.

    Raises:
        ValueError: there is nothing, or not as many predictions as references.
        TypeError: `predictions` is a single string.
    """
    if isinstance(predictions, str):
        raise TypeError("predictions is one string; give a list of them")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one for each")
    if not predictions:
        raise ValueError("there are no predictions to score")


def reference_lists(references: References) -> list[list[str]]:
    """Every entry as a list.

    Raises:
        ValueError: an example has no reference.
    """
    lists = [[entry] if isinstance(entry, str) else list(entry) for entry in references]
    for index, entry in enumerate(lists):
        if not entry:
            raise ValueError(f"example {index} has no reference; give at least one accepted answer")
    return lists


def score_each(
    name: str, score: Callable[[str, str], float], predictions: Sequence[str], references: References
) -> Scores:
    """For each example the best score that `score(prediction, reference)` gives over its references."""
    check_lengths(predictions, references)
    pairs = zip(predictions, reference_lists(references), strict=True)
    return Scores({name: [max(float(score(made, right)) for right in accepted) for made, accepted in pairs]})


def bootstrap_interval(
    scores: Sequence[float], confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean.

    Raises:
        ValueError: there are no scores, or the confidence is not between 0 and 1.
    """
    if not len(scores):
        raise ValueError("there are no scores to resample")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1")
    values = np.asarray(scores, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
