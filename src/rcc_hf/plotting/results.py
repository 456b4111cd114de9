# SPDX-License-Identifier: Apache-2.0
"""Reads the results of evaluations, checked, from metrics.json files and from folders that hold them."""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

__all__ = ["Result", "Value", "add_peers", "read_result", "read_results", "to_value"]

logger = logging.getLogger(__name__)

METRICS = "metrics.json"


@dataclass(frozen=True)
class Value:
    """A mean and its standard error, which a single example does not have."""

    mean: float
    stderr: float | None = None


@dataclass(frozen=True)
class Result:
    """What one metrics.json says: one method at one ratio on one task.

    Attributes:
        file: Where it was read.
        task: Of `rcc evaluate`.
        method: How the context was kept.
        model: Id or path of the model.
        ratio: Source tokens per entry that is kept, if the method has one.
        data: Name or file of the data, if the task leaves it open.
        num_examples: Behind the means.
        nbytes: Kept of a context on average, if it was measured.
        overall: The metrics over all examples.
        groups: Of each group its metadata and metrics as they stand in the file.
    """

    file: Path
    task: str
    method: str
    model: str
    ratio: float | None = None
    data: str | None = None
    num_examples: int | None = None
    nbytes: float | None = None
    overall: Mapping[str, Value] = field(default_factory=dict)
    groups: tuple[Mapping[str, Any], ...] = ()


def read_results(paths: Iterable[str | Path]) -> list[Result]:
    """The results of all files given, and of all JSON files in the folders given that hold one, in order of path.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is no result, there is none, or two are of the same method, ratio, model and task.
    """
    results: dict[Path, Result] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give files or folders that rcc evaluate wrote")
        for file in _result_files(path) if path.is_dir() else [path]:
            results[file.resolve()] = read_result(file)
    if not results:
        raise ValueError("no folder given holds a metrics.json; give files or folders that rcc evaluate wrote")
    ordered = [results[file] for file in sorted(results)]
    _refuse_repetitions(ordered)
    return ordered


def add_peers(results: Sequence[Result], peers: Iterable[str | Path]) -> list[Result]:
    """The results and those of other libraries on the same examples, whose folders do not name the data.

    Args:
        results: Of `read_results`.
        peers: Files or folders, such as those that `benchmarks/kvpress/score_run.py` writes.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no result, or results on several data, have a peer's task, or none as many examples; or two are of
            the same method, ratio, model and task.
    """
    found = list(results)
    for peer in read_results(peers):
        beside = [result for result in results if result.task == peer.task and peer.data in (None, result.data)]
        if not beside:
            known = ", ".join(sorted({result.task for result in results}))
            raise ValueError(f"{peer.file} is of task {peer.task!r}; the results that it could stand by are of {known}")
        if len(data := {result.data for result in beside}) > 1:
            names = ", ".join(map(str, sorted(data, key=str)))
            raise ValueError(f"{peer.file} names no data, and the results of {peer.task!r} are on {names}; give some")
        if peer.num_examples not in (counts := {result.num_examples for result in beside}):
            raise ValueError(f"{peer.file} has {peer.num_examples} examples, the results of {peer.task!r} {counts}")
        found.append(replace(peer, data=data.pop()))
    _refuse_repetitions(found)
    return found


def _result_files(folder: Path) -> list[Path]:
    """Every metrics.json but those that only sum up runs of several ratios, and JSON files that have what one has."""
    found = []
    for file in sorted(folder.rglob("*.json")):
        names = _read_object(file).keys()
        if "runs" not in names and (file.name == METRICS or {"task", "method", "overall"} <= names):
            found.append(file)
        else:
            logger.info("%s is no result of rcc evaluate: left out", file)
    return found


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _refuse_repetitions(results: list[Result]) -> None:
    seen: dict[tuple, Result] = {}
    for result in results:
        key = (result.task, result.data, result.method, result.model, result.ratio)
        if key in seen:
            raise ValueError(
                f"{seen[key].file} and {result.file} both hold task {result.task!r}, method {result.method!r}, "
                f"ratio {result.ratio} of {result.model!r}; give one of them"
            )
        seen[key] = result


def read_result(file: Path) -> Result:
    """The result that one file holds.

    Raises:
        ValueError: something is missing, or is not what it should be.
    """
    content = _read_object(file)
    missing = [name for name in ("task", "method", "model") if not isinstance(content.get(name), str)]
    if missing:
        raise ValueError(f"{file} has no {', '.join(missing)} (a string each): rcc evaluate did not write it")
    groups = content.get("groups", [])
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError(f"{file}: groups must be a list of objects")
    overall = content.get("overall", {})
    if not isinstance(overall, dict):
        raise ValueError(f"{file}: overall must be an object of metrics, found {overall!r:.60}")
    values = {name: to_value(entry, f"{file}: overall, {name}") for name, entry in overall.items()}
    data = content.get("data")
    return Result(
        file=file,
        task=content["task"],
        method=content["method"],
        model=content["model"],
        ratio=_number(content, "ratio", file),
        data=None if data is None else str(data),
        num_examples=content.get("num_examples"),
        nbytes=_number(content, "nbytes_per_example", file),
        overall={name: value for name, value in values.items() if value is not None},
        groups=tuple(groups),
    )


def _number(content: Mapping[str, Any], name: str, file: Path) -> float | None:
    value = to_value(content.get(name), f"{file}: {name}")
    if value is not None and value.mean < 0:
        raise ValueError(f"{file}: {name} is {value.mean}; it cannot be negative")
    return None if value is None else value.mean


def to_value(entry: Any, where: str) -> Value | None:
    """A number, or an object of mean and stderr, as a value; None for null: nothing was measured.

    Args:
        entry: From a metrics.json.
        where: Begins the error message.

    Raises:
        ValueError: it is something else.
    """
    pair = entry if isinstance(entry, dict) else {"mean": entry}
    mean, stderr = pair.get("mean"), pair.get("stderr")
    if mean is None:
        return None
    if not _is_finite(mean) or not (stderr is None or _is_finite(stderr)):
        raise ValueError(f"{where} is {entry!r:.80}; it must be a finite number, or one as mean and one as stderr")
    return Value(mean, stderr)


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
