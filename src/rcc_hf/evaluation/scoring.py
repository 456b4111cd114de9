# SPDX-License-Identifier: Apache-2.0
"""Scores the predictions of a run: each example by the metric that it names, averaged by task."""

from collections.abc import Callable, Sequence
from functools import partial

from rcc_hf.evaluation import metrics, metrics_infinitebench, metrics_leval, metrics_longbench, metrics_text
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.scores import References, Scores, check_lengths

__all__ = ["METRICS", "SCORERS", "score_examples", "summarize"]

Metric = Callable[[Sequence[str], References], Scores]
Scorer = Callable[[Sequence[str], Sequence[Example]], Scores]

METRICS: dict[str, Metric] = {
    "exact_match": metrics.exact_match,
    "squad": metrics.squad,
    "string_match_all": metrics.string_match_all,
    "string_match_part": metrics.string_match_part,
    "passkey": metrics.passkey,
    "bleu": metrics_text.bleu,
    "edit_distance": metrics_text.edit_distance,
    "rouge": metrics_text.rouge,
    "rouge_stemmed": partial(metrics_text.rouge, stemmer=True),
    "reconstruction": metrics_text.reconstruction,
    "longbench_rouge": partial(metrics_text.rouge, types=["rougeL"]),
    "longbench_f1_zh": metrics_longbench.f1_characters,
    "longbench_rouge_zh": metrics_longbench.rouge_characters,
    "longbench_number": metrics_longbench.named_number,
    "longbench_code": metrics_longbench.code_similarity,
    "leval_choice": metrics_leval.choice,
    "leval_choices": metrics_leval.choices,
    "leval_number": metrics_leval.last_number,
    "leval_contains": metrics_leval.contains,
    "leval_code": metrics_leval.code_output,
    "leval_true_false": metrics_leval.true_false,
    "infinitebench_integer": metrics_infinitebench.first_integer,
    "infinitebench_number": metrics_infinitebench.first_number,
    "infinitebench_word": metrics_infinitebench.word,
    "infinitebench_contains": metrics_infinitebench.contains,
    "infinitebench_code_run": metrics_infinitebench.last_integer,
    "infinitebench_choice": metrics_infinitebench.choice,
    "infinitebench_calculation": metrics_infinitebench.leading_numbers,
    "infinitebench_summary": partial(metrics_text.rouge, types=["rougeLsum"]),
}
"""Metrics that need predictions and references only."""


def _of_answers(metric: Metric, predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
    return metric(predictions, [example.answers for example in examples])


def _first_line(metric: Metric, predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
    return _of_answers(metric, metrics_longbench.first_lines(predictions), examples)


def _classification(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
    classes = [example.metadata.get("all_classes") or () for example in examples]
    references = [example.answers for example in examples]
    return metrics_longbench.classification(metrics_longbench.first_lines(predictions), references, classes)


SCORERS: dict[str, Scorer] = {name: partial(_of_answers, metric) for name, metric in METRICS.items()} | {
    "longbench_f1_first_line": partial(_first_line, metrics.squad),
    "longbench_rouge_first_line": partial(_first_line, METRICS["longbench_rouge"]),
    "longbench_class": _classification,
}
"""What `Example.metric` can name."""


def score_examples(examples: Sequence[Example], predictions: Sequence[str]) -> dict[str, Scores]:
    """The scores of each task, in order of first appearance.

    Raises:
        ValueError: there are not as many predictions as examples, a metric is unknown, or a task has two.
    """
    check_lengths(predictions, examples)
    rows: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        rows.setdefault(example.task, []).append(index)
    scores = {}
    for task, indices in rows.items():
        names = sorted({examples[index].metric for index in indices})
        if len(names) > 1:
            raise ValueError(f"task {task!r} has the metrics {', '.join(names)}; a task is scored by one")
        if names[0] not in SCORERS:
            raise ValueError(f"task {task!r} has the metric {names[0]!r}; it must be one of {', '.join(SCORERS)}")
        chosen = [examples[index] for index in indices]
        scores[task] = SCORERS[names[0]]([predictions[index] for index in indices], chosen)
    return scores


def summarize(scores: dict[str, Scores]) -> dict[str, dict[str, float]]:
    """What stands in metrics.json: for each task its metrics, their standard errors, and the number of examples."""
    return {task: score.summary() for task, score in scores.items()}
