# SPDX-License-Identifier: Apache-2.0
"""Results of `rcc evaluate` as tables of Markdown: a row for each method and ratio, a column for each length."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rcc_hf.plotting.labels import metric_text, task_text, tokens_text
from rcc_hf.plotting.results import Result, Value, read_results
from rcc_hf.plotting.series import Panel, choose_metric, pooled, split_by_ratio, split_panels

__all__ = ["markdown_table", "result_tables"]

_COLUMNS = {"length": "tokens of context", "history": "tokens of history"}


def result_tables(paths: Iterable[str | Path]) -> str:
    """A table with a line about it for each task that has a metric.

    Args:
        paths: metrics.json files, or folders that hold some.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is no result, or two are of the same method, ratio, model and task.
    """
    panels = sorted(split_panels(read_results(paths)), key=lambda panel: (panel.task, panel.data or ""))
    return "\n".join(text for panel in panels if (text := _table(panel)))


def _table(panel: Panel) -> str:
    metric = choose_metric(panel, None)
    if metric is None:
        return ""
    rows = [(line.label, result) for line in split_by_ratio(panel) for result in line.results]
    name, points = _points([result for _, result in rows], metric)
    keys = sorted({key for found in points for key in found})
    keys = keys if len(keys) > 1 else []
    table = [
        [label, *(_number(found.get(key)) for key in keys), _with_error(result.overall[metric]), _megabytes(result)]
        for (label, result), found in zip(rows, points, strict=True)
    ]
    counts = sorted({result.num_examples for _, result in rows if result.num_examples})
    about = f"**{task_text(panel.task, panel.data)}**: {metric_text(metric)}"
    about += f" by {_COLUMNS[name]}" if keys else ""
    about += (
        f"; {' to '.join(f'{count:,}' for count in dict.fromkeys((counts[0], counts[-1])))} examples" if counts else ""
    )
    head = ["method", *(tokens_text(key) for key in keys), "all", "MB kept"]
    return f"{about}.\n\n{markdown_table(head, table)}"


def _points(results: Sequence[Result], metric: str) -> tuple[str, list[dict[float, Value]]]:
    """What columns stand for, and of each result the values in them."""
    for name in _COLUMNS:
        points = [{key[0]: value for key, value in pooled(result, [name], metric).items()} for result in results]
        if any(points):
            return name, points
    return "length", [{} for _ in results]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with its end of line; a sign that would end a cell is put differently."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _number(value: Value | None) -> str:
    return "" if value is None else f"{value.mean:.3f}" if value.mean < 10 else f"{value.mean:.1f}"


def _with_error(value: Value) -> str:
    if value.stderr is None:
        return _number(value)
    return f"{_number(value)} ± {value.stderr:.3f}" if value.mean < 10 else f"{_number(value)} ± {value.stderr:.1f}"


def _megabytes(result: Result) -> str:
    return "" if result.nbytes is None else f"{result.nbytes / 1e6:.1f}"
