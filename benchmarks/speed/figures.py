# SPDX-License-Identifier: Apache-2.0
"""Figures of a benchmark's JSON, from that alone: by length and by batch, a panel for each shape."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rcc_hf.plotting.axes import bytes_axis, number_axis, values_axis
from rcc_hf.plotting.labels import bytes_text, tokens_text
from rcc_hf.plotting.styles import add_legend, assign_styles, figure_style, new_figure

Row = Mapping[str, Any]

SIDES = {"base": ("full", "base"), "rcc": ("rcc", "RCC (ours)")}
"""The style of each side, and its name."""

FIGURES: dict[str, tuple[str, str, str, str, str]] = {
    "speed-first-token": (
        "first_token", "Time to first token", "length", "median_seconds", "seconds",
    ),
    "speed-memory": ("memory", "Peak memory up to the first token, weights included", "length", "peak_bytes", ""),
    "speed-decode": (
        "decode", "Decoding behind a long context", "batch", "tokens_per_second", "tokens/s of all rows",
    ),
    "speed-decode-memory": (
        "decode", "Peak memory of decoding behind a long context, weights included", "batch", "peak_bytes", "",
    ),
    "speed-compression": (
        "compression", "Compression throughput", "batch_tokens", "ceiling_share", "share of square matrix products",
    ),
}  # fmt: skip
"""Part, title, what is on the x axis and what on the y axis, and its label, by name of the file."""

X_LABELS = {
    "length": "length of the context (tokens)",
    "batch": "rows that are decoded together",
    "batch_tokens": "tokens that the compressor sees in a call",
}


def draw(data: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures that there are numbers for, by the name of their file."""
    with figure_style():
        found = {name: _figure(data, *what) for name, what in FIGURES.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def _figure(data: Mapping[str, Any], part: str, title: str, x: str, y: str, label: str) -> Figure | None:
    rows = [r for r in data["rows"] if r["key"]["part"] == part and any(s.get(y) for s in r["sides"].values())]
    shapes = list(dict.fromkeys(row["key"]["shape"] for row in rows))
    if not shapes:
        return None
    small = "SMALL, CPU: " if data["setup"]["small"] else ""
    columns = min(2, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = new_figure(f"{small}{title}", 1.3 + 3.2 * lines, lines, columns)
    variants = list(dict.fromkeys(_variant(row) for row in rows))
    handles: dict[str, Line2D] = {}
    for panel, shape in zip(axes, shapes, strict=False):
        chosen = [row for row in rows if row["key"]["shape"] == shape]
        handles |= _panel(panel, chosen, variants, x, y)
        panel.set_title(f"{shape}, {data['setup']['hardware']}", loc="left")
        panel.set_xlabel(X_LABELS[x])
        if label:
            panel.set_ylabel(label)
    for panel in axes[len(shapes) :]:
        panel.remove()
    add_legend(figure, list(handles.values()))
    return figure


def _variant(row: Row) -> str:
    """What tells the lines of one side apart."""
    return " ".join(str(row["key"][name]) for name in ("attention", "cache") if name in row["key"])


def _panel(axes: Axes, rows: Sequence[Row], variants: Sequence[str], x: str, y: str) -> dict[str, Line2D]:
    """Lines of one shape, as handles of the legend by label; both axes fit them."""
    styles = assign_styles([style for style, _ in SIDES.values()])
    handles: dict[str, Line2D] = {}
    xs: list[float] = []
    ys: list[float] = []
    for side, (style, name) in SIDES.items():
        for variant in variants:
            points = sorted((r["key"][x], r["sides"][side][y]) for r in rows if _has(r, side, y, variant))
            if points:
                places, values = zip(*points, strict=True)
                line = styles[style].line(variants.index(variant))
                (handle,) = axes.plot(places, values, label=f"{name}, {variant}", **line)
                handles[f"{name}, {variant}"] = handle
                xs, ys = [*xs, *places], [*ys, *values]
    text: Callable[[float], str] = tokens_text if x != "batch" else "{:.0f}".format
    values_axis(axes, xs, text)
    bytes_axis(axes, "y", ys, bytes_text) if y.endswith("bytes") else number_axis(axes, ys)
    return handles


def _has(row: Row, side: str, y: str, variant: str) -> bool:
    return bool(row["sides"][side].get(y)) and _variant(row) == variant
