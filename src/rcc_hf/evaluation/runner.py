# SPDX-License-Identifier: Apache-2.0
"""Runs a model over examples: batches, several questions about one reading of a context, rows as they finish."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rcc_hf.evaluation.answers import AnswerReader, PlainAnswers
from rcc_hf.evaluation.encoding import Encoder, TextEncoder
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.methods import ContextMethod, Reading
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.processes import Processes
from rcc_hf.evaluation.reports import check_metrics, report
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM

__all__ = ["Row", "cut_batches", "evaluate", "find_stop_ids", "run_batches", "timed"]

Row = tuple[int, str, dict[str, Any]]
"""Index of an example, what was predicted, and further columns."""
Unit = list[int]
"""Indices of examples that are done together, by one process."""


def evaluate(
    model: RCCForCausalLM | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    method: ContextMethod,
    folder: RunFolder,
    *,
    batch_size: int = 8,
    batch_tokens: int = 1 << 18,
    encode: Encoder | None = None,
    answers: AnswerReader | None = None,
    stop_ids: frozenset[int] | None = None,
    group_by: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer, greedily, what the folder has no prediction of yet, and score everything.

    Args:
        model: Of the method; contexts and prompts are put on its device.
        tokenizer: Of the model.
        examples: Same ones in the same order whenever a run goes on.
        method: What is kept of a context; each different context is read once.
        folder: Where rows and metrics are written.
        batch_size: Contexts that are read together, and questions that are asked together, at most.
        batch_tokens: Tokens of the contexts of a batch, about and at most; a longer context is read alone.
        encode: Makes ids of an example; default: `TextEncoder(tokenizer)`.
        answers: Reads answers out of what is generated; default: all of it is the answer.
        stop_ids: End an answer; default: `find_stop_ids(model, tokenizer)`.
        group_by: Metadata by which scores are grouped in the metrics, beside the task.
        about: Further values for the metrics: names of task, model and method.
        processes: Those that share the folder; default: this one alone.
        progress: Whether a bar is shown.

    Returns:
        What `metrics.json` holds; in all processes but the first nothing.

    Raises:
        ValueError: there is no example, a metric is unknown, a prompt is empty, or the folder is of another run.
        ModuleNotFoundError: a metric needs a package that is not installed.
    """
    check_metrics(examples)
    processes = processes or Processes()
    work = _Answers(
        method,
        examples,
        encode or TextEncoder(tokenizer),
        answers or PlainAnswers(tokenizer),
        find_stop_ids(model, tokenizer) if stop_ids is None else stop_ids,
        model.device,
        (batch_size, batch_tokens),
    )

    def size(unit: Unit) -> int:
        return _length(examples[unit[0]])

    rows = run_batches(
        folder,
        examples,
        lambda remaining: sorted(_questions_of_contexts(examples, remaining), key=lambda unit: (-size(unit), unit)),
        lambda units: cut_batches(units, size, batch_size, batch_tokens),
        work,
        processes,
        progress,
    )
    if processes.index:
        return {}
    metrics = report(examples, rows, group_by=group_by, about=about or {})
    folder.write_metrics(metrics)
    folder.write_csv()
    return metrics


def find_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a text: those of the model's generation settings, and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ids = [found] if isinstance(found, int) else list(found or ())
    return frozenset(ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id])


def run_batches(
    folder: RunFolder,
    examples: Sequence[Example],
    units_of: Callable[[list[int]], list[Unit]],
    batches_of: Callable[[Sequence[Unit]], Iterable[list[Unit]]],
    work: Callable[[list[Unit]], Iterator[Row]],
    processes: Processes,
    progress: bool,
) -> list[dict[str, Any]]:
    """Do what is left, each process its share, and join the rows.

    Args:
        folder: Of the run, opened in each process under its own index.
        examples: All of them.
        units_of: Makes of the indices that are left units which one process does, in the order of work.
        batches_of: Cuts a process's units into batches.
        work: Gives the rows of a batch as they finish.
        processes: Those that share the folder.
        progress: Whether a bar is shown, by the first process, over its own share.

    Returns:
        All rows by index; in all processes but the first none.
    """
    remaining = folder.remaining(examples)
    processes.wait()  # else one would take for finished what another has just begun to write
    own = processes.share(units_of(remaining))
    total = sum(map(len, own))
    with tqdm(total=total, desc="Evaluating", unit="row", disable=not progress or processes.index > 0) as bar:
        for batch in batches_of(own):
            for index, prediction, columns in work(batch):
                folder.add(index, examples[index], prediction, **columns)
                bar.update()
    folder.close()
    processes.wait()
    rows = folder.merge() if processes.index == 0 else []
    processes.wait()
    return rows


