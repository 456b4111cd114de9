# SPDX-License-Identifier: Apache-2.0
"""Time and memory against the length of the context, and perplexity against the history that a model has."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rcc_hf.plotting.axes import bytes_axis, number_axis, values_axis
from rcc_hf.plotting.labels import bytes_text, metric_text, task_text, tokens_text
from rcc_hf.plotting.results import Value
from rcc_hf.plotting.series import Panel, Series, pooled, split_by_ratio
from rcc_hf.plotting.styles import GREY, Style, add_legend, new_figure

__all__ = ["plot_cost", "plot_perplexity"]

COSTS = {
    "time_to_first_token": "time to first token (s)",
    "decode_tokens_per_second": "decoding (tokens/s)",
    "peak_bytes": "peak memory",
    "nbytes": "memory kept of the context",
}

Curve = Mapping[tuple, Value]


def plot_cost(panel: Panel, styles: Mapping[str, Style], title: str | None = None) -> Figure | None:
    """What reading and answering cost by length, a panel for each of `COSTS` that was measured; None if none was.

    Zeros, such as the bytes of no context, have no place on a logarithmic axis and are left out there.
    """
    lines = split_by_ratio(panel)
    measured = {name: curves for name in COSTS if any(curves := _costs(lines, name))}
    if not measured:
        return None
    rows, columns = (len(measured) + 1) // 2, min(2, len(measured))
    figure, all_axes = new_figure(title or task_text("cost", panel.data), 1.3 + 2.7 * rows, rows, columns)
    handles: dict[str, Line2D] = {}
    for axes, (name, curves) in zip(all_axes, measured.items(), strict=False):
        handles |= _draw(axes, lines, curves, styles)
        values = [value.mean for curve in curves for value in curve.values()]
        bytes_axis(axes, "y", values, bytes_text) if name.endswith("bytes") else number_axis(axes, values)
        values_axis(axes, [key[0] for curve in curves for key in curve], tokens_text)
        axes.set_title(COSTS[name], loc="left")
        axes.set_xlabel("length of the context (tokens)")
    for axes in all_axes[len(measured) :]:
        axes.remove()
    add_legend(figure, [handles[line.label] for line in lines if line.label in handles])
    return figure


def plot_perplexity(panel: Panel, metric: str, styles: Mapping[str, Style], title: str | None = None) -> Figure | None:
    """`perplexity` or `nll` by tokens of history; None if no group has a history.

    Raises:
        ValueError: a group with a history lacks the metric.
    """
    lines = split_by_ratio(panel)
    curves = _curves(lines, "history", metric, required=True)
    if not any(curves):
        return None
    figure, (axes,) = new_figure(title or f"{task_text(panel.task, panel.data)} against history", height=4.7)
    handles = _draw(axes, lines, curves, styles)
    values_axis(axes, [key[0] for curve in curves for key in curve], tokens_text)
    axes.set_xlabel("history (tokens in front of the text that is predicted)")
    axes.set_ylabel(metric_text(metric))
    if any(value.stderr for curve in curves for value in curve.values()):
        axes.set_title("bars: \N{PLUS-MINUS SIGN} 1 standard error", loc="left", color=GREY, fontsize=9.5)
    add_legend(figure, list(handles.values()))
    return figure


def _curves(lines: Sequence[Series], place: str, name: str, *, required: bool = False) -> list[Curve]:
    """Of each line its values by place."""
    return [pooled(line.results[0], (place,), name, required=required) for line in lines]


def _costs(lines: Sequence[Series], name: str) -> list[Curve]:
    curves = _curves(lines, "length", name)
    if not name.endswith("bytes"):
        return curves
    return [{key: value for key, value in curve.items() if value.mean > 0} for curve in curves]


def _draw(
    axes: Axes, lines: Sequence[Series], curves: Sequence[Curve], styles: Mapping[str, Style]
) -> dict[str, Line2D]:
    """The curves that have points, as handles of the legend by label."""
    handles: dict[str, Line2D] = {}
    for line, curve in zip(lines, curves, strict=True):
        if curve:
            places, means = [key[0] for key in curve], [value.mean for value in curve.values()]
            errors = [value.stderr or 0.0 for value in curve.values()]
            style = styles[line.method].line(line.variant)
            container = axes.errorbar(
                places, means, yerr=errors if any(errors) else None, capsize=3, elinewidth=1.2, **style
            )
            handle = container.lines[0]
            assert isinstance(handle, Line2D)
            handle.set_label(line.label)
            handles[line.label] = handle
    return handles
