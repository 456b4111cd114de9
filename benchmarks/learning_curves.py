# SPDX-License-Identifier: Apache-2.0
"""Learning curves of a training: token accuracy by objective, and the loss, of one or several stages in order.

    python benchmarks/learning_curves.py FOLDER.. --output docs/images/learning.png [--log FILE.json]

A stage is what `rcc train` wrote (its last checkpoint has the log), or a file: trainer_state.json, or one that `--log`
wrote of an earlier call, which holds the lines that are drawn and nothing else.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rcc_hf.plotting.figures import save
from rcc_hf.plotting.styles import add_legend, assign_styles, figure_style, new_figure

STATE = "trainer_state.json"
ACCURACY = "token_accuracy_"
Stage = list[dict[str, float]]
"""The lines of the log of one training, by step."""


def read_stages(file: Path) -> list[Stage]:
    """The stages of a folder or file.

    Raises:
        FileNotFoundError: the folder has no checkpoint.
        ValueError: there is no line with a loss.
    """
    if file.is_dir():
        found = sorted(file.glob(f"checkpoint-*/{STATE}"), key=lambda one: int(one.parent.name.split("-")[1]))
        if not found and not (file / STATE).exists():
            raise FileNotFoundError(f"{file} has neither {STATE} nor a checkpoint with one")
        file = found[-1] if found else file / STATE
    data = json.loads(file.read_text(encoding="utf-8"))
    stages = data if isinstance(data, list) else [data["log_history"]]
    kept = [[_kept(line) for line in stage if "loss" in line and "step" in line] for stage in stages]
    if not all(kept):
        raise ValueError(f"{file} has no line of training, with step and loss")
    return kept


def _kept(line: dict[str, Any]) -> dict[str, float]:
    names = ("step", "loss", "learning_rate", "source_tokens_per_second")
    return {name: round(value, 5) for name, value in line.items() if name in names or name.startswith(ACCURACY)}


def draw(stages: Sequence[Stage]) -> Figure:
    """Accuracy of each objective above, the loss below; a line stands where a stage begins."""
    starts, end = [], 0.0
    for stage in stages:
        starts.append(end)
        end += stage[-1]["step"]
    names = sorted({name for stage in stages for line in stage for name in line if name.startswith(ACCURACY)})

    def curve(name: str) -> list[Sequence[float]]:
        """Steps and values of the lines that have one."""
        lines = [(start + x["step"], x) for start, stage in zip(starts, stages, strict=True) for x in stage]
        return [*zip(*((step, x[name]) for step, x in lines if name in x), strict=True)]

    styles = assign_styles([name.removeprefix(ACCURACY) for name in names])
    with figure_style():
        figure, (above, below) = new_figure("Training", height=6.0, rows=2)
        handles = []
        for name in names:
            label = name.removeprefix(ACCURACY)
            (line,) = above.plot(*curve(name), **styles[label].line() | {"marker": ""}, label=label)
            handles.append(line)
        below.plot(*curve("loss"), color="black", linewidth=1)
        for axes, label in ((above, "token accuracy"), (below, "loss, nats per token")):
            axes.set_ylabel(label)
            for start in starts[1:]:
                axes.axvline(start, color="black", linewidth=0.8)
        above.set_ylim(0, 1)
        below.set_yscale("log")
        below.set_xlabel("step")
        add_legend(figure, handles)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", type=Path, nargs="+", help="folders or files, in order")
    parser.add_argument("--output", type=Path, required=True, help="picture, .png or .svg")
    parser.add_argument("--log", type=Path, help="file for the lines that are drawn")
    args = parser.parse_args(argv)
    stages = [stage for file in args.stages for stage in read_stages(file)]
    save({args.output.stem: draw(stages)}, args.output.parent, [args.output.suffix.removeprefix(".")])
    if args.log is not None:
        args.log.write_text(json.dumps(stages) + "\n", encoding="utf-8")
    sys.stdout.write(f"{args.output}: {sum(map(len, stages))} lines of {len(stages)} stages\n")


if __name__ == "__main__":
    main()
