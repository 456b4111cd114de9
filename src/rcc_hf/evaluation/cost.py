# SPDX-License-Identifier: Apache-2.0
"""What a method costs by length of the context: seconds to read it and to the first token, decoding, bytes, memory."""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rcc_hf.evaluation.encoding import encode_text, prefix_ids
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.fillers import NOISE
from rcc_hf.evaluation.methods import ContextMethod
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.processes import Processes
from rcc_hf.evaluation.runner import Row, Unit, run_batches, timed
from rcc_hf.evaluation.settings import TaskSettings
from rcc_hf.evaluation.tasks import take_fraction
from rcc_hf.surroundings import surroundings

__all__ = ["LENGTHS", "cost_examples", "evaluate_cost", "measure", "peak_bytes"]

LENGTHS = (2048, 8192, 32768)
_NUM_TOKENS = 64
_PROMPT = "\n\nWhat is the text above about?"
SECONDS = ("read_seconds", "prompt_seconds", "time_to_first_token", "decode_tokens_per_second")


def cost_examples(settings: TaskSettings) -> list[Example]:
    """What is measured: one example for each of `lengths`, shortest first, which generates `num_tokens`.

    Raises:
        ValueError: one of them is out of range.
    """
    lengths = sorted(dict.fromkeys(LENGTHS if settings.lengths is None else settings.lengths))
    num_tokens = settings.num_tokens or _NUM_TOKENS
    if not lengths or lengths[0] < 1 or num_tokens < 2:
        raise ValueError(
            f"lengths are {lengths} and num_tokens is {num_tokens}; cost needs contexts of at least 1 token, and at "
            "least 2 new ones"
        )
    return [
        Example(
            context="",
            question=_PROMPT,
            answer="-",
            max_new_tokens=num_tokens,
            task="cost",
            metadata={"length": length},
        )
        for length in take_fraction(lengths, settings)
    ]


def evaluate_cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    method: ContextMethod,
    folder: RunFolder,
    *,
    num_runs: int = 5,
    batch_size: int = 1,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the lengths that the folder does not hold yet, shortest first, and write its metrics.

    Args:
        model: Of the method.
        tokenizer: Of the model.
        examples: Those of `cost_examples`.
        method: What is kept of a context.
        folder: Where rows and metrics are written.
        num_runs: Runs of each length.
        batch_size: Rows, each with its own copy of the context.
        about: Further values for the metrics.
        progress: Whether a bar is shown.

    Returns:
        What `metrics.json` holds. Numbers of a group are medians over its runs; what each run gave is in the rows.

    Raises:
        ValueError: the folder is of another run.
    """

    def work(batch: list[Unit]) -> Iterator[Row]:
        for (index,) in batch:
            example = examples[index]
            contexts = [_context(tokenizer, example.metadata["length"]).to(model.device)] * batch_size
            prompts = [encode_text(tokenizer, example.question).to(model.device)] * batch_size
            found = measure(method, contexts, prompts, example.max_new_tokens, num_runs)
            yield index, "", found

    rows = run_batches(
        folder,
        examples,
        lambda remaining: [[index] for index in remaining],
        lambda units: ([unit] for unit in units),
        work,
        Processes(),
        progress,
    )
    metrics = _metrics(model, rows, batch_size, about or {})
    folder.write_metrics(metrics)
    return metrics


def measure(
    method: ContextMethod, contexts: Sequence[Tensor], prompts: Sequence[Tensor], num_tokens: int, num_runs: int
) -> dict[str, Any]:
    """Medians over runs, after one that is not counted.

    Args:
        method: What is kept.
        contexts: Ids `[T]` of each row.
        prompts: Ids `[t]` of each row.
        num_tokens: New tokens of each row; no id ends them early.
        num_runs: Runs.

    Returns:
        Of each of `SECONDS` the median and, in `runs`, what each run gave; `nbytes` and `entries` of a row,
        `peak_bytes` of the device or, on a CPU, of the process up to now. The time to the first token is that from
        ids of context and prompt; `prompt_seconds` is the part of it behind a finished reading.
    """
    device = method.model.device
    is_cuda = device.type == "cuda"
    no_stops: frozenset[int] = frozenset()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    runs: dict[str, list[float]] = {name: [] for name in SECONDS}

    def generate(count: int) -> Callable[[], list[Tensor]]:
        return lambda: method.generate(reading, prompts, max_new_tokens=count, stop_ids=no_stops)

    for run in range(num_runs + 1):
        with torch.no_grad():
            reading, read = timed(lambda: method.read(contexts), device)
            _, first = timed(generate(1), device)
            _, whole = timed(generate(num_tokens), device)
        if run:
            decode = len(prompts) * (num_tokens - 1) / max(whole - first, 1e-9)
            for name, value in zip(SECONDS, (read, first, read + first, decode), strict=True):
                runs[name].append(value)
    return {
        **{name: statistics.median(values) for name, values in runs.items()},
        "nbytes": reading.nbytes[0],
        "entries": reading.num_entries[0],
        "peak_bytes": peak_bytes(device),
        "num_runs": num_runs,
        "runs": runs,
    }


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that tensors took on a GPU since the last reset, or that this process took at all; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _context(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    ids = encode_text(tokenizer, " ".join(NOISE) + " ")
    return torch.cat([prefix_ids(tokenizer), ids.repeat(-(-length // len(ids)))])[:length]


def _metrics(
    model: PreTrainedModel, rows: Sequence[Mapping[str, Any]], batch_size: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    names = (*SECONDS, "nbytes", "entries", "peak_bytes")
    groups = [
        {
            "task": "cost",
            "length": row["metadata"]["length"],
            "num_examples": row["num_runs"],
            **{name: row[name] for name in names if row[name] is not None},
        }
        for row in rows
    ]
    return {
        **about,
        "num_examples": len(rows),
        "batch_size": batch_size,
        "num_tokens": rows[0]["max_new_tokens"],
        "model_nbytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "overall": {},
        "groups": groups,
        "environment": surroundings(model.device),
    }
