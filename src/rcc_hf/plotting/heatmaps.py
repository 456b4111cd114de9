# SPDX-License-Identifier: Apache-2.0
"""A metric by length of the context and depth of what was asked for, with its number in every cell."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from rcc_hf.plotting.labels import LOWER_IS_BETTER, method_text, metric_text, ratio_text, task_text, tokens_text
from rcc_hf.plotting.results import Result, Value
from rcc_hf.plotting.series import REFERENCES, pooled
from rcc_hf.plotting.styles import GREY, WIDTH, new_figure

__all__ = ["plot_heatmap"]


def plot_heatmap(result: Result, metric: str, title: str | None = None) -> Figure | None:
    """Columns are lengths, rows depths from the beginning (above) to the end; None if no group has both.

    Raises:
        ValueError: a group with length and depth lacks the metric.
    """
    cells = pooled(result, ("length", "depth"), metric)
    if not cells:
        return None
    lengths, depths = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    table = np.array([[_mean(cells, length, depth) for length in lengths] for depth in depths])
    figure, (axes,) = new_figure(title or _title(result), height=1.75 + max(4, len(depths)) * 0.33)
    axes.set_title(_note(result, metric), loc="left", color=GREY, fontsize=9.5)
    is_share = bool(np.nanmin(table) >= 0 and np.nanmax(table) <= 1)
    norm = Normalize(0, 1) if is_share else Normalize(float(np.nanmin(table)), float(np.nanmax(table)))
    colours = colormaps["viridis_r" if metric in LOWER_IS_BETTER else "viridis"].resampled(64)
    axes.set_facecolor("#eeeeee")
    mesh = axes.pcolormesh(np.ma.masked_invalid(table), cmap=colours, norm=norm, edgecolors="white", linewidth=1)
    _add_colour_bar(figure, axes, mesh, metric)
    _label(axes, lengths, depths)
    _write_numbers(axes, table, colours(norm(table)), is_share=is_share)
    return figure


def _add_colour_bar(figure: Figure, axes: Axes, mesh: QuadMesh, metric: str) -> None:
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=18, label=metric_text(metric))
    bar.outline.set_visible(False)
    assert bar.solids is not None
    # paths in SVG too, without seams, not an image inside it
    bar.solids.set(rasterized=False, edgecolor="face", linewidth=0.5)


def _mean(cells: Mapping[tuple, Value], length: float, depth: float) -> float:
    return cells[length, depth].mean if (length, depth) in cells else float("nan")


def _title(result: Result) -> str:
    ratio = "" if result.ratio is None or result.method in REFERENCES else f" {ratio_text(result.ratio)}"
    return f"{task_text(result.task, result.data)}: {method_text(result.method)}{ratio}"


def _note(result: Result, metric: str) -> str:
    count = f", {result.num_examples:,} examples" if result.num_examples else ""
    return f"{metric_text(metric)}{count}"


def _label(axes: Axes, lengths: Sequence[float], depths: Sequence[float]) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.invert_yaxis()
    texts = [tokens_text(length) for length in lengths]
    every = -(-len(lengths) * max(map(len, texts)) // 80)
    axes.set_xticks(np.arange(len(lengths))[::every] + 0.5, texts[::every])
    shares = [f"{100 * depth if max(depths) <= 1 else depth:.3g} %" for depth in depths]
    axes.set_yticks(np.arange(len(depths)) + 0.5, shares)
    axes.set_xlabel("length of the context (tokens)")
    axes.set_ylabel("depth")


def _write_numbers(axes: Axes, table: np.ndarray, colours: np.ndarray, *, is_share: bool) -> None:
    """Numbers in white on dark cells; none where they would be too small to read."""
    # 0.72 of the width is left beside labels and colour bar; a number of four signs is 2.7 times as wide as high
    size = min(10.0, WIDTH * 72 * 0.72 / table.shape[1] / 2.7)
    if size < 6:
        return
    for (row, column), value in np.ndenumerate(table):
        text = "\N{EN DASH}" if np.isnan(value) else f"{value:.2f}" if is_share else f"{value:.3g}"
        luminance = 1.0 if np.isnan(value) else float(colours[row, column, :3] @ (0.2126, 0.7152, 0.0722))
        colour = "black" if luminance > 0.45 else "white"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour)
