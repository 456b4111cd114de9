# SPDX-License-Identifier: Apache-2.0
"""`rcc plot`: results of evaluations become figures."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import HfArgumentParser

from rcc_hf.optional import import_optional
from rcc_hf.plotting.results import add_peers, read_results


@dataclass(kw_only=True)
class PlotSettings:
    """What is drawn, and as what."""

    output: str = field(metadata={"help": "Folder to write; it is made."})
    peers: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of other libraries' runs on the same examples (benchmarks/kvpress); each is drawn "
                  "with the results of its task, whatever data these name."},
    )  # fmt: skip
    kind: Literal["all", "heatmap", "ratio", "bytes", "cost", "perplexity"] = field(
        default="all", metadata={"help": "What to draw; all: every kind that the results have the numbers for."}
    )
    metric: str = field(default="auto", metadata={"help": "Metric, such as f1; auto: a usual one of each task."})
    format: list[str] = field(default_factory=lambda: ["png", "svg"], metadata={"help": "png, svg, or both."})
    title: str | None = field(default=None, metadata={"help": "Title of the figures, instead of the usual ones."})


def run(argv: list[str]) -> int:
    """Read, draw and save."""
    classes: list[Any] = [PlotSettings]
    parser = HfArgumentParser(classes, prog="rcc plot", description="Draw results of rcc evaluate.")
    parser.add_argument("results", nargs="+", help="metrics.json files, or folders that are searched for them")
    settings, names = parser.parse_args_into_dataclasses(args=argv)
    figures = import_optional("rcc_hf.plotting.figures", extra="plot")
    results = add_peers(read_results(names.results), settings.peers) if settings.peers else read_results(names.results)
    metric = None if settings.metric == "auto" else settings.metric
    drawn = figures.draw(results, kind=settings.kind, metric=metric, title=settings.title)
    print(f"results  {len(results)}")
    for file in figures.save(drawn, settings.output, settings.format):
        print(f"wrote    {file}")
    return 0
