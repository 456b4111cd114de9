# SPDX-License-Identifier: Apache-2.0
"""Perplexity of held-out text behind histories of several lengths, of which a method keeps all, a part, or nothing."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rcc_hf.evaluation.encoding import encode_text, prefix_ids
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.methods import ContextMethod
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.passages import choose_places, read_texts
from rcc_hf.evaluation.processes import Processes
from rcc_hf.evaluation.reports import flat_means, group_rows, mean_and_error
from rcc_hf.evaluation.runner import Row, Unit, cut_batches, run_batches, timed
from rcc_hf.evaluation.settings import TaskSettings
from rcc_hf.evaluation.tasks import take_fraction

__all__ = ["HISTORIES", "Continuation", "continuations", "evaluate_perplexity"]

HISTORIES = (0, 512, 2048, 8192)
_NUM_TOKENS = 256


@dataclass(frozen=True)
class Continuation:
    """A history `[T]` and the tokens `[N]` behind it; at one place, histories of all lengths have the same ones.

    A history begins with what the tokenizer puts in front of a text, which counts, but is there without a history too.

    The first of these is not scored: without a history nothing predicts it.
    """

    history: Tensor
    target: Tensor
    example: Example


def continuations(tokenizer: PreTrainedTokenizerBase, settings: TaskSettings) -> list[Continuation]:
    """Of each place in the documents one for each length of history.

    Raises:
        ValueError: no document is long enough, or a number is out of range.
    """
    source = settings.data or "prose-held-out"
    histories = HISTORIES if settings.lengths is None else tuple(dict.fromkeys(settings.lengths))
    num_tokens = settings.num_tokens or _NUM_TOKENS
    if num_tokens < 2:
        raise ValueError("num_tokens is 1; perplexity needs at least 2, since the first one is not scored")
    documents = [encode_text(tokenizer, text) for _, text in read_texts(source)]
    longest = max(histories)
    count = settings.num_examples or 8
    places = choose_places(list(map(len, documents)), longest + num_tokens, count, settings.seed)
    begin, found = prefix_ids(tokenizer), []
    for document, start in take_fraction(places, settings):
        first = start + longest
        target = documents[document][first : first + num_tokens]
        for history in histories:
            before = documents[document][first - max(0, history - len(begin)) : first]
            example = Example(
                context=str(tokenizer.decode(before.tolist())),
                question="",
                answer=str(tokenizer.decode(target.tolist())),
                max_new_tokens=num_tokens,
                task="perplexity",
                metadata={"history": history, "document": document, "first_token": first},
            )
            found.append(Continuation(torch.cat([begin, before]), target, example))
    return found


def evaluate_perplexity(
    model: PreTrainedModel,
    asked: Sequence[Continuation],
    method: ContextMethod,
    folder: RunFolder,
    *,
    batch_size: int = 8,
    batch_tokens: int = 1 << 18,
    about: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure what the folder does not hold yet, and write its metrics.

    Args:
        model: Of the method.
        asked: Same ones in the same order whenever a run goes on.
        method: What is kept of a history.
        folder: Where rows and metrics are written.
        batch_size: Histories that are read together, at most.
        batch_tokens: Tokens of these and of what follows them, at most.
        about: Further values for the metrics.
        processes: Those that share the folder; default: this one alone.
        progress: Whether a bar is shown.

    Returns:
        What `metrics.json` holds; in all processes but the first nothing.

    Raises:
        ValueError: the folder is of another run.
    """
    processes = processes or Processes()
    examples = [item.example for item in asked]

    def size(unit: Unit) -> int:
        return len(asked[unit[0]].history) + len(asked[unit[0]].target)

    def work(batch: list[Unit]) -> Iterator[Row]:
        indices = [unit[0] for unit in batch]
        histories = [asked[index].history.to(model.device) for index in indices]
        targets = [asked[index].target.to(model.device) for index in indices]
        with torch.no_grad():
            reading, seconds = timed(lambda: method.read(histories), model.device)
            nats = method.nll(reading, targets)
        for row, index in enumerate(indices):
            yield (
                index,
                "",
                {
                    "nll": float(nats[row][1:].double().mean()),
                    "context_tokens": len(histories[row]),
                    "entries": reading.num_entries[row],
                    "nbytes": reading.nbytes[row],
                    "read_seconds": seconds / len(indices),
                },
            )

    rows = run_batches(
        folder,
        examples,
        lambda remaining: sorted(([index] for index in remaining), key=lambda unit: (-size(unit), unit)),
        lambda units: cut_batches(units, size, batch_size, batch_tokens),
        work,
        processes,
        progress,
    )
    if processes.index:
        return {}
    metrics = _metrics(examples, rows, about or {})
    folder.write_metrics(metrics)
    return metrics


def _metrics(
    examples: Sequence[Example], rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> dict[str, Any]:
    groups = [
        {**key, "num_examples": len(indices), **_means([rows[index] for index in indices])}
        for key, indices in group_rows(examples, ("history",))
    ]
    overall = {name: value for name, value in _means(rows).items() if isinstance(value, dict)}
    return {
        **about,
        "num_examples": len(rows),
        "num_tokens": sum(example.max_new_tokens - 1 for example in examples),
        **flat_means(overall),
        "overall": overall,
        "groups": groups,
        "nbytes_per_example": sum(row["nbytes"] for row in rows) / len(rows),
        "entries_per_example": sum(row["entries"] for row in rows) / len(rows),
        "seconds": {"read": math.fsum(row["read_seconds"] for row in rows)},
    }


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over places, which have as many tokens each; perplexity is that of the mean, its error to first order."""
    nll = mean_and_error([row["nll"] for row in rows])
    perplexity = {"mean": math.exp(nll["mean"])}
    if "stderr" in nll:
        perplexity["stderr"] = perplexity["mean"] * nll["stderr"]
    kept = {name: sum(row[name] for row in rows) / len(rows) for name in ("nbytes", "entries")}
    return {"nll": nll, "perplexity": perplexity} | {f"{name}_per_example": value for name, value in kept.items()}
