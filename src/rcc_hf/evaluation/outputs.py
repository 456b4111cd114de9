# SPDX-License-Identifier: Apache-2.0
"""The folder that an evaluation writes: every prediction as it is made, so that a killed run goes on where it was.

It holds what the folder of kvpress's `evaluate.py` holds, under the same names but for predictions:

- `config.yaml`: the settings of the run, one `name: value` a line;
- `predictions.jsonl`: one object a line with the columns of kvpress's `predictions.csv` (all of the example but its
  context, then `predicted_answer` and `compression_ratio`), and with `index` and `fingerprint` of the example;
- `metrics.json`: for each task the metrics.

`write_csv` makes kvpress's `predictions.csv` of the second. Several processes write a file each,
`predictions.rank<n>.jsonl`, which `merge` joins.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rcc_hf.evaluation.examples import Example

__all__ = ["RunFolder", "folder_name"]

CONFIG, METRICS, PREDICTIONS = "config.yaml", "metrics.json", "predictions.jsonl"
_CSV_COLUMNS = (
    "question", "answer_prefix", "answer", "max_new_tokens", "task", "predicted_answer", "compression_ratio",
)  # fmt: skip


def folder_name(
    dataset: str,
    *,
    data_dir: str | None = None,
    model: str,
    method: str,
    compression_ratio: float,
    fraction: float = 1.0,
    max_context_length: int | None = None,
    query_aware: bool = False,
) -> str:
    """The name that kvpress gives the folder of a run, for example `ruler__4096__org--model__rcc__0.94`.

    Args:
        dataset: Name of the data.
        data_dir: Part of them, such as the length in tokens.
        model: Id or path of the model.
        method: How the context is compressed.
        compression_ratio: Share of the context that is left out, from 0 to 1: 0.9375 for 16 tokens per slot.
        fraction: Share of the examples that were used.
        max_context_length: Limit in tokens, if there is one.
        query_aware: Whether the compressor saw the question.

    Raises:
        ValueError: the ratio is no share.
    """
    if not 0 <= compression_ratio <= 1:
        raise ValueError(
            f"compression_ratio is {compression_ratio}; it is the share that is left out, from 0 to 1: "
            "for r tokens per slot give 1 - 1/r"
        )
    parts = [dataset, data_dir or "", model.replace("/", "--"), method, f"{compression_ratio:.2f}"]
    parts += [f"fraction{fraction:.3f}"] if fraction < 1 else []
    parts += [f"max_context{max_context_length}"] if max_context_length is not None else []
    parts += ["query_aware"] if query_aware else []
    return "__".join(filter(None, parts))


class RunFolder:
    """The folder of one run; a context manager, which closes the file of predictions."""

    def __init__(self, path: str | Path, config: Mapping[str, Any], *, process_index: int = 0):
        """Open the folder of a new run, or that of the same run, to go on.

        Args:
            path: The folder; it and its parents are made.
            config: Settings of the run, JSON values by name. What may differ when a run goes on (the number of
                processes, for instance) does not belong here.
            process_index: Of several processes that share the folder.

        Raises:
            ValueError: the folder is that of a run with other settings, or holds predictions without any.
        """
        self.path, self.process_index = Path(path), process_index
        self.path.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = None
        self._check_config(json.loads(json.dumps(dict(config))))
        name = PREDICTIONS if process_index == 0 else f"predictions.rank{process_index}.jsonl"
        self._own = self.path / name
        _cut_unfinished_line(self._own)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file of predictions; `add` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _check_config(self, config: dict[str, Any]) -> None:
        file = self.path / CONFIG
        if not file.exists():
            if any(self._parts()):
                raise ValueError(f"{self.path} holds predictions but no {CONFIG}; give an empty folder")
            self._replace(file, "".join(f"{name}: {_yaml(value)}\n" for name, value in config.items()))
            return
        found = _read_config(file)
        different = [name for name in found | config if _shown(found, name) != _shown(config, name)]
        if different:
            differences = "; ".join(
                f"{name} is {_shown(found, name)} there, {_shown(config, name)} here" for name in different
            )
            raise ValueError(f"{self.path} is the folder of a run with other settings: {differences}. Give another one")

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("predictions*.jsonl"))

    def rows(self) -> list[dict[str, Any]]:
        """The finished rows of all processes, by index; a line that another process has half written is left out."""
        found: dict[int, dict[str, Any]] = {}
        for part in self._parts():
            found |= {row["index"]: row for row in _whole_rows(part)}
        return [found[index] for index in sorted(found)]

    def remaining(self, examples: Sequence[Example]) -> list[int]:
        """Indices of the examples that have no prediction yet.

        Raises:
            ValueError: a prediction there is that of another example: the data have changed.
        """
        rows = {row["index"]: row for row in self.rows()}
        for index, row in rows.items():
            if index >= len(examples) or row["fingerprint"] != _fingerprint(examples[index]):
                raise ValueError(
                    f"{self.path}: prediction {index} (question {row['question'][:60]!r}) is that of another example "
                    "than the one given; the data have changed. Give another folder"
                )
        return [index for index in range(len(examples)) if index not in rows]

    def add(self, index: int, example: Example, prediction: str, **columns: Any) -> None:
        """Write one prediction, which is safe from then on if the process is killed.

        Args:
            index: Of the example, as in `remaining`.
            example: What was asked.
            prediction: The answer, without the prefix.
            columns: Further JSON values, such as `compression_ratio` and seconds.
        """
        row = {"index": index, "fingerprint": _fingerprint(example), **example.to_row()}
        del row["context"]
        row |= {"predicted_answer": prediction} | columns
        if self._file is None:
            self._file = self._own.open("a", encoding="utf-8")
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def merge(self) -> list[dict[str, Any]]:
        """Join the files of all processes in `predictions.jsonl`, sorted; call it in one, when all have finished."""
        self.close()
        rows = self.rows()
        self._replace(self.path / PREDICTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for part in self._parts():
            if part.name != PREDICTIONS:
                part.unlink()
        return rows

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`, whole or not at all."""
        self._replace(self.path / METRICS, json.dumps(metrics, indent=4, ensure_ascii=False) + "\n")

    def write_csv(self) -> None:
        """Write `predictions.csv` with the columns that kvpress writes."""
        with (self.path / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _CSV_COLUMNS, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(self.rows())

    def _replace(self, file: Path, text: str) -> None:
        new = file.with_name(f".{file.name}.{self.process_index}")
        new.write_text(text, encoding="utf-8")
        os.replace(new, file)


def _fingerprint(example: Example) -> str:
    parts = (example.task, example.context, example.question, example.answer_prefix)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _yaml(value: Any) -> str:
    """JSON, which YAML reads as the same value: its floats need a point before the exponent."""
    text = json.dumps(value, ensure_ascii=False)
    is_bare = isinstance(value, float) and "e" in text and "." not in text
    return text.replace("e", ".0e") if is_bare else text


def _shown(config: Mapping[str, Any], name: str) -> str:
    return json.dumps(config[name], ensure_ascii=False) if name in config else "absent"


def _read_config(file: Path) -> dict[str, Any]:
    config = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        name, _, value = line.partition(": ")
        try:
            config[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number}: expected `name: JSON value`, found {line[:80]!r}; give another folder"
            ) from error
    return config


def _whole_rows(file: Path) -> Iterator[dict[str, Any]]:
    text = file.read_text(encoding="utf-8", errors="replace")
    for line in text[: text.rfind("\n") + 1].split("\n"):
        if line:
            yield json.loads(line)


def _cut_unfinished_line(file: Path) -> None:
    """Removes what a killed process had written of its last line."""
    if file.exists():
        data = file.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(file, end)
