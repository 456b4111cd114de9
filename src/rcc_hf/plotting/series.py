# SPDX-License-Identifier: Apache-2.0
"""What belongs in one figure: results of one task, its metric, and points of one method as a line."""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcc_hf.plotting.labels import method_text, ratio_text
from rcc_hf.plotting.results import Result, Value, to_value

__all__ = ["REFERENCES", "Panel", "Series", "choose_metric", "pooled", "split_by_ratio", "split_panels", "split_series"]

REFERENCES = ("full", "none", "wrong")
"""Methods without a ratio: their results are lines to compare with. The same whatever ratio a run was given."""

PREFERRED = ("bleu4", "f1", "accuracy", "string_match", "exact_match", "rougeL", "perplexity")
"""Metrics of which the first is drawn where none was asked for."""


@dataclass(frozen=True)
class Panel:
    """All results of one task, on the same data."""

    task: str
    data: str | None
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Series:
    """Results that make up a line.

    Attributes:
        label: In the legend.
        method: Which gives the line its colour.
        variant: How many lines of the same method come before it.
        results: By ratio.
    """

    label: str
    method: str
    variant: int
    results: tuple[Result, ...]


def split_panels(results: Sequence[Result]) -> list[Panel]:
    """The results by task and data, in order of first appearance."""
    found: dict[tuple[str, str | None], list[Result]] = defaultdict(list)
    for result in results:
        found[result.task, result.data].append(result)
    return [Panel(task, data, tuple(rows)) for (task, data), rows in found.items()]


def split_series(panel: Panel) -> list[Series]:
    """One line for each method, or for each of its models if it has several.

    Raises:
        ValueError: a method without a ratio has two results that differ.
    """
    return _lines(panel, by_ratio=False)


def split_by_ratio(panel: Panel) -> list[Series]:
    """One line for each method, model and ratio.

    Raises:
        ValueError: a method without a ratio has two results that differ.
    """
    return _lines(panel, by_ratio=True)


def _lines(panel: Panel, *, by_ratio: bool) -> list[Series]:
    found: dict[tuple[str, str, float | None], list[Result]] = defaultdict(list)
    for result in sorted(panel.results, key=_order):
        is_bounded = result.method not in REFERENCES
        found[result.method, result.model, result.ratio if by_ratio and is_bounded else None].append(result)
    models: dict[str, list[str]] = defaultdict(list)
    variants: dict[str, int] = defaultdict(int)
    for method, model, _ in found:
        models[method] += [model] if model not in models[method] else []
    lines = []
    for (method, model, ratio), rows in found.items():
        label = method_text(method)
        label += "" if ratio is None else f" {ratio_text(ratio)}"
        label += "" if len(models[method]) == 1 else f", {model.rstrip('/').rsplit('/', 1)[-1]}"
        kept = _one_reference(rows) if method in REFERENCES else rows
        lines.append(Series(label, method, variants[method], tuple(kept)))
        variants[method] += 1
    return lines


def _order(result: Result) -> tuple:
    """Ours, then the references, then the others by name."""
    rank = 0 if result.method == "rcc" or result.method.startswith("rcc-") else 1 + (result.method not in REFERENCES)
    return rank, result.method, result.model, result.ratio or 0


def _one_reference(rows: list[Result]) -> list[Result]:
    """One of several runs that a ratio made no difference to."""
    for other in rows[1:]:
        if (other.overall, other.groups) != (rows[0].overall, rows[0].groups):
            raise ValueError(
                f"{rows[0].file} and {other.file} are both of the method {other.method!r}, which has no ratio, "
                "and differ; give one of them"
            )
    return rows[:1]


def choose_metric(panel: Panel, metric: str | None) -> str | None:
    """The metric that a figure of the panel shows; None if the panel has none, or not the one asked for.

    Args:
        panel: The results.
        metric: Asked for; None to choose a usual one.

    Raises:
        ValueError: some results have it and others do not.
    """
    sets = [set(result.overall) for result in panel.results]
    if metric is None:
        common = [name for name in panel.results[0].overall if all(name in names for names in sets)]
        metric = next((name for name in PREFERRED if name in common), common[0] if common else None)
        if metric is None and any(sets):
            files = "; ".join(f"{row.file}: {', '.join(row.overall) or 'none'}" for row in panel.results)
            raise ValueError(f"the results of task {panel.task!r} have no metric in common ({files})")
        return metric
    lacking = next((row for row in panel.results if metric not in row.overall), None)
    if lacking is None:
        return metric
    if any(metric in names for names in sets):
        has = ", ".join(lacking.overall) or "none"
        raise ValueError(f"{lacking.file} has no metric {metric!r} (it has: {has}), other results of its task do")
    return None


def pooled(
    result: Result, names: Sequence[str], metric: str, *, required: bool = True
) -> Mapping[tuple[Any, ...], Value]:
    """The metric of the result's groups by some of their metadata.

    Groups that differ in other metadata alone are averaged, weighted by their numbers of examples.

    Args:
        result: With groups.
        names: Of the metadata.
        metric: In the groups.
        required: Whether a group that has the metadata must have the metric.

    Raises:
        ValueError: a group with the metadata lacks the metric, or metadata are no numbers.
    """
    found: dict[tuple[Hashable, ...], list[tuple[float, Value]]] = defaultdict(list)
    for index, group in enumerate(result.groups):
        if any(group.get(name) is None for name in names):
            continue
        where = f"{result.file}: group {index}"
        if required and metric not in group:
            raise ValueError(f"{where} has no {metric!r}; it has {', '.join(group)}")
        places = [to_value(group[name], f"{where}, {name}") for name in names]
        value = to_value(group.get(metric), f"{where}, {metric}")
        if value is not None:
            key = tuple(place.mean for place in places if place is not None)
            found[key].append((group.get("num_examples") or 1, value))
    return {key: _average(found[key]) for key in sorted(found)}


def _average(weighted: Sequence[tuple[float, Value]]) -> Value:
    if len(weighted) == 1:
        return weighted[0][1]
    total = math.fsum(weight for weight, _ in weighted)
    mean = math.fsum(weight * value.mean for weight, value in weighted) / total
    errors = [weight * value.stderr for weight, value in weighted if value.stderr is not None]
    stderr = math.hypot(*errors) / total if len(errors) == len(weighted) else None
    return Value(mean, stderr)