def cut_batches(
    units: Sequence[Unit], size: Callable[[Unit], int], batch_size: int, batch_tokens: int
) -> Iterator[list[Unit]]:
    """Consecutive units, at most `batch_size`, padded to the longest at most `batch_tokens`, but at least one.

    Raises:
        ValueError: a limit is not positive.
    """
    if batch_size < 1 or batch_tokens < 1:
        raise ValueError(f"batch_size is {batch_size} and batch_tokens {batch_tokens}; both must be at least 1")
    batch: list[Unit] = []
    longest = 0
    for unit in units:
        longest = max(longest, size(unit))
        if batch and (len(batch) == batch_size or (len(batch) + 1) * longest > batch_tokens):
            yield batch
            batch, longest = [], size(unit)
        batch.append(unit)
    if batch:
        yield batch


def timed(function: Callable[[], Any], device: torch.device | str) -> tuple[Any, float]:
    """What a function returns, and the seconds until its work on the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def _questions_of_contexts(examples: Sequence[Example], remaining: Iterable[int]) -> list[Unit]:
    units: dict[str, Unit] = {}
    for index in remaining:
        units.setdefault(examples[index].context, []).append(index)
    return list(units.values())


def _length(example: Example) -> int:
    """Tokens of the context, from its metadata or about; only the order and the size of batches depend on it."""
    known = example.metadata.get("context_tokens")
    return known if isinstance(known, int) else len(example.context) // 4


class _Answers:
    """Reads the contexts of a batch, and asks all questions about them."""

    def __init__(
        self,
        method: ContextMethod,
        examples: Sequence[Example],
        encode: Encoder,
        answers: AnswerReader,
        stop_ids: frozenset[int],
        device: torch.device,
        limits: tuple[int, int],
    ):
        self._method, self._examples, self._encode, self._answers = method, examples, encode, answers
        self._stop_ids, self._device, self._limits = stop_ids, device, limits

    def __call__(self, batch: list[Unit]) -> Iterator[Row]:
        encoded = {index: self._encode(self._examples[index]) for unit in batch for index in unit}
        contexts = [encoded[unit[0]][0].to(self._device) for unit in batch]
        with torch.no_grad():
            reading, read_seconds = timed(lambda: self._method.read(contexts), self._device)
            asked = [(index, row) for row, unit in enumerate(batch) for index in unit]
            batch_size, batch_tokens = self._limits
            size = max(len(batch), min(batch_size, batch_tokens // max(1, *map(len, contexts))))
            for start in range(0, len(asked), size):
                turn = asked[start : start + size]
                prompts = [encoded[index][1].to(self._device) for index, _ in turn]
                made, seconds = timed(partial(self._generate, reading, turn, prompts), self._device)
                for (index, row), new in zip(turn, made, strict=True):
                    entries, length, example = reading.num_entries[row], len(contexts[row]), self._examples[index]
                    answer, further = self._answers.read(example, new[: self._answers.limit(example)], self._stop_ids)
                    columns = {
                        "context_tokens": length,
                        "entries": entries,
                        "nbytes": reading.nbytes[row],
                        "compression_ratio": _share_left_out(length, entries),
                        "read_seconds": read_seconds / len(asked),
                        "generate_seconds": seconds / len(turn),
                    }
                    yield index, answer, columns | further

    def _generate(self, reading: Reading, turn: list[tuple[int, int]], prompts: list[Tensor]) -> list[Tensor]:
        longest = max(self._answers.limit(self._examples[index]) for index, _ in turn)
        rows, stop_ids = reading.select([row for _, row in turn]), self._answers.stop_ids(self._stop_ids)
        return self._method.generate(rows, prompts, max_new_tokens=longest, stop_ids=stop_ids)


def _share_left_out(num_tokens: int, num_entries: int) -> float:
    """What kvpress calls compression ratio."""
    return round(max(0.0, 1 - num_entries / num_tokens), 6) if num_tokens else 0.0
