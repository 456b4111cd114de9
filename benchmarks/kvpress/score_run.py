# SPDX-License-Identifier: Apache-2.0
"""Writes metrics.json and predictions.csv of a folder of predictions, with the metrics of `rcc evaluate`.

Runs where rcc_hf is installed; no model is loaded.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcc_hf.evaluation.examples import Example, read_examples
from rcc_hf.evaluation.outputs import CONFIG, RunFolder
from rcc_hf.evaluation.reports import report


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a run, of which each is a line with JSON as its value."""
    lines = (path / CONFIG).read_text(encoding="utf-8").splitlines()
    return {name: json.loads(value) for name, _, value in (line.partition(": ") for line in lines)}


def score_run(
    path: Path,
    examples: Sequence[Example],
    group_by: Sequence[str] = (),
    task: str | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """The metrics of a finished run, which are written into its folder.

    Args:
        path: The folder.
        examples: Those that were answered, in their order.
        group_by: Metadata by which scores are grouped, beside the task.
        task: Name of the task; default: that of the examples if they have one in common, and "examples" otherwise.
        data: Name of the data, as in the metrics.json of `rcc evaluate`; None: none.

    Raises:
        ValueError: a prediction is that of another example, or is missing.
    """
    config = read_config(path)
    with RunFolder(path, config) as folder:
        missing = folder.remaining(examples)
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} of {len(examples)} predictions; finish the run first")
        names = {example.task for example in examples}
        about = {"task": task or (names.pop() if len(names) == 1 else "examples")}
        about |= {name: config[name] for name in ("method", "model", "ratio")}
        about |= {} if data is None else {"data": data}
        metrics = report(examples, folder.rows(), group_by=group_by, about=about)
        folder.write_metrics(metrics)
        folder.write_csv()
    return metrics


def main() -> None:
    """Score, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a run of run_kvpress.py")
    parser.add_argument("examples", type=Path, help="the file that was given to it")
    parser.add_argument("--group-by", nargs="*", default=["length", "depth"], help="(default: length depth)")
    parser.add_argument("--task", help="name of the task, as rcc plot tells them apart (default: of the examples)")
    parser.add_argument("--data", help="name of the data, likewise (default: none; rcc plot --peers finds them)")
    settings = parser.parse_args()
    examples = read_examples(settings.examples)
    metrics = score_run(settings.folder, examples, settings.group_by, settings.task, settings.data)
    means = {name: value["mean"] for name, value in metrics["overall"].items()}
    sys.stdout.write(json.dumps({"method": metrics["method"], "ratio": metrics["ratio"], **means}) + "\n")


if __name__ == "__main__":
    main()
