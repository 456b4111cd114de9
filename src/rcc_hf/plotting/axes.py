# SPDX-License-Identifier: Apache-2.0
"""Axes of tokens, ratios and bytes: logarithmic where values span much, with ticks that a reader can read."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

__all__ = ["bytes_axis", "number_axis", "score_axis", "values_axis"]

XY = Literal["x", "y"]
DECADE = 10


def values_axis(axes: Axes, values: Iterable[float], text: Callable[[float], str]) -> None:
    """A logarithmic x axis with a tick at each value, or at powers of two where those would be too many.

    Args:
        axes: Whose x axis it is.
        values: Such as lengths; a zero gets a place of its own left of the others.
        text: Of a tick.
    """
    places = sorted(set(values))
    positive = [place for place in places if place > 0]
    if len(positive) < len(places):
        axes.set_xscale("symlog", base=2, linthresh=min(positive, default=1) / 2, linscale=0.5)
        axes.set_xlim(left=-min(positive, default=1) / 8)
    else:
        axes.set_xscale("log", base=2)
    _pad_single(axes.set_xlim, positive)
    is_narrow = len(positive) > 1 and min(b / a for a, b in pairwise(positive)) < 1.3
    if len(places) <= 10 and not is_narrow:
        axes.set_xticks(places)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def bytes_axis(axes: Axes, which: XY, values: Iterable[float], text: Callable[[float], str]) -> None:
    """An axis of bytes: logarithmic with ticks at powers of two if they span much, otherwise linear from zero.

    Args:
        axes: Whose axis it is.
        which: Of the two.
        values: Positive.
        text: Of a tick.
    """
    values, axis = sorted(values), axes.xaxis if which == "x" else axes.yaxis
    span = math.log2(values[-1] / values[0])
    if span >= 3:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(base=2 ** max(1, math.ceil(span / 7)), numticks=20))
    else:
        unit = 1024 ** int(math.log(values[-1], 1024))
        ticks = unit * MaxNLocator(nbins=6).tick_values(0, 1.05 * values[-1] / unit)
        axes.set(**{f"{which}lim": (0, ticks[-1])})
        axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def number_axis(axes: Axes, values: Sequence[float]) -> None:
    """A y axis, logarithmic where the values span a decade, from zero where they do not."""
    if min(values) > 0 and max(values) >= DECADE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatterSciNotation() if max(values) >= 1e6 else FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=min(0, *values), top=1.12 * max(values) or 1)


def _plain(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def score_axis(axes: Axes, values: Iterable[float]) -> None:
    """A y axis that does not reach beyond what a share can be, if the values are shares."""
    values = list(values)
    axes.margins(y=0.08)
    if all(0 <= value <= 1 for value in values):
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.03), min(high, 1.03))


def _pad_single(set_limits: Callable[[float, float], object], values: Sequence[float]) -> None:
    """An axis with one value on it would have no width."""
    if len(set(values)) == 1:
        set_limits(values[0] / 2, values[0] * 2)
