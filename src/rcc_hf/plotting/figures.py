# SPDX-License-Identifier: Apache-2.0
"""All figures that results have the numbers for, and their files, which stay the same as long as the numbers do."""

import os
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from rcc_hf.plotting.heatmaps import plot_heatmap
from rcc_hf.plotting.labels import file_name, ratio_text
from rcc_hf.plotting.lengths import plot_cost, plot_perplexity
from rcc_hf.plotting.quality import plot_bytes, plot_ratio
from rcc_hf.plotting.results import Result
from rcc_hf.plotting.series import REFERENCES, Panel, choose_metric, split_panels
from rcc_hf.plotting.styles import Style, assign_styles, figure_style

__all__ = ["FORMATS", "KINDS", "draw", "save"]

FORMATS = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
}
"""Kinds of file, and the metadata that would differ between two days or two versions of matplotlib."""

NEEDS = {
    "heatmap": "groups with length and depth",
    "ratio": "a method with a ratio",
    "bytes": "a method with nbytes_per_example",
    "cost": "the task cost",
    "perplexity": "the task perplexity with groups with a history",
}
PERPLEXITIES = ("perplexity", "nll")
KINDS = ("all", *NEEDS)


def draw(
    results: Sequence[Result], *, kind: str = "all", metric: str | None = None, title: str | None = None
) -> dict[str, Figure]:
    """Figures by the name that their file has, without suffix.

    Args:
        results: Of `read_results`.
        kind: One of `KINDS`; all draws every kind that the results have the numbers for.
        metric: What is drawn of the tasks that have it; None for a usual one of each task.
        title: Instead of the usual ones.

    Raises:
        ValueError: the kind is unknown; no result has what it needs, or the metric; results contradict each other.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    styles = assign_styles([result.method for result in results])
    kinds = [each for each in NEEDS if kind in (each, "all")]
    with figure_style():
        figures = {
            name: figure
            for panel in split_panels(results)
            for each in kinds
            for name, figure in _draw_panel(panel, each, metric, styles, title)
            if figure is not None
        }
    if not figures:
        needed = " or ".join(NEEDS[each] for each in kinds)
        known = sorted({name for result in results for name in result.overall})
        asked = f" with the metric {metric!r} (the results have: {', '.join(known) or 'none'})" if metric else ""
        raise ValueError(f"there is nothing to draw: none of the {len(results)} results is of {needed}{asked}")
    return figures


def _draw_panel(
    panel: Panel, kind: str, metric: str | None, styles: Mapping[str, Style], title: str | None
) -> Iterator[tuple[str, Figure | None]]:
    if kind == "cost":
        if panel.task == "cost":
            yield file_name((kind, panel.data)), plot_cost(panel, styles, title)
        return
    if kind == "perplexity":
        name = metric or _perplexity_metric(panel)
        if panel.task == "perplexity" and name in PERPLEXITIES:
            named = None if name == kind else name
            yield file_name((kind, named, panel.data)), plot_perplexity(panel, name, styles, title)
        return
    chosen = None if panel.task == "cost" else choose_metric(panel, metric)
    if chosen is None:
        return
    if kind == "heatmap":
        for result in panel.results:
            yield _heatmap_name(panel, result, chosen), plot_heatmap(result, chosen, title)
        return
    plot = plot_ratio if kind == "ratio" else plot_bytes
    named = None if chosen == panel.task else chosen
    yield file_name((kind, panel.task, panel.data, named)), plot(panel, chosen, styles, title)


def _perplexity_metric(panel: Panel) -> str:
    groups = [group for result in panel.results for group in result.groups]
    return next((name for name in PERPLEXITIES if any(name in group for group in groups)), PERPLEXITIES[0])


def _heatmap_name(panel: Panel, result: Result, metric: str) -> str:
    has_ratio = result.ratio is not None and result.method not in REFERENCES
    ratio = ratio_text(result.ratio) if has_ratio and result.ratio else None
    models = {other.model for other in panel.results if other.method == result.method}
    model = None if len(models) == 1 else result.model.rstrip("/")
    return file_name(("heatmap", panel.task, panel.data, metric, result.method, ratio, model))


def save(figures: Mapping[str, Figure], folder: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write each figure in each format; the folder is made. A file is replaced whole or not at all.

    Raises:
        ValueError: a format is unknown.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"format is {', '.join(unknown)}; it must be one of {', '.join(FORMATS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        for suffix in formats:
            content = BytesIO()
            with figure_style():
                figure.savefig(content, format=suffix, metadata=FORMATS[suffix])
            files.append(folder / f"{name}.{suffix}")
            new = folder / f".{files[-1].name}"
            new.write_bytes(content.getvalue())
            os.replace(new, files[-1])
    return files
