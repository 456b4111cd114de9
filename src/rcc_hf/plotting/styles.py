# SPDX-License-Identifier: Apache-2.0
"""How figures look: sizes, fonts, and for each method a colour, a marker and a dash pattern of its own.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), then some of Paul Tol's muted ones
(https://sronpersonalpages.nl/~pault/): both stay apart for colour-blind readers, and markers and dashes say the same in
print. A page shows a figure about 800 pixels wide: 8 inches, so that 10 points are 14 pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib import style as matplotlib_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["GREY", "WIDTH", "Style", "add_legend", "assign_styles", "figure_style", "new_figure"]

WIDTH = 8.0
GREY = "#595959"

_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "font.size": 10.5,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
    # names of clip paths in SVG are drawn at random otherwise
    "svg.hashsalt": "rcc_hf",
}

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.2, 1.4)),
    (0, (6, 2, 1.2, 2)),
    (0, (9, 3)),
    (0, (4, 1.5, 1, 1.5, 1, 1.5)),
)
_VERMILLION, _BLUE, _GREEN, _PURPLE, _SKY, _ORANGE = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00",
)  # fmt: skip
# The same in every figure, whatever else it shows. Vermillion is ours alone; yellow is too faint on white.
_KNOWN = {
    "rcc": (_VERMILLION, 0, 0),
    "full": ("#000000", 10, 0),
    "none": (GREY, 6, 1),
    "wrong": (GREY, 7, 2),
    "truncate-head": (_BLUE, 1, 1),
    "truncate-tail": (_SKY, 2, 3),
    "window-sink": (_GREEN, 3, 4),
    "mean-pool": (_PURPLE, 4, 5),
    "wrong-rcc": (_ORANGE, 5, 2),
}
# Of methods that are not known here: first colours that no known one has.
_INDIGO, _WINE, _OLIVE = "#332288", "#882255", "#999933"
_FREE = (_INDIGO, _WINE, _OLIVE, _ORANGE, _GREEN, _BLUE, _PURPLE, _SKY)


@dataclass(frozen=True)
class Style:
    """What tells the lines of one method from others."""

    color: str
    marker: int
    dashes: int
    is_ours: bool = False

    def line(self, variant: int = 0) -> dict[str, Any]:
        """Keywords of matplotlib's lines; variants share the colour."""
        marker = _MARKERS[(self.marker + variant) % len(_MARKERS)]
        # a star has little ink for its size
        size = (8 if self.is_ours else 7) + 4 * (marker == "*")
        return {
            "color": self.color,
            "linestyle": _DASHES[(self.dashes + variant) % len(_DASHES)],
            "linewidth": 2.8 if self.is_ours else 1.6,
            "marker": marker,
            "markersize": size,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
            "zorder": 4 if self.is_ours else 3,
        }

    def reference(self, variant: int = 0) -> dict[str, Any]:
        """Keywords of a horizontal line."""
        return {"color": self.color, "linestyle": _DASHES[(self.dashes + variant) % len(_DASHES)], "linewidth": 1.8}


def assign_styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each method; those that are not known here get what the known ones leave, by name."""
    styles, num_free = {}, 0
    for method in sorted(set(methods)):
        if method in _KNOWN:
            styles[method] = Style(*_KNOWN[method], is_ours=method == "rcc")
        elif method.startswith("rcc-"):
            styles[method] = Style(_VERMILLION, 1 + num_free, 1 + num_free, is_ours=True)
            num_free += 1
        else:
            styles[method] = Style(_FREE[num_free % len(_FREE)], 6 + num_free, 3 + num_free)
            num_free += 1
    return styles


@contextmanager
def figure_style() -> Iterator[None]:
    """Inside it matplotlib's settings are its defaults and ours, not the user's; afterwards they are what they were."""
    with matplotlib_style.context(["default", _RC]):
        yield


def new_figure(title: str, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the usual width with its title at the left; `height` is in inches. No window, no pyplot."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.012, horizontalalignment="left")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def add_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend below the axes, where it hides nothing; ours is bold."""
    columns = min(4, len(handles), max(1, 96 // (8 + max(len(handle.get_label()) for handle in handles))))
    legend = figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, handlelength=3.2)
    for text in legend.get_texts():
        if text.get_text().startswith("RCC") and "(ours)" in text.get_text():
            text.set_fontweight("bold")
