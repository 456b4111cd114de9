# SPDX-License-Identifier: Apache-2.0
"""Names and numbers as a reader wants them: tasks, metrics, methods, tokens, bytes."""

import math
import re
from collections.abc import Iterable

__all__ = ["LOWER_IS_BETTER", "bytes_text", "file_name", "metric_text", "ratio_text", "task_text", "tokens_text"]

LOWER_IS_BETTER = {"edit_distance", "nll", "perplexity"}

_TASKS = {
    "cost": "Time and memory",
    "qa": "Question answering",
    "ruler": "RULER",
    "passkey": "Pass key",
    "needles": "Needles",
}
_BENCHMARKS = {"longbench": "LongBench", "leval": "L-Eval", "infinitebench": "InfiniteBench"}
_METRICS = {
    "bleu4": "BLEU-4",
    "f1": "F1",
    "nll": "negative log-likelihood (nats per token)",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}
_METHODS = {"full": "full context", "none": "no context", "rcc": "RCC (ours)", "wrong": "another context"}


def task_text(task: str, data: str | None = None) -> str:
    """The task as the beginning of a title, with its data (benchmark, file, subset) where they are open."""
    text = _TASKS.get(task, _plain(task).capitalize())
    if data is None:
        return text
    first, last = data.split("/", 1)[0], data.rsplit("/", 1)[-1]
    return f"{_BENCHMARKS.get(first, text)}, {re.sub(r'[.]jsonl?(?=,|$)', '', last).replace('+', ', ')}"


def metric_text(metric: str, *, direction: bool = True) -> str:
    """The metric as the label of an axis, which says so where less is better."""
    text = _METRICS.get(metric, _plain(metric))
    return f"{text}, lower is better" if direction and metric in LOWER_IS_BETTER else text


def method_text(method: str) -> str:
    """The method as an entry of a legend."""
    if method.startswith("rcc-"):
        return f"RCC, {_plain(method[4:])} (ours)"
    return _METHODS.get(method, _plain(method))


def _plain(name: str) -> str:
    return name.replace("_", " ")


def ratio_text(ratio: float) -> str:
    """16 as 16x."""
    return f"{ratio:g}x"


def tokens_text(count: float) -> str:
    """4096 as 4K, 1048576 as 1M, anything else with commas."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count / unit:,.0f}{letter}"
    return f"{count:,.0f}" if count == round(count) else f"{count:,g}"


def bytes_text(count: float) -> str:
    """1572864 as 1.5 MiB, to three digits."""
    if count == 0:
        return "0"
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, int(math.log2(count) / 10)) if count >= 1 else 0
    number = count / 1024**power
    return f"{number:.3g} {units[power]}" if number < 1000 else f"{number:.0f} {units[power]}"


def file_name(parts: Iterable[str | None]) -> str:
    """The parts that there are, as one name without folders and signs that need quotes."""
    return "-".join(re.sub(r"[^\w.]+", "-", part.rsplit("/", 1)[-1]).strip("-.") for part in parts if part)
