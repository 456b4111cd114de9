# SPDX-License-Identifier: Apache-2.0
"""Quality against the ratio and against the bytes that are kept, ours, others, and the references as lines across."""

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rcc_hf.plotting.axes import bytes_axis, score_axis, values_axis
from rcc_hf.plotting.labels import LOWER_IS_BETTER, bytes_text, metric_text, ratio_text, task_text
from rcc_hf.plotting.results import Result
from rcc_hf.plotting.series import REFERENCES, Panel, Series, split_series
from rcc_hf.plotting.styles import GREY, Style, add_legend, new_figure

__all__ = ["plot_bytes", "plot_ratio"]

Place = Callable[[Result], float | None]


def plot_ratio(panel: Panel, metric: str, styles: Mapping[str, Style], title: str | None = None) -> Figure | None:
    """The metric of every method at every ratio; None if no result has a ratio."""
    lines = split_series(panel)
    found = [place for line in lines for place in _places(line, _ratio)]
    if not found:
        return None
    figure, axes = _figure(panel, metric, title or f"{_begin(panel, metric)} against the ratio")
    handles = [_draw(axes, line, metric, _ratio, styles[line.method]) for line in lines]
    values_axis(axes, found, ratio_text)
    axes.set_xlabel("ratio (source tokens per slot)")
    return _finish(figure, axes, panel, metric, handles)


def plot_bytes(panel: Panel, metric: str, styles: Mapping[str, Style], title: str | None = None) -> Figure | None:
    """The metric of every method against the bytes kept of a context; None if no result but references has bytes.

    The full context has bytes too, so that its line carries a marker there.
    """
    lines = split_series(panel)
    found = [place for line in lines for place in _places(line, _nbytes)]
    if not found:
        return None
    figure, axes = _figure(panel, metric, title or f"{_begin(panel, metric)} against memory")
    handles = [_draw(axes, line, metric, _nbytes, styles[line.method]) for line in lines]
    for line in lines:
        if line.method == "full" and line.results[0].nbytes:
            found.append(line.results[0].nbytes)
            point = line.results[0].nbytes, line.results[0].overall[metric].mean
            axes.plot(*point, color=styles["full"].color, marker="*", markersize=12, zorder=3, linestyle="none")
        elif styles[line.method].is_ours:
            _write_ratios(axes, line, metric, styles[line.method])
    bytes_axis(axes, "x", found, bytes_text)
    axes.set_xlabel("bytes kept of a context (mean)")
    return _finish(figure, axes, panel, metric, handles)


def _ratio(result: Result) -> float | None:
    return None if result.method in REFERENCES else result.ratio or None


def _nbytes(result: Result) -> float | None:
    return None if result.method in REFERENCES else result.nbytes or None


def _places(line: Series, place: Place) -> list[float]:
    return [x for x in map(place, line.results) if x is not None]


def _begin(panel: Panel, metric: str) -> str:
    return f"{task_text(panel.task, panel.data)}: {metric_text(metric, direction=False)}"


def _figure(panel: Panel, metric: str, title: str) -> tuple[Figure, Axes]:
    figure, (axes,) = new_figure(title, height=4.7)
    axes.set_ylabel(metric_text(metric))
    axes.set_title(_note(panel, metric), loc="left", color=GREY, fontsize=9.5)
    return figure, axes


def _note(panel: Panel, metric: str) -> str:
    """How many examples are behind a point, and what its bar is."""
    counts = sorted({result.num_examples for result in panel.results if result.num_examples})
    parts = [] if not counts else [" to ".join(f"{count:,}" for count in sorted({counts[0], counts[-1]})) + " examples"]
    if any(result.overall[metric].stderr for result in panel.results):
        parts.append("bars: \N{PLUS-MINUS SIGN} 1 standard error")
    return ", ".join(parts)


def _draw(axes: Axes, line: Series, metric: str, place: Place, style: Style) -> Line2D | None:
    """The line, as its handle for the legend; None if none of its results has a place."""
    if line.method in REFERENCES:
        return axes.axhline(
            line.results[0].overall[metric].mean, label=line.label, zorder=2, **style.reference(line.variant)
        )
    points = sorted((x, result.overall[metric]) for result in line.results if (x := place(result)) is not None)
    if not points:
        return None
    errors = [value.stderr or 0.0 for _, value in points]
    container = axes.errorbar(
        [x for x, _ in points], [value.mean for _, value in points], yerr=errors if any(errors) else None,
        capsize=3, elinewidth=1.2, **style.line(line.variant),
    )  # fmt: skip
    handle = container.lines[0]
    assert isinstance(handle, Line2D)
    handle.set_label(line.label)
    return handle


def _write_ratios(axes: Axes, line: Series, metric: str, style: Style) -> None:
    # the side on which the line is not, as it rises with the bytes, or falls if less is better
    below = metric not in LOWER_IS_BETTER
    for result in line.results:
        if result.nbytes and result.ratio:
            point = result.nbytes, result.overall[metric].mean
            axes.annotate(
                ratio_text(result.ratio), point, xytext=(7, -14 if below else 6), textcoords="offset points",
                fontsize=9.5, fontweight="bold", color=style.color, zorder=5,
            )  # fmt: skip


def _finish(figure: Figure, axes: Axes, panel: Panel, metric: str, handles: list[Line2D | None]) -> Figure:
    score_axis(axes, (result.overall[metric].mean for result in panel.results))
    add_legend(figure, [handle for handle in handles if handle is not None])
    return figure
