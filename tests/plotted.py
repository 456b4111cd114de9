# SPDX-License-Identifier: Apache-2.0
"""Results as files, and the lines of a figure, for tests of what is drawn."""

import json

import numpy as np


def metrics(task, method, ratio=None, mean=0.5, metric="f1", **more):
    overall = {"exact_match": {"mean": mean / 2, "stderr": 0.03}, metric: {"mean": mean, "stderr": 0.02}}
    model = "org/base-rcc" if method == "rcc" else "org/base"
    return {"task": task, "method": method, "model": model, "ratio": ratio, "num_examples": 50} | {
        "overall": overall, "groups": [], "nbytes_per_example": None, "seconds": {}, metric: mean,
    } | more  # fmt: skip


def write(folder, *contents):
    for content in contents:
        run = folder / f"{content['task']}-{content['method']}-{content['model'][-3:]}-{content['ratio']}"
        run.mkdir(parents=True)
        (run / "metrics.json").write_text(json.dumps(content))
    return folder


def lines(axes):
    """The data of each line by its label, of those that are in the legend."""
    return {
        line.get_label(): tuple(np.asarray(line.get_data()).tolist())
        for line in axes.lines
        if not line.get_label().startswith("_")
    }
