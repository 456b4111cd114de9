# SPDX-License-Identifier: Apache-2.0
"""What stands in metrics.json: scores of a run as a whole, by groups and by task, and what was kept and took time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.scores import Scores
from rcc_hf.evaluation.scoring import SCORERS, score_examples, summarize

__all__ = ["check_metrics", "flat_means", "group_rows", "mean_and_error", "report"]

INSTRUCTION_MATCH = "instruction_match"
"""Column of rows whose answer stands behind an instruction that was to be written down: 1 if that is exact, else 0."""

Means = dict[str, dict[str, float]]
"""Of each metric `mean` and, of more than one example, `stderr`."""


def check_metrics(examples: Sequence[Example]) -> None:
    """Refuse, before a model has worked for hours, what could not be scored afterwards.

    Raises:
        ValueError: there is no example, or a metric is unknown or does not fit its answers.
        ModuleNotFoundError: a metric needs a package that is not installed.
    """
    if not examples:
        raise ValueError("there are no examples to evaluate")
    score_examples(examples, [example.answers[0] for example in examples])


def report(
    examples: Sequence[Example],
    rows: Sequence[Mapping[str, Any]],
    *,
    group_by: Sequence[str] = (),
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The metrics of finished rows.

    Args:
        examples: All of them.
        rows: Of each example the row of the folder, in order.
        group_by: Metadata, beside the task, whose values make groups.
        about: Values that stand first.

    Raises:
        ValueError: an example has no row.
    """
    if [row["index"] for row in rows] != list(range(len(examples))):
        raise ValueError(
            f"{len(rows)} rows for {len(examples)} examples; a process has not finished its share. Run it again"
        )
    predictions = [row["predicted_answer"] for row in rows]
    overall = _means(examples, predictions) | _instructions(rows)
    groups = []
    for key, indices in group_rows(examples, group_by):
        chosen = [examples[index] for index in indices]
        means = _means(chosen, [predictions[index] for index in indices])
        means |= _instructions([rows[index] for index in indices])
        groups.append({**key, "num_examples": len(indices), **means})
    return {
        **about,
        "num_examples": len(examples),
        **flat_means(overall),
        "overall": overall,
        "groups": groups,
        "tasks": summarize(score_examples(examples, predictions)),
        **_kept(examples, rows),
        "seconds": {
            "read": math.fsum(row["read_seconds"] for row in rows),
            "generate": math.fsum(row["generate_seconds"] for row in rows),
        },
    }


def flat_means(means: Means) -> dict[str, float]:
    """The means alone, by metric."""
    return {name: found["mean"] for name, found in means.items()}


def group_rows(examples: Sequence[Example], group_by: Sequence[str]) -> list[tuple[dict[str, Any], list[int]]]:
    """Task and metadata of each group, and the indices of its examples; groups with smaller values first."""
    groups: dict[tuple, tuple[dict[str, Any], list[int]]] = {}
    for index, example in enumerate(examples):
        key = {"task": example.task} | {
            name: example.metadata[name] for name in group_by if example.metadata.get(name) is not None
        }
        groups.setdefault(tuple(key.items()), (key, []))[1].append(index)
    order = list(dict.fromkeys(example.task for example in examples))
    return sorted(groups.values(), key=lambda group: (order.index(group[0]["task"]), _sortable(group[0])))


def _sortable(key: Mapping[str, Any]) -> list[tuple[str, bool, Any]]:
    return [(name, isinstance(value, str), value) for name, value in key.items() if name != "task"]


def _means(examples: Sequence[Example], predictions: Sequence[str]) -> Means:
    """Means over all examples: a metric that several scorers give is the mean over the examples of all of them."""
    chosen: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        chosen.setdefault(example.metric, []).append(index)
    scored = [
        SCORERS[metric]([predictions[index] for index in indices], [examples[index] for index in indices])
        for metric, indices in chosen.items()
    ]
    if len(scored) == 1:
        joined = scored[0]
    else:
        names = dict.fromkeys(name for scores in scored for name in scores.per_example)
        joined = Scores({name: [x for scores in scored for x in scores.per_example.get(name, [])] for name in names})
    errors = joined.stderr
    return {
        name: {"mean": mean} | ({"stderr": errors[name]} if name in errors else {})
        for name, mean in joined.values.items()
    }


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """`mean` and, of more than one value, `stderr`."""
    scores = Scores({"": list(values)})
    return {"mean": scores.values[""]} | ({"stderr": scores.stderr[""]} if scores.stderr else {})


def _instructions(rows: Sequence[Mapping[str, Any]]) -> Means:
    """The share of instructions that were written down exactly, where they were to be."""
    if INSTRUCTION_MATCH not in rows[0]:
        return {}
    return {INSTRUCTION_MATCH: mean_and_error([row[INSTRUCTION_MATCH] for row in rows])}


def _kept(examples: Sequence[Example], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = len(rows)
    found: dict[str, Any] = {
        "nbytes_per_example": sum(row["nbytes"] for row in rows) / count,
        "entries_per_example": sum(row["entries"] for row in rows) / count,
        "context_tokens_per_example": sum(row["context_tokens"] for row in rows) / count,
    }
    for name in ("text_tokens", "scored_tokens"):
        numbers = [example.metadata[name] for example in examples if name in example.metadata]
        if numbers:
            found[name] = sum(numbers)
    return found
