# SPDX-License-Identifier: Apache-2.0
"""Reads benchmarks from local files, or by name through `datasets`, into examples."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rcc_hf.evaluation import benchmark_infinitebench, benchmark_leval, benchmark_longbench, benchmark_qa
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.ruler_qa import QARecord
from rcc_hf.optional import import_optional
from rcc_hf.texts.rows import read_rows

__all__ = ["BENCHMARKS", "read_benchmark", "read_qa_records"]

Maker = Callable[[Mapping[str, Any], str], Iterator[Example]]
_SUFFIXES = (".jsonl", ".json")


def _kvpress(row: Mapping[str, Any], subset: str) -> Iterator[Example]:
    """A row that is an example already; those of RULER name no metric."""
    task = str(row.get("task") or subset)
    metric = "string_match_part" if task.startswith("qa") else "string_match_all"
    yield Example.from_row({"metric": metric, "answer_prefix": "", **row, "task": task})


_LONGBENCH = (*benchmark_longbench.SUBSETS, *(f"{name}_e" for name in benchmark_longbench.SUBSETS))
BENCHMARKS: dict[str, tuple[Maker, tuple[str, ...] | None]] = {
    "longbench": (benchmark_longbench.examples, _LONGBENCH),
    "leval": (benchmark_leval.examples, (*benchmark_leval.CLOSED, *benchmark_leval.OPEN)),
    "infinitebench": (benchmark_infinitebench.examples, tuple(benchmark_infinitebench.SUBSETS)),
    **{name: (maker, None) for name, maker in benchmark_qa.FORMATS.items()},
    "kvpress": (_kvpress, None),
}
"""What makes examples of a record, and the names of subsets where these are fixed.

`kvpress` are files and data sets in the schema of examples, such as https://huggingface.co/datasets/simonjegou/ruler.
"""


def read_benchmark(
    benchmark: str, source: str | Path, subset: str | None = None, *, split: str = "test"
) -> list[Example]:
    """The examples of one subset.

    Args:
        benchmark: One of `BENCHMARKS`.
        source: A `.jsonl` or `.json` file, a folder with `<subset>.jsonl`, or the name of a data set on the Hub, which
            `datasets` loads.
        subset: Which part; it becomes the task. For the benchmarks without fixed ones any name will do; the default is
            that of the benchmark. For `flat` it is the beginning of the sources that are taken.
        split: Of a data set on the Hub.

    Raises:
        ValueError: benchmark or subset are unknown, there is nothing, or a record is not of the benchmark's form; the
            message has file, line and field.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the source is no file, and `datasets` is not installed.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark is {benchmark!r}; it must be one of {', '.join(BENCHMARKS)}")
    make, subsets = BENCHMARKS[benchmark]
    if subsets is not None and subset not in subsets:
        raise ValueError(f"subset is {subset!r}; {benchmark} has {', '.join(subsets)}")
    task = subset or benchmark
    examples: list[Example] = []
    for place, row in _rows(source, subset, split):
        try:
            examples += make(row, task)
        except KeyError as error:
            raise ValueError(
                f"{place}: no field {error.args[0]!r}, which {benchmark} has; found {', '.join(map(str, row))}"
            ) from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{place}: not a record of {benchmark} {task} ({error})") from error
    if not examples:
        raise ValueError(f"{source} holds no examples of {benchmark} {task}")
    return examples


def _rows(source: str | Path, subset: str | None, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = Path(source)
    if path.is_dir():
        found = [path / f"{subset}{suffix}" for suffix in _SUFFIXES if (path / f"{subset}{suffix}").is_file()]
        if not found:
            raise FileNotFoundError(f"{path} has no {subset}.jsonl or {subset}.json; give the file itself")
        path = found[0]
    if path.is_file():
        yield from _with_contexts(path)
    elif path.suffix in _SUFFIXES:
        raise FileNotFoundError(f"there is no file {path}")
    else:
        loaded = import_optional("datasets", "train").load_dataset(str(source), subset, split=split)
        for number, row in enumerate(loaded):
            yield f"{source} {subset or ''} {split}, row {number}", row


def _with_contexts(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a file. A number `ctx` is that of a line of `<name>_contexts.jsonl`, which many rows share."""
    shared = path.with_name(f"{path.stem}_contexts.jsonl")
    contexts: list[str] = []
    if shared.is_file():
        # not splitlines(), which also divides at separators that JSON leaves as they are
        contexts = [json.loads(line) for line in shared.read_text(encoding="utf-8").split("\n") if line]
    for place, row in _file_rows(path):
        if "context" not in row and isinstance(row.get("ctx"), int):
            if not 0 <= row["ctx"] < len(contexts):
                raise ValueError(f"{place}: ctx is {row['ctx']}; {shared.name} has {len(contexts)} contexts, from 0")
            row = {**row, "context": contexts[row["ctx"]]}
        yield place, row


def _file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        yield from read_rows(path)
        return
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON ({error}); a file of JSON lines must end in .jsonl") from error
    entries = value if isinstance(value, list) else [value]
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, entry {number}: expected an object, found {str(entry)[:80]!r}")
        yield f"{path}, entry {number}", entry


def read_qa_records(path: str | Path) -> list[QARecord]:
    """Questions with documents for RULER's `qa_1` and `qa_2`.

    Args:
        path: A SQuAD file (paragraphs of the same article are related documents), or HotpotQA's, a list of
            `{"question", "answer", "context": [[title, [sentence, ...]], ...]}`.

    Raises:
        ValueError: it is neither.
    """
    records: list[QARecord] = []
    for place, row in _file_rows(Path(path)):
        try:
            if "data" in row:
                records += [record for article in row["data"] for record in _article_records(article)]
            else:
                documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in row["context"])
                records.append(QARecord(row["question"], (row["answer"],), documents))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{place}: neither SQuAD nor HotpotQA ({type(error).__name__}: {error})") from error
    if not records:
        raise ValueError(f"{path} holds no questions")
    return records


def _article_records(article: Mapping[str, Any]) -> Iterator[QARecord]:
    paragraphs = list(dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"]))
    for paragraph in article["paragraphs"]:
        related = tuple(other for other in paragraphs if other != paragraph["context"])
        for asked in paragraph["qas"]:
            answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
            if answers and not asked.get("is_impossible"):
                yield QARecord(asked["question"], answers, (paragraph["context"],), related)
